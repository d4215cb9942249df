"""The flags that were left open, settled once; and what the settled flags mean."""

import argparse

import torch

from my_dataset import find_drive, find_photographs, has_test_labels
from src import ARCHITECTURES
from src.errors import DatasetError
from src.masks import photograph_size

from .checkpoint import Checkpoint
from .command_line import UsageError
from .distributed_utils import is_main_process
from .flags import AMP_DTYPES, SHARE_FOR_PHOTOGRAPHS, VAL_SPLIT_WITHOUT_TEST_LABELS


def settle(args: argparse.Namespace, device: torch.device, checkpoint: Checkpoint | None = None) -> None:
    """Settle every flag of `add_training_flags` that was left open; from here on `args` is only read.

    Args:
        args: of `init_distributed_mode` in many processes, else as parsed.
        device: to train on.
        checkpoint: that training goes on from.

    Raises:
        UsageError: a flag cannot work here.
        DatasetError: there is no data set, or nothing to validate on.
    """
    settle_amp(args, device)
    if args.channels_last is None:
        args.channels_last = _channels_last_is_faster(args, device)
    if args.compile:
        _require_compiler(device)
    if args.val_split is None:
        args.val_split = _default_val_split(args.data_path)
    if args.device_data is None:
        args.device_data = device.type == "cuda" and _photographs_fit(args, device)
    if args.device_data:
        args.workers = 0
    if args.tta is None and checkpoint is not None:
        args.tta = checkpoint.get("tta")


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


def _channels_last_is_faster(args: argparse.Namespace, device: torch.device) -> bool:
    if device.type == "cpu":
        # With AVX2 alone the forward pass gains a fifth, but the backward pass loses half and more.
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.type == "cuda" and args.amp


def _default_val_split(data_path: str) -> int:
    if has_test_labels(data_path):
        return 0
    val_split = min(VAL_SPLIT_WITHOUT_TEST_LABELS, len(find_photographs(data_path, "training")) - 1)
    if not val_split:
        raise DatasetError(
            f"--data-path {data_path}: a single training photograph, and no labels in test/1st_manual; "
            "nothing is left to validate on"
        )
    if is_main_process():
        print(
            f"{find_drive(data_path) / 'test' / '1st_manual'} holds no labels (the official download has none): "
            f"validating on the last {val_split} training photographs, which are not trained on "
            "(--val-split N chooses how many)"
        )
    return val_split


def _photographs_fit(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the photographs take at most a share of the GPU's free memory: three colours and a label each."""
    parts = ["training"] if args.val_split else ["training", "test"]
    sizes = (photograph_size(path) for part in parts for path in find_photographs(args.data_path, part))
    free = torch.cuda.mem_get_info(device)[0]
    return 4 * sum(width * height for width, height in sizes) <= SHARE_FOR_PHOTOGRAPHS * free


def _require_compiler(device: torch.device) -> None:
    # torch.compile needs Triton on a GPU and a C++ compiler on a CPU, and looks for them when it is first used.
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--compile: torch.compile does not work here ({reason}); train without it") from error


# ---- what the settled flags mean


def model_arguments(args: argparse.Namespace) -> dict[str, str | int]:
    """The arguments of `src.create_model` that the flags ask for."""
    widths = {"base_c": args.base_c} if "base_c" in ARCHITECTURES[args.arch][1] else {}
    return {"arch": args.arch, "num_classes": args.num_classes + 1} | widths


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The lower precision that the settled flags ask for; None without `args.amp`."""
    return AMP_DTYPES[args.amp_dtype] if args.amp else None


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """The memory format of the model that the settled flags ask for."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def evaluation_pixels(args: argparse.Namespace) -> int | None:
    """How many pixels to evaluate at once where the photographs live on the device; elsewhere None, for one photograph.

    Without gradients a pixel takes less than half the memory that it takes in training.
    """
    return 2 * args.batch_size * args.crop_size**2 if args.device_data else None
