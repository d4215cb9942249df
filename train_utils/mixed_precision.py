"""The flags --amp and --amp-dtype, which training and prediction share, and what they mean."""

import argparse

import torch

from .command_line import Flags, UsageError, add_switch
from .distributed_utils import is_main_process

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def add_amp_flags(flags: Flags) -> None:
    """Add the flags of mixed precision, which training and prediction share."""
    add_switch(flags, "--amp", default=False, help="automatic mixed precision")
    flags.add_argument(
        "--amp-dtype",
        choices=list(AMP_DTYPES),
        help="the lower precision of --amp (default: float16 on a GPU, bfloat16 elsewhere)",
    )


def settle_amp(args: argparse.Namespace, device: torch.device) -> None:
    """Settle `args.amp_dtype` where it was left open.

    Raises:
        UsageError: the precision does not work on this device, or is given without --amp.
    """
    if args.amp_dtype and not args.amp:
        raise UsageError(f"--amp-dtype {args.amp_dtype}: does nothing without --amp; add --amp")
    if not args.amp:
        return
    if args.amp_dtype is None:
        args.amp_dtype = "float16" if device.type == "cuda" else "bfloat16"
    if device.type != "cuda":
        if args.amp_dtype == "float16":
            raise UsageError(f"--amp-dtype float16: works on GPUs alone; use --amp-dtype bfloat16 on {device.type}")
        if is_main_process():
            print(
                f"--amp: bfloat16 on {device.type}; it pays only where the processor computes in it (AVX512_BF16, AMX)"
            )


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The lower precision that the settled flags ask for; None without `args.amp`."""
    return AMP_DTYPES[args.amp_dtype] if args.amp else None
