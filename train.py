"""Train the U-Net on DRIVE on one device."""

import src.threads  # noqa: F401  # before torch is imported

# isort: split

import argparse
import functools
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from src import create_model
from src.dataset_files import find_parts
from src.errors import DatasetError
from train_utils.checkpoint import BEST_MODEL
from train_utils.command_line import Parser, UsageError, at_least, run_script, select_device
from train_utils.data_loading import make_loaders, open_datasets
from train_utils.files import make_output_folder
from train_utils.fit import fit
from train_utils.flags import add_training_flags, parse_with_recipe
from train_utils.memory import explain_out_of_memory
from train_utils.run_folder import own_output_folder, record_run
from train_utils.scoring import check_what_is_scored, conclude_training, score
from train_utils.settings import memory_format, model_arguments, settle
from train_utils.synthetic_drive import write_synthetic_drive
from train_utils.training_state import TrainingState, load_initial, load_to_resume

# A small U-Net on small synthetic photographs: training and scores in about a minute on two cores.
DEMO_DEFAULTS = {
    "data_path": "./demo",
    "output_dir": "./demo/save_weights",
    "base_c": 16,
    "epochs": 10,
    "lr": 0.05,
    "crop_size": 224,
    "print_freq": 5,
}


def main(args: argparse.Namespace) -> None:
    if args.demo:
        make_demo_data(args.data_path)
    device = select_device(args.device)
    print(f"using {device} device.")
    make_output_folder(args.output_dir, "--output-dir")
    if args.test_only:
        score(device, args)
        return
    own_demo = args.demo and Path(args.output_dir) == Path(DEMO_DEFAULTS["output_dir"])
    with own_output_folder(args, overwrite=args.overwrite or own_demo):
        run(device, args)


def run(device: torch.device, args: argparse.Namespace) -> None:
    checkpoint = load_to_resume(args)
    initial = load_initial(args, checkpoint)
    settle(args, device, checkpoint, initial)
    train_data, val_data = open_datasets(args, device)
    files = train_data.files, val_data.files
    check_what_is_scored(*files, args, checkpoint or initial)
    train_loader, val_loaders = make_loaders(train_data, val_data, device, args, drop_last=False)

    torch.manual_seed(args.seed)
    with explain_out_of_memory("lower --base-c, or use another --arch"):
        model = create_model(**model_arguments(args)).to(device, memory_format=memory_format(args))
    state = TrainingState(model, device, len(train_loader), args, *files, **train_data.what_a_model_knows())
    record = functools.partial(record_run, args, device, *files, checkpoint)
    best_dice = fit(model, state, train_loader, val_loaders, checkpoint, initial, record)
    conclude_training(device, args, best_dice)
    if args.demo and val_data.files:
        photograph, roi_mask = val_data.files[0].photograph, val_data.files[0].roi_mask
        weights = Path(args.output_dir, BEST_MODEL)
        flags = ["--weights", weights, "--image", photograph, *(["--roi-mask", roi_mask] if roi_mask else [])]
        output = Path(args.output_dir, f"{photograph.stem}_vessels.png")
        command = ["python", "predict.py", *map(str, flags), "--output", str(output)]
        print(f"now try: {subprocess.list2cmdline(command) if os.name == 'nt' else shlex.join(command)}")


def make_demo_data(root: str | list[str]) -> None:
    """Write synthetic photographs to `root/DRIVE`, unless there is a data set."""
    if not isinstance(root, str):
        raise UsageError(f"--data-path {' '.join(root)}: the demo takes one folder; leave out --demo, or name one")
    try:
        find_parts(root)
    except DatasetError:
        if Path(root, "DRIVE").exists():
            raise
        print(f"writing synthetic photographs to {Path(root, 'DRIVE')}")
        make_output_folder(root, "--data-path")
        write_synthetic_drive(root, training=20, test=8)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, "python train.py --data-path FOLDER_WITH_DRIVE --recipe quick")
    add_training_flags(parser)
    group = parser.group("used most")
    group.add_argument("--output-dir", default="./save_weights", help="folder of the weights")
    group.add_argument("--demo", action="store_true", help="a quick run on synthetic photographs in ./demo")
    parser.group("speed").add_argument(
        "-j", "--workers", type=at_least(0), help="data loading processes (default: by device and batch size)"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_with_recipe(get_parser(), argv, DEMO_DEFAULTS)


if __name__ == "__main__":
    run_script(main, parse_args())
