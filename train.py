"""Train the U-Net on DRIVE on one device."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from my_dataset import DatasetError, find_drive
from src import create_model
from train_utils.checkpoint import BEST_MODEL
from train_utils.command_line import Parser, at_least, run_script, select_device
from train_utils.data_loading import default_workers, evaluation_loader, training_loader
from train_utils.files import make_output_folder
from train_utils.fit import add_training_flags, changed_defaults, fit, model_arguments, open_datasets
from train_utils.scores import conclude_training, score_weights
from train_utils.speed import evaluation_pixels, memory_format, place_photographs, settle_speed
from train_utils.synthetic_drive import write_synthetic_drive

# A small U-Net on small made-up photographs: the whole way in about a minute on two cores.
DEMO_DEFAULTS = {
    "data_path": "./demo",
    "output_dir": "./demo/save_weights",
    "base_c": 16,
    "epochs": 10,
    "lr": 0.05,
    "base_size": 400,
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
        score_weights(args.resume, device, args)
        return
    settle_speed(args, device)
    train_data, val_data = place_photographs(open_datasets(args), device, args)

    torch.manual_seed(args.seed)
    model = create_model(**model_arguments(args)).to(device, memory_format=memory_format(args))

    pin_memory = device.type == "cuda" and not args.device_data
    workers = default_workers(device, args.batch_size) if args.workers is None else args.workers
    val_loader = evaluation_loader(val_data, workers, pin_memory=pin_memory, batch_pixels=evaluation_pixels(args))
    train_loader = training_loader(
        train_data,
        args.batch_size,
        workers,
        args.seed,
        drop_last=False,
        pin_memory=pin_memory,
        steps=args.steps_per_epoch,
    )
    best_dice = fit(model, train_loader, val_loader, device, args)
    conclude_training(device, args)
    print(f"best Dice {best_dice:.3f}; the weights are in {args.output_dir}")
    if args.demo:
        photograph, roi_mask = val_data.img_list[0], val_data.roi_mask[0]
        print(
            f"now try: python predict.py --weights {Path(args.output_dir, BEST_MODEL)} --image {photograph} "
            f"--roi-mask {roi_mask} --output {Path(args.output_dir, photograph.stem)}_vessels.png"
        )


def make_demo_data(root: str) -> None:
    """Write made-up photographs to `root/DRIVE`, unless there is a data set already."""
    try:
        find_drive(root)
    except DatasetError:
        if Path(root, "DRIVE").exists():
            raise
        print(f"writing made-up photographs to {Path(root, 'DRIVE')}")
        make_output_folder(root, "--data-path")
        write_synthetic_drive(root, training=20, test=8)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_training_flags(parser)
    parser.add_argument("--output-dir", default="./save_weights", help="folder of the weights")
    parser.add_argument(
        "-j", "--workers", type=at_least(0), help="data loading processes (default: by device and batch size)"
    )
    parser.add_argument("--demo", action="store_true", help="a quick run on made-up photographs in ./demo")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; --recipe, --arch and --demo change the defaults of others."""
    parser = get_parser()
    asked = parser.parse_args(argv)
    parser.set_defaults(**changed_defaults(asked, DEMO_DEFAULTS if asked.demo else None))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
