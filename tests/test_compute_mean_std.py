import numpy as np
import pytest
from PIL import Image

import compute_mean_std
import train
from my_dataset import DRIVE_FOV_DIAMETER, DRIVE_MEAN, DRIVE_STD
from src.dataset_files import training_photographs


def test_mean_over_photographs_of_each_ones_own(drive, capsys):
    folder = drive / "DRIVE" / "training"
    means, deviations = [], []
    for key in range(21, 27):
        pixels = np.array(Image.open(folder / "images" / f"{key}_training.tif"))
        inside = np.array(Image.open(folder / "mask" / f"{key}_training_mask.gif").convert("L")) > 0
        means.append([pixels[..., channel][inside].mean() / 255 for channel in range(3)])
        deviations.append([pixels[..., channel][inside].std() / 255 for channel in range(3)])
    mean, std, shorter_side = compute_mean_std.compute_mean_std(training_photographs(drive), diameter=35.0)
    assert shorter_side == pytest.approx(36, abs=1)  # half of 72
    assert np.allclose(mean, np.mean(means, axis=0)) and np.allclose(std, np.mean(deviations, axis=0))

    compute_mean_std.main(compute_mean_std.get_parser().parse_args(["--data-path", str(drive)]))
    output = capsys.readouterr().out
    assert output.startswith(f"mean: {mean}\nstd: {std}\n")
    flags = output.splitlines()[2].split(": ")[-1].split()
    args = train.parse_args(flags)
    assert args.mean == pytest.approx(mean, abs=5e-4) and args.std == pytest.approx(std, abs=5e-4)


def test_constants_of_drive(real_drive):
    files = training_photographs(real_drive)
    mean, std, shorter_side = compute_mean_std.compute_mean_std(files, DRIVE_FOV_DIAMETER)
    assert shorter_side == 565
    if len(files) == 20:  # the official training folder
        assert mean == pytest.approx(DRIVE_MEAN, abs=6e-4) and std == pytest.approx(DRIVE_STD, abs=6e-4)
    assert mean == pytest.approx(DRIVE_MEAN, abs=0.03) and std == pytest.approx(DRIVE_STD, abs=0.01)
