"""Train the U-Net on DRIVE in many processes, one per GPU: under torchrun, under SLURM, or in a single process."""

import src.threads  # noqa: F401  # before torch is imported

# isort: split

import argparse
import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src import create_model
from train_utils.command_line import Parser, UsageError, add_switch, at_least, run_script, select_device
from train_utils.data_loading import make_loaders, open_datasets
from train_utils.distributed_utils import (
    init_distributed_mode,
    is_main_process,
    leave_distributed_mode,
    on_main_process,
)
from train_utils.files import make_output_folder
from train_utils.fit import fit
from train_utils.flags import add_training_flags, parse_with_recipe
from train_utils.memory import explain_out_of_memory
from train_utils.run_folder import own_output_folder, record_run
from train_utils.scoring import check_what_is_scored, conclude_training, score
from train_utils.settings import memory_format, model_arguments, settle
from train_utils.training_state import TrainingState, load_initial, load_to_resume


def main(args: argparse.Namespace) -> None:
    init_distributed_mode(args)
    device = select_device(args.device, index=args.gpu)
    if args.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: synchronised BatchNorm works on GPUs alone; leave it out on the CPU")
    if is_main_process():
        print(f"using {device.type} device in {args.world_size} process{'es' if args.world_size > 1 else ''}.")
    on_main_process(make_output_folder, args.output_dir, "--output-dir")
    if args.test_only:
        score(device, args)
    else:
        with own_output_folder(args, overwrite=args.overwrite):
            run(device, args)
    leave_distributed_mode()


def run(device: torch.device, args: argparse.Namespace) -> None:
    checkpoint = load_to_resume(args)
    initial = load_initial(args, checkpoint)
    settle(args, device, checkpoint, initial)
    train_data, val_data = open_datasets(args, device)
    files = train_data.files, val_data.files
    check_what_is_scored(*files, args, checkpoint or initial)
    require_a_step(len(train_data), args)
    train_loader, val_loaders = make_loaders(train_data, val_data, device, args, drop_last=True)

    torch.manual_seed(args.seed)
    with explain_out_of_memory("lower --base-c, or use another --arch"):
        raw_model = create_model(**model_arguments(args)).to(device, memory_format=memory_format(args))
    model = wrap(raw_model, args)
    state = TrainingState(raw_model, device, len(train_loader), args, *files, **train_data.what_a_model_knows())
    record = functools.partial(record_run, args, device, *files, checkpoint)
    best_dice = fit(model, state, train_loader, val_loaders, checkpoint, initial, record)
    conclude_training(device, args, best_dice)


def require_a_step(photographs: int, args: argparse.Namespace) -> None:
    share = -(-photographs // args.world_size)
    if args.steps_per_epoch is None and share < args.batch_size:
        raise UsageError(
            f"--batch-size {args.batch_size}: {photographs} training photographs over {args.world_size} processes are "
            f"{share} for each, less than a batch; use --batch-size {share} or less, or a smaller --nproc_per_node"
        )


def wrap(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Wrap the model for training in several processes; in a single process, return it unchanged."""
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[args.gpu] if args.dist_backend == "nccl" else None)
    return model


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, "torchrun --nproc_per_node=4 train_multi_GPU.py --data-path FOLDER_WITH_DRIVE")
    add_training_flags(parser)
    parser.group("used most").add_argument("--output-dir", default="./multi_train", help="folder of the weights")
    parser.group("speed").add_argument(
        "-j", "--workers", default=4, type=at_least(0), help="data loading processes of each training process"
    )
    group = parser.group("many processes")
    add_switch(group, "--sync-bn", "--sync_bn", default=False, help="BatchNorm statistics over all GPUs")
    group.add_argument(
        "--world-size", default=1, type=at_least(1), help="number of processes, where SLURM does not set it"
    )
    group.add_argument("--dist-url", default="env://", help="address at which the processes connect")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parse_with_recipe(get_parser(), argv)


if __name__ == "__main__":
    run_script(main, parse_args())
