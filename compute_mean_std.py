"""Channel mean and standard deviation of DRIVE's training photographs inside the field of view."""

import argparse

import numpy as np

from my_dataset import OUTSIDE, DriveDataset
from src.colours import channel_statistics
from train_utils.command_line import Parser, run_script


def compute_mean_std(dataset: DriveDataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the photographs of each one's channel mean and standard deviation, in [0, 1], each float64 [3]."""
    photographs = zip(dataset.images, dataset.labels, strict=True)
    means, stds = zip(*(channel_statistics(image, label != OUTSIDE) for image, label in photographs), strict=True)
    return np.mean(means, axis=0), np.mean(stds, axis=0)


def main(args: argparse.Namespace) -> None:
    mean, std = compute_mean_std(DriveDataset(args.data_path, train=True))
    print(f"mean: {mean}")
    print(f"std: {std}")
    mean_flag, std_flag = (" ".join(f"{value:.3f}" for value in values) for values in (mean, std))
    print(f"to train with these: --mean {mean_flag} --std {std_flag}")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", default="./", help="the folder that contains DRIVE")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser().parse_args())
