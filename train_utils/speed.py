"""How a run is computed: its precision, memory format and compilation, and where its photographs live.

None of it changes what is learned by more than rounding.
"""

import argparse
from collections.abc import Sequence

import torch

from my_dataset import DriveDataset

from .command_line import UsageError, add_switch
from .distributed_utils import is_main_process

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# Of a GPU's free memory: what the photographs may take of it, so that there is room for the model.
SHARE_FOR_PHOTOGRAPHS = 0.25


def add_amp_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of mixed precision, which training and prediction share."""
    add_switch(parser, "--amp", default=False, help="automatic mixed precision")
    parser.add_argument(
        "--amp-dtype",
        choices=list(AMP_DTYPES),
        help="the lower precision of --amp (default: float16 on a GPU, bfloat16 elsewhere)",
    )


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of training that change how fast it is."""
    add_amp_flags(parser)
    add_switch(
        parser,
        "--channels-last",
        default=None,
        help="keep the channels of a pixel side by side in memory (default: on a GPU with --amp, and on a CPU with "
        "AVX-512; elsewhere the backward pass is slower so)",
    )
    add_switch(parser, "--compile", default=False, help="compile the training step by torch.compile")
    add_switch(
        parser,
        "--device-data",
        default=None,
        help="keep the photographs in the device's memory and augment them there, without loading processes (default: "
        f"on a GPU, where they take at most {SHARE_FOR_PHOTOGRAPHS:.0%} of its free memory)".replace("%", "%%"),
    )


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The lower precision that the settled flags ask for; None without `args.amp`."""
    return AMP_DTYPES[args.amp_dtype] if args.amp else None


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """The memory format of the model that the settled flags ask for."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


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


def settle_speed(args: argparse.Namespace, device: torch.device) -> None:
    """Settle the flags of `add_speed_flags` by what measured best on this kind of device; `place_photographs` the last.

    Raises:
        UsageError: one of them cannot work here.
    """
    settle_amp(args, device)
    if args.channels_last is None:
        if device.type == "cpu":
            # With AVX2 alone the forward pass gains a fifth by it, but the backward pass loses half and more.
            args.channels_last = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        else:
            args.channels_last = device.type == "cuda" and args.amp
    if args.compile:
        _require_compiler(device)


def place_photographs(
    datasets: Sequence[DriveDataset], device: torch.device, args: argparse.Namespace
) -> list[DriveDataset]:
    """Move photographs to the device's memory, if `args.device_data` or, where that was left open, their size says so.

    They need no loading processes then: `args.workers` becomes 0.

    Raises:
        UsageError: they do not fit.
    """
    if args.device_data is None:
        size = sum(dataset.nbytes for dataset in datasets)
        args.device_data = device.type == "cuda" and (
            size <= SHARE_FOR_PHOTOGRAPHS * torch.cuda.mem_get_info(device)[0]
        )
    if not args.device_data:
        return list(datasets)
    args.workers = 0
    try:
        return [dataset.to(device) for dataset in datasets]
    except torch.OutOfMemoryError as error:
        raise UsageError("--device-data: the photographs do not fit into the GPU's memory; leave it out") from error


def _require_compiler(device: torch.device) -> None:
    # torch.compile needs Triton on a GPU and a C++ compiler on a CPU, and looks for them when it is first used.
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--compile: torch.compile does not work here ({reason}); train without it") from error


def evaluation_pixels(args: argparse.Namespace) -> int | None:
    """How many pixels to evaluate at once where the photographs live on the device; elsewhere None, for one photograph.

    Without gradients a pixel takes less than half the memory that it takes in training.
    """
    return 2 * args.batch_size * args.crop_size**2 if args.device_data else None
