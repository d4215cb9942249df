"""The flags --normalization, --mean and --std, which training and prediction share."""

import argparse

from src.colours import NORMALIZATIONS
from src.weights import Checkpoint

from .command_line import Flags, at_least
from .distributed_utils import is_main_process


def add_normalization_flags(flags: Flags, mean: list[float] | None, std: list[float] | None, origin: str) -> None:
    """Add the flags of how photographs are normalised, with these defaults; `origin` says more of them in the help."""
    add = flags.add_argument
    add(
        "--normalization",
        choices=list(NORMALIZATIONS),
        help="mean and standard deviation to normalise with. dataset: --mean and --std; photograph: those of each "
        f"photograph; local: the same, after every pixel is divided by the mean of its surroundings. {origin}",
    )
    add(
        "--mean",
        nargs=3,
        default=mean,
        type=at_least(0, float, below=256),
        help="channel means (compute_mean_std.py prints them)",
    )
    add("--std", nargs=3, default=std, type=at_least(1e-6, float, below=256), help="channel standard deviations")


def settle_normalization(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Let --mean, --std and --normalization override a checkpoint's; say where its file does not tell them."""
    given = {name: getattr(args, name) for name in ("mean", "std", "normalization") if getattr(args, name) is not None}
    checkpoint.update(given)
    if checkpoint["normalization_assumed"] and not {"mean", "std"} <= given.keys() and is_main_process():
        print(
            f"{checkpoint['path']} does not tell how photographs were normalised in training: DRIVE's mean and "
            "standard deviation are assumed (--mean, --std and --normalization give others)"
        )
