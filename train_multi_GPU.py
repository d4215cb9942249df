"""Train the U-Net on DRIVE in many processes, one a GPU: under torchrun, under SLURM, or plainly in one process."""

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src import create_model
from train_utils.command_line import Parser, UsageError, add_switch, at_least, run_script, select_device
from train_utils.data_loading import evaluation_loader, training_loader
from train_utils.distributed_utils import (
    init_distributed_mode,
    is_main_process,
    leave_distributed_mode,
    on_main_process,
)
from train_utils.files import make_output_folder
from train_utils.fit import add_training_flags, changed_defaults, fit, model_arguments, open_datasets
from train_utils.scores import conclude_training, score_weights
from train_utils.speed import evaluation_pixels, memory_format, place_photographs, settle_speed


def main(args: argparse.Namespace) -> None:
    init_distributed_mode(args)
    device = select_device(args.device, index=args.gpu)
    if args.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: synchronised BatchNorm works on GPUs alone; leave it out on the CPU")
    if is_main_process():
        print(f"using {device.type} device in {args.world_size} process{'es' if args.world_size > 1 else ''}.")
    on_main_process(make_output_folder, args.output_dir, "--output-dir")
    if args.test_only:
        score_weights(args.resume, device, args)
        leave_distributed_mode()
        return
    settle_speed(args, device)
    train_data, val_data = place_photographs(open_datasets(args), device, args)
    pin_memory = device.type == "cuda" and not args.device_data
    train_loader = training_loader(
        train_data,
        args.batch_size,
        args.workers,
        args.seed,
        drop_last=True,
        pin_memory=pin_memory,
        steps=args.steps_per_epoch,
    )
    val_loader = evaluation_loader(val_data, args.workers, pin_memory=pin_memory, batch_pixels=evaluation_pixels(args))

    torch.manual_seed(args.seed)
    raw_model = create_model(**model_arguments(args)).to(device, memory_format=memory_format(args))
    require_a_step(len(train_data), args)
    best_dice = fit(wrap(raw_model, args), train_loader, val_loader, device, args)
    conclude_training(device, args)
    if is_main_process():
        print(f"best Dice {best_dice:.3f}; the weights are in {args.output_dir}")
    leave_distributed_mode()


def require_a_step(photographs: int, args: argparse.Namespace) -> None:
    share = -(-photographs // args.world_size)
    if args.steps_per_epoch is None and share < args.batch_size:
        raise UsageError(
            f"--batch-size {args.batch_size}: {photographs} training photographs over {args.world_size} processes are "
            f"{share} for each, less than a batch; use --batch-size {share} or less, or a smaller --nproc_per_node"
        )


def wrap(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model as the processes train it together; in a single process, itself."""
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[args.gpu] if args.dist_backend == "nccl" else None)
    return model


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_training_flags(parser)
    add = parser.add_argument
    add("--output-dir", default="./multi_train", help="folder of the weights")
    add("-j", "--workers", default=4, type=at_least(0), help="data loading processes, for each training process")
    add_switch(parser, "--sync-bn", "--sync_bn", default=False, help="BatchNorm statistics over all GPUs")
    add("--world-size", default=1, type=at_least(1), help="number of processes, where SLURM does not tell")
    add("--dist-url", default="env://", help="where the processes meet")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; --recipe and --arch change the defaults of others."""
    parser = get_parser()
    parser.set_defaults(**changed_defaults(parser.parse_args(argv)))
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
