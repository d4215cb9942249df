"""A run's file of weights -> a small one to give away: the weights and the preparation, without the run.

python -m train_utils.publish save_weights/last_model.pth unet.pth --licence "..." --provenance "..."
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from src.weights import load_checkpoint

from .checkpoint import save_checkpoint
from .command_line import Parser, run_script
from .files import require_no_input, sha256_of

KEPT = (
    *("model", "model_args", "mean", "std", "normalization", "normalization_assumed", "fov_diameter", "trained_scale"),
    "close_ups",
    *("tta", "tta_scales", "threshold", "threshold_held_out", "trained_on", "validated_on", "selected_on"),
)


def main(args: argparse.Namespace) -> None:
    require_no_input([args.output], [args.weights], args.output)
    checkpoint = load_checkpoint(args.weights)
    kept = {name: checkpoint[name] for name in KEPT if name in checkpoint}
    save_checkpoint(kept | {"licence": args.licence, "provenance": args.provenance}, args.output)
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes, SHA-256 {sha256_of(args.output)}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Write a file of weights without the state of its training.")
    parser.add_argument("weights", help="weights that train.py wrote")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--licence", required=True, help="the terms of the weights, in words")
    parser.add_argument("--provenance", required=True, help="what they were trained on, and by which command")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
