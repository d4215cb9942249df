import numpy as np
import pytest
from PIL import Image

import compute_mean_std
import train
from my_dataset import DRIVE_MEAN, DRIVE_STD, DriveDataset


def test_mean_over_photographs_of_each_ones_own(drive, capsys):
    folder = drive / "DRIVE" / "training"
    means, deviations = [], []
    for key in range(21, 27):
        pixels = np.array(Image.open(folder / "images" / f"{key}_training.tif"))
        inside = np.array(Image.open(folder / "mask" / f"{key}_training_mask.gif").convert("L")) > 0
        means.append([pixels[..., channel][inside].mean() / 255 for channel in range(3)])
        deviations.append([pixels[..., channel][inside].std() / 255 for channel in range(3)])
    mean, std = compute_mean_std.compute_mean_std(DriveDataset(drive, train=True))
    assert np.allclose(mean, np.mean(means, axis=0)) and np.allclose(std, np.mean(deviations, axis=0))

    compute_mean_std.main(compute_mean_std.get_parser().parse_args(["--data-path", str(drive)]))
    output = capsys.readouterr().out
    assert output.startswith(f"mean: {mean}\nstd: {std}\n")
    flags = output.split(": ")[-1].split()
    args = train.parse_args(flags)
    assert args.mean == pytest.approx(mean, abs=5e-4) and args.std == pytest.approx(std, abs=5e-4)


def test_constants_of_drive(real_drive):
    dataset = DriveDataset(real_drive, train=True)
    mean, std = compute_mean_std.compute_mean_std(dataset)
    if len(dataset) == 20:  # the official training folder
        assert mean == pytest.approx(DRIVE_MEAN, abs=6e-4) and std == pytest.approx(DRIVE_STD, abs=6e-4)
    assert mean == pytest.approx(DRIVE_MEAN, abs=0.03) and std == pytest.approx(DRIVE_STD, abs=0.01)
