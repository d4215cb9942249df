"""The flags of the training scripts, and the defaults that --recipe, --arch and --demo change."""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from my_dataset import DRIVE_MEAN, DRIVE_STD
from src import ARCHITECTURES
from src.weights import CheckpointError, load_checkpoint
from transforms import AUGMENTATIONS

from .checkpoint import LAST_MODEL
from .command_line import Flags, Parser, add_switch, at_least, fold_of_folds, probability_or_auto
from .mixed_precision import add_amp_flags
from .normalization import add_normalization_flags
from .recipes import RECIPES

# The share of a GPU's free memory that the photographs may take; the rest is for the model.
SHARE_FOR_PHOTOGRAPHS = 0.25


def add_training_flags(parser: Parser) -> None:
    """Add the flags of both training scripts, with the tutorial's names and defaults."""
    group = parser.group("used most")
    add_data_path(group)
    group.add_argument(
        "--recipe",
        default="tutorial",
        choices=list(RECIPES),
        help="defaults of the other flags (train_utils/recipes.py). tutorial: the tutorial's; quick: the same Dice "
        "within minutes on a CPU; best: the highest Dice on DRIVE; any-camera: for photographs of other cameras",
    )
    group.add_argument(
        "--resume",
        default="",
        help="continue from this checkpoint; auto: from the newest in --output-dir, if any (to score: the best)",
    )
    group = parser.group("data")
    group.add_argument(
        "--sampling",
        default="equal",
        choices=["equal", "proportional"],
        help="how often each of several data sets is drawn: equally, or in proportion to its photographs",
    )
    group.add_argument(
        "--num-classes", default=1, type=at_least(1, below=255), help="number of classes besides the background"
    )
    group.add_argument(
        "--val-split",
        type=at_least(0),
        metavar="N",
        help="validate on the last N training photographs of each data set instead of the test photographs "
        "(default: 0 with test labels, else a fifth of them)",
    )
    group.add_argument(
        "--fold",
        type=fold_of_folds,
        metavar="K/N",
        help="cross-validation: hold out the K-th of N parts of the training photographs, and score these",
    )
    group.add_argument(
        "--train-on-all",
        action="store_true",
        help="train on every labelled photograph, those of a test part too, for as many epochs as given: nothing is "
        "validated or scored, and the last epoch is kept. For weights to use, after all was chosen by --fold",
    )
    group.add_argument(
        "--augmentation",
        choices=list(AUGMENTATIONS),
        help="training preset. tutorial: the tutorial's; rotation: scales nearer to 1, any rotation and colour jitter; "
        "any-camera: more of what differs between cameras",
    )
    group.add_argument(
        "--base-size",
        type=at_least(2, below=20000),
        help="shorter side in pixels; the preset resizes to 0.5 - 1.2 times this (rotation: 0.8 - 1.15, any-camera: "
        "0.6 - 1.6) (default: that of each photograph at the working diameter)",
    )
    group.add_argument("--crop-size", type=at_least(32, below=20000), help="side of the training crops")
    group.add_argument(
        "--fov-diameter",
        type=at_least(32, float, below=20000),
        metavar="PIXELS",
        help="working diameter: the field of view that each photograph is resized to in training, validation, scores "
        "and predictions, unless it is within 5 percent of it. Stored with the weights (default: the median of the "
        "training photographs, of several data sets the middle of their medians; with --init-weights, theirs)",
    )
    add_normalization_flags(group, list(DRIVE_MEAN), list(DRIVE_STD), origin="Stored with the weights")
    group = parser.group("model")
    group.add_argument("--arch", default="unet", choices=list(ARCHITECTURES), help="architecture of the model")
    group.add_argument(
        "--base-c",
        type=at_least(1, below=10000),
        help="channels at full resolution of unet and unet_paper (default of unet_paper: 64)",
    )
    group.add_argument(
        "--init-weights",
        default="",
        metavar="FILE",
        help="start a new run from the weights of this file, for example to fine-tune pretrained/unet_fundus.pth; its "
        "architecture, normalization, working diameter (larger where these weights see the photographs larger), --tta "
        "and --tta-scales become the defaults. With --resume auto: for the first start alone",
    )
    group.add_argument(
        "--backbone-weights",
        metavar="FILE",
        help="file of torchvision's ImageNet weights to start mobilenet_v3 or vgg16 from; imagenet: download it",
    )
    group = parser.group("optimisation")
    group.add_argument("-b", "--batch-size", type=at_least(1), help="photographs per step in each process")
    group.add_argument("--epochs", type=at_least(1), help="number of epochs of the whole run")
    group.add_argument(
        "--start-epoch", "--start_epoch", default=0, type=at_least(0), help="first epoch of a run without --resume"
    )
    group.add_argument(
        "--steps-per-epoch",
        type=at_least(1),
        metavar="N",
        help="steps per epoch (default: as many samples as there are photographs; of one data set each once)",
    )
    group.add_argument(
        "--optimizer", choices=["sgd", "adamw", "muon"], help="optimizer; muon: Muon for filters, AdamW for all else"
    )
    group.add_argument("--lr", type=at_least(0, float, below=1e36), help="peak learning rate")
    group.add_argument("--momentum", default=0.9, type=at_least(0, float), help="momentum of --optimizer sgd")
    group.add_argument(
        "--wd", "--weight-decay", type=at_least(0, float, below=1e36), dest="weight_decay", help="weight decay"
    )
    group.add_argument(
        "--schedule",
        choices=["poly", "one-cycle"],
        help="learning-rate schedule. poly: warm-up epoch, then polynomial decay; one-cycle: a cosine up and down",
    )
    group.add_argument(
        "--vessel-weight",
        type=at_least(0, float),
        help="weight of the vessels in the cross-entropy; that of the background is 1 (only with two classes)",
    )
    group.add_argument(
        "--dice-loss", choices=["all", "foreground"], help="the classes that the Dice loss averages over"
    )
    group.add_argument(
        "--ema-decay",
        type=at_least(0, float, below=1),
        help="decay per step of the moving average of the weights, which is evaluated and saved (less in the first "
        "steps); 0: no average",
    )
    group.add_argument("--seed", default=0, type=at_least(0), help="seed of all random numbers")
    group = parser.group("speed")
    group.add_argument("--device", default="cuda", help="device to train on; without a GPU, cuda means the CPU")
    add_speed_flags(group)
    group = parser.group("scores")
    group.add_argument(
        "--test-only",
        action="store_true",
        help="only score the weights of --resume: on the test photographs, or without test labels on all photographs "
        "that they were not trained on",
    )
    group.add_argument(
        "--masks", metavar="FOLDER", help="with --test-only: score the masks in this folder, in place of weights"
    )
    group.add_argument(
        "--threshold",
        default=0.5,
        type=probability_or_auto,
        help="vessel probability above which a pixel is a vessel in the scores; auto: the one of the best Dice on the "
        "held-out photographs (where none are held out: on the training ones), stored with the weights",
    )
    add_switch(
        group,
        "--tta",
        default=None,
        help="score the mean over the four flips, in four times the time; stored with the weights for predict.py "
        "and --test-only (default: as stored, else off)",
    )
    group.add_argument(
        "--tta-scales",
        nargs="+",
        type=at_least(0.25, float, below=5),
        metavar="SCALE",
        help="with --tta: the mean over these sizes, multiples of the working one, each mirrored in another way (1 1: "
        "two flips of one size); of one alone, over its four flips (default: as stored, else 1)",
    )
    group = parser.group("output")
    group.add_argument(
        "--print-freq",
        type=at_least(1),
        action=_PrintFreq,
        help="steps between progress lines, each of which stays; without this flag a terminal shows one line an epoch",
    )
    add_switch(group, "--save-best", default=True, help="keep only the best epoch and the last, not every one")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="begin a new run in an --output-dir that holds another run's weights, and replace them",
    )
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events into --output-dir")
    parser.set_defaults(progress_lines=False, **RECIPES["tutorial"])


def add_data_path(flags: Flags) -> None:
    """Add the flag that names the data, as a text, or as a list of texts where there are several."""
    flags.add_argument(
        "--data-path",
        nargs="+",
        default="./",
        action=_OneOrSeveral,
        metavar="FOLDER",
        help="the folder that contains DRIVE, or a folder with images and labels; or several",
    )


class _PrintFreq(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, value: int, option: object = None) -> None:
        namespace.print_freq, namespace.progress_lines = value, True


class _OneOrSeveral(argparse.Action):
    def __call__(self, parser: object, namespace: argparse.Namespace, values: list[str], option: object = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_speed_flags(flags: Flags) -> None:
    """Add the flags that change the speed of training."""
    add_amp_flags(flags)
    add_switch(
        flags,
        "--channels-last",
        default=None,
        help="channels-last memory format (default: on a GPU with --amp or TF32 and on a CPU with AVX-512; elsewhere "
        "training can be slower by it)",
    )
    add_switch(flags, "--compile", default=False, help="compile the training step with torch.compile")
    add_switch(
        flags,
        "--cuda-graphs",
        default=None,
        help="launch the kernels of a training step together, as a CUDA graph, which keeps their memory (default: on "
        "NVIDIA's GPUs in one process, without --compile)",
    )
    add_switch(
        flags,
        "--device-data",
        default=None,
        help="keep the photographs in the device's memory and augment them there, without loading processes "
        f"(default: on a GPU, if they take at most {SHARE_FOR_PHOTOGRAPHS:.0%} of its free memory)".replace("%", "%%"),
    )


def default_flags() -> dict[str, Any]:
    """The defaults of the flags of both training scripts, by name."""
    parser = Parser(None)
    add_training_flags(parser)
    return vars(parser.parse_args([]))


def parse_with_recipe(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, demo: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Read the flags. --arch, then --demo (to `demo`), --recipe and --init-weights change the defaults of others."""
    asked = parser.parse_args(argv)
    of_weights = _defaults_of_weights(asked, parser) if asked.init_weights else {}
    defaults = {
        name: value for name, value in ARCHITECTURES[of_weights.get("arch", asked.arch)][1].items() if name == "base_c"
    }
    if demo and asked.demo:
        defaults |= demo
    if asked.recipe != "tutorial":
        defaults |= RECIPES[asked.recipe]
    defaults |= of_weights
    if asked.test_only:  # what is not given follows from the weights
        defaults |= dict.fromkeys(("mean", "std", "normalization"))
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for name in ("arch", "num_classes", "base_c"):
        if of_weights.get(name, getattr(args, name)) != getattr(args, name):
            parser.error(
                f"argument --{name.replace('_', '-')}: {getattr(args, name)}, but the weights of --init-weights "
                f"{args.init_weights} have {of_weights[name]}; leave it out"
            )
    return args


def _defaults_of_weights(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The flags that a model is to be fine-tuned with: those of its own training that the weights depend on.

    Where --resume auto goes on, they are in the run's own state; the weights that it began with may be gone.
    """
    checkpoint = None
    if asked.resume == "auto":
        with contextlib.suppress(CheckpointError):
            checkpoint = load_checkpoint(Path(asked.output_dir, LAST_MODEL))
    try:
        checkpoint = checkpoint or load_checkpoint(asked.init_weights)
    except CheckpointError as error:
        parser.error(f"argument --init-weights: {error}")
    model_args = checkpoint["model_args"]
    defaults = {name: checkpoint[name] for name in ("mean", "std", "normalization")}
    if checkpoint.get("tta"):  # without it, what the recipe says
        defaults |= {name: checkpoint[name] for name in ("tta", "tta_scales") if name in checkpoint}
    defaults |= {"arch": model_args["arch"], "num_classes": model_args["num_classes"] - 1}
    return defaults | ({"base_c": model_args["base_c"]} if "base_c" in model_args else {})
