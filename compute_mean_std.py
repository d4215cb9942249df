"""Mean and standard deviation of the training photographs' channels, and the sizes that a model works at."""

import src.threads  # noqa: F401  # before torch is imported

# isort: split

import argparse
import statistics
from collections.abc import Iterable

import numpy as np

from my_dataset import read_field_of_view, working_diameter
from src.colours import channel_statistics
from src.dataset_files import LabelledPhotograph, require_different, training_photographs
from src.field_of_view import field_of_view_diameter
from src.photograph import read_photograph
from src.roi_mask import whole_retina
from src.segment import match_scale
from train_utils.command_line import Parser, run_script
from train_utils.flags import add_data_path
from train_utils.settings import roots


def compute_mean_std(files: Iterable[LabelledPhotograph], diameter: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Statistics of photographs inside their fields of view.

    Args:
        files: of the photographs.
        diameter: the working diameter, pixels.

    Returns:
        the means over the photographs of each one's channel mean and standard deviation, in [0, 1], float64 [3] each;
        and the median of their shorter sides at the working diameter, pixels.

    Raises:
        DatasetError: a file cannot be read.
    """
    means, stds, sides = [], [], []
    for item in files:
        photograph = read_photograph(item.photograph)
        field_of_view = read_field_of_view(item, photograph)
        if item.roi_mask is not None:
            field_of_view = whole_retina(field_of_view, photograph)
        mean, std = channel_statistics(photograph, field_of_view)
        means.append(mean)
        stds.append(std)
        scale = match_scale(field_of_view_diameter(field_of_view), diameter)
        sides.append(round(scale * min(photograph.shape[:2])))
    return np.mean(means, axis=0), np.mean(stds, axis=0), statistics.median(sides)


def main(args: argparse.Namespace) -> None:
    files = [item for root in roots(args) for item in training_photographs(root)]
    require_different(files)
    diameter = working_diameter(files)
    mean, std, shorter_side = compute_mean_std(files, diameter)
    print(f"mean: {mean}")
    print(f"std: {std}")
    mean_flag, std_flag = (" ".join(f"{value:.3f}" for value in values) for values in (mean, std))
    print(f"to train with these: --mean {mean_flag} --std {std_flag}")
    print(f"working diameter: {diameter:g} pixels across the field of view (--fov-diameter)")
    print(f"shorter side at the working diameter: {shorter_side:g} pixels (--base-size)")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, "python compute_mean_std.py --data-path MY_DATA")
    add_data_path(parser)
    return parser


if __name__ == "__main__":
    run_script(main, get_parser().parse_args())
