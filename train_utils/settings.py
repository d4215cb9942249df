"""The flags that were left open, settled once; and what the settled flags mean."""

import argparse
import itertools

import torch

from my_dataset import working_diameter
from src import ARCHITECTURES, BackboneUNet
from src.dataset_files import LabelledPhotograph, Split, find_parts
from src.photograph import image_size
from src.segment import match_scale
from src.weights import Checkpoint

from .command_line import UsageError
from .distributed_utils import (
    broadcast_object,
    gather_objects,
    is_dist_avail_and_initialized,
    is_main_process,
    on_main_process,
)
from .flags import SHARE_FOR_PHOTOGRAPHS
from .mixed_precision import settle_amp

MOBILENET_STRIDE = 32  # pixels along a side for one of the deepest features


def settle(
    args: argparse.Namespace,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    initial: Checkpoint | None = None,
) -> None:
    """Settle the flags of `add_training_flags` that were left open; from here on `args` is only read.

    `val_split` stays None where each of several data sets has a default of its own.

    Args:
        args: of `init_distributed_mode` in many processes, else as parsed.
        device: to train on.
        checkpoint: that training goes on from.
        initial: whose weights a new run starts from.

    Raises:
        UsageError: a flag cannot work here.
        DatasetError: there is no data set, or nothing to validate on.
    """
    if args.masks:
        raise UsageError(f"--masks {args.masks}: does nothing without --test-only; add --test-only")
    if args.init_weights and (args.resume not in ("", "auto") or args.backbone_weights):
        other = "--backbone-weights" if args.backbone_weights else "--resume"
        raise UsageError(f"--init-weights {args.init_weights}: starts a new run from these weights; leave out {other}")
    if args.train_on_all and checkpoint is not None and checkpoint.get("validated_on"):
        raise UsageError(
            f"--train-on-all: the run of {checkpoint['path']} holds photographs out, and its best epoch would be lost; "
            "let --init-weights start a new run from it, in another --output-dir"
        )
    for flag, weights in (("--init-weights", args.init_weights), ("--backbone-weights", args.backbone_weights)):
        if weights and checkpoint is not None and is_main_process():
            print(f"{flag} {weights}: not read again, as the run goes on from {checkpoint['path']}")
    require_two_classes_for_threshold(args.num_classes + 1, args.threshold)
    if args.backbone_weights and not issubclass(ARCHITECTURES[args.arch][0], BackboneUNet):
        raise UsageError(f"--backbone-weights: {args.arch} has no backbone; use --arch mobilenet_v3 or --arch vgg16")
    if args.tensorboard:
        on_main_process(require_tensorboard)
    if args.arch == "mobilenet_v3" and args.crop_size <= MOBILENET_STRIDE:
        raise UsageError(
            f"--crop-size {args.crop_size}: one pixel is left of it in --arch mobilenet_v3, of which BatchNorm cannot "
            f"learn; give more than {MOBILENET_STRIDE}"
        )
    settle_amp(args, device)
    if args.channels_last is None:
        # The processors of several machines may differ, but the model's copies may not.
        args.channels_last = broadcast_object(_channels_last_is_faster(args, device))
    if args.compile:
        _require_compiler(device)
    _settle_cuda_graphs(args, device)
    _settle_split(args)
    if checkpoint is not None:  # a run goes on as it was, unless a flag says otherwise
        args.resume = checkpoint["path"]  # that --resume auto found
        if args.base_size is None:
            args.base_size = checkpoint["args"].get("base_size")
        if args.fov_diameter is None and "selected_on" in checkpoint:  # the tutorial's files do not hold it
            args.fov_diameter = checkpoint["fov_diameter"]
    if args.fov_diameter is None:
        diameter = working_diameter(training_and_validation(args)[0])
        args.fov_diameter = diameter if initial is None else _diameter_to_go_on_at(initial, diameter)
    if args.device_data is None:
        args.device_data = all(gather_objects(device.type == "cuda" and _photographs_fit(args, device)))
    if args.device_data:
        args.workers = 0
    require_use_of_scales(args, checkpoint)
    if checkpoint is not None:
        if args.tta is None:
            args.tta = checkpoint.get("tta")
        if args.tta_scales is None:
            args.tta_scales = checkpoint.get("tta_scales")


def require_use_of_scales(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Raise where --tta-scales is given, and neither --tta nor a checkpoint asks for a mean over views.

    Raises:
        UsageError: it is.
    """
    if args.tta_scales and args.tta is None and not (checkpoint and checkpoint.get("tta")):
        raise UsageError(f"--tta-scales {' '.join(map(str, args.tta_scales))}: does nothing without --tta; add --tta")


def require_tensorboard() -> None:
    """Raise where the package tensorboard is missing.

    Raises:
        UsageError: it is.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError("--tensorboard: the package tensorboard is missing; run: pip install tensorboard") from error


def require_two_classes_for_threshold(classes: int, threshold: float | str) -> None:
    """Raise where a threshold is given for a model of more than two classes.

    Raises:
        UsageError: it is.
    """
    if classes > 2 and threshold != 0.5:
        raise UsageError(f"--threshold {threshold}: has no meaning for {classes} classes; leave it out")


def _diameter_to_go_on_at(checkpoint: Checkpoint, diameter: float) -> float:
    """The working diameter of weights, for photographs of a diameter; larger where they see these larger."""
    plain, seen = (
        match_scale(diameter, checkpoint["fov_diameter"], trained_scale)
        for trained_scale in (None, checkpoint.get("trained_scale"))
    )
    return checkpoint["fov_diameter"] * seen / plain


def _channels_last_is_faster(args: argparse.Namespace, device: torch.device) -> bool:
    if device.type == "cpu":
        # With AVX2 alone the forward pass gains a fifth, but the backward pass loses half and more.
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.type == "cuda" and (args.amp or _computes_in_tf32(device))


def _computes_in_tf32(device: torch.device) -> bool:
    """Whether the GPU's tensor cores take the convolutions of float32: NVIDIA's since Ampere do."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _settle_cuda_graphs(args: argparse.Namespace, device: torch.device) -> None:
    obstacles = {
        f"works on GPUs alone; leave it out on {device.type}": device.type != "cuda",
        "works in one process alone; leave it out": is_dist_avail_and_initialized(),
        "does in another way what --compile does; give one of them": args.compile,
    }
    found = [reason for reason, is_there in obstacles.items() if is_there]
    if args.cuda_graphs and found:
        raise UsageError(f"--cuda-graphs: {found[0]}")
    if args.cuda_graphs is None:
        args.cuda_graphs = not found and torch.version.hip is None  # on AMD's GPUs nobody has tried them yet


def _settle_split(args: argparse.Namespace) -> None:
    if args.fold and args.val_split:
        raise UsageError(f"--fold {args.fold}: holds photographs out, as --val-split {args.val_split} does; give one")
    if args.train_on_all and (args.fold or args.val_split):
        other = f"--fold {args.fold}" if args.fold else f"--val-split {args.val_split}"
        raise UsageError(f"--train-on-all: holds no photographs out, as {other} does; give one")
    if args.train_on_all and args.threshold == "auto":
        raise UsageError("--threshold auto: needs held-out photographs, and --train-on-all has none; give a number")
    if args.fold or args.train_on_all:
        args.val_split = 0
        return
    held_out = {root: Split(args.val_split).held_out(root) for root in roots(args)}
    for root, count in held_out.items():
        if count and not args.val_split and is_main_process():
            parts = find_parts(root)
            lacks = (
                f"{parts['test']} has no labels (the official download of DRIVE has none)"
                if "test" in parts
                else f"{root} has no test photographs"
            )
            print(
                f"{lacks}: validating on the last {count} training photographs, which are not trained on "
                "(--val-split N chooses how many)"
            )
    # Data sets that differ keep None, which means each one's own default.
    if args.val_split is None and len(set(held_out.values())) == 1:
        args.val_split = next(iter(held_out.values()))


def _photographs_fit(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the photographs take at most a share of the GPU's free memory: three colours and a label each."""
    sizes = 2 if args.augmentation == "any-camera" else 1
    size = 0.0
    for item in itertools.chain(*training_and_validation(args)):
        width, height = image_size(item.photograph)
        enlarged = max(args.fov_diameter / min(width, height), 1.0)
        size += 4 * width * height * enlarged**2 * sizes
    return size <= SHARE_FOR_PHOTOGRAPHS * torch.cuda.mem_get_info(device)[0]


def _require_compiler(device: torch.device) -> None:
    reasons = [reason for reason in gather_objects(_why_not_to_compile(device)) if reason]
    if reasons:
        raise UsageError(f"--compile: torch.compile does not work here ({reasons[0]}); train without it")


def _why_not_to_compile(device: torch.device) -> str | None:
    # torch.compile needs Triton on a GPU and a C++ compiler on a CPU, and looks for them when it is first used.
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


# ---- what the settled flags mean


def roots(args: argparse.Namespace) -> list[str]:
    """The data sets that --data-path names."""
    return [args.data_path] if isinstance(args.data_path, str) else list(args.data_path)


def fold(args: argparse.Namespace) -> tuple[int, int] | None:
    """(K, N) of --fold K/N."""
    if not args.fold:
        return None
    number, folds = map(int, args.fold.split("/"))
    return number, folds


def training_and_validation(args: argparse.Namespace) -> tuple[list[LabelledPhotograph], list[LabelledPhotograph]]:
    """The photographs that the settled flags train on, and those that they validate on.

    Raises:
        DatasetError: as `Split.divide`.
    """
    return Split(args.val_split, fold(args), args.train_on_all).divide(roots(args))


def model_arguments(args: argparse.Namespace) -> dict[str, str | int]:
    """The arguments of `src.create_model` that the flags ask for."""
    widths = {"base_c": args.base_c} if "base_c" in ARCHITECTURES[args.arch][1] else {}
    return {"arch": args.arch, "num_classes": args.num_classes + 1} | widths


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """The memory format of the model that the settled flags ask for."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def evaluation_pixels(args: argparse.Namespace) -> int | None:
    """How many pixels to evaluate at once where the photographs live on the device; elsewhere None, for one photograph.

    Without gradients a pixel takes less than half the memory that it takes in training.
    """
    return 2 * args.batch_size * args.crop_size**2 if args.device_data else None
