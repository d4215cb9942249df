"""The process group, the ranks, and reductions over the processes.

Everything here also works in a single process without a group.
"""

import argparse
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from src.errors import UserError


class DistributedError(UserError):
    """The processes cannot be joined as asked; the message names the flag or variable."""


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def save_on_master(*args: Any, **kwargs: Any) -> None:
    """`torch.save` in the main process only."""
    if is_main_process():
        torch.save(*args, **kwargs)


def mkdir(path: str | Path) -> None:
    """Make a folder and its parents; an existing one is fine."""
    os.makedirs(path, exist_ok=True)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, on the device of this process's `value`."""
    if not is_dist_avail_and_initialized():
        return value
    # NCCL needs tensors on a GPU, but a process without work may still have its zeros on the CPU.
    total = value.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(total)
    return total.to(value.device)


def broadcast_object(value: Any) -> Any:
    """The main process's `value`, in every process."""
    box = [value]
    if is_dist_avail_and_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in the main process; every process returns its result or raises its error.

    If only the main process raised the error, the others would fail with a broken connection.
    """
    result = error = None
    if is_main_process():
        try:
            result = function(*args, **kwargs)
        except Exception as raised:
            error = raised
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def gather_objects(value: Any) -> list[Any]:
    """Every process's `value`, by rank, in every process."""
    values = [value]
    if is_dist_avail_and_initialized():
        values *= get_world_size()
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the main process's buffers to all processes: running statistics of BatchNorm differ after training."""
    if is_dist_avail_and_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _slurm_rank(args: argparse.Namespace) -> tuple[int, int, int]:
    rank, local_rank = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_LOCALID", 0))
    world_size = int(os.environ.get("SLURM_NTASKS", args.world_size))
    if world_size > 1 and args.dist_url == "env://":
        if "MASTER_ADDR" not in os.environ and int(os.environ.get("SLURM_NNODES", 1)) > 1:
            raise DistributedError(
                "MASTER_ADDR is not set; for several SLURM nodes put "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) before srun'
            )
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # Two jobs on one machine need different ports.
        os.environ.setdefault("MASTER_PORT", str(10000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        # Without srun, in the shell of an allocation, this process would wait for tasks that nobody started.
        if rank == 0:
            print(f"waiting for the {world_size} tasks that SLURM announces (start them with srun)", flush=True)
    return rank, world_size, local_rank


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """Agree on a name for this start of the processes that no earlier start had.

    torchrun restarts its processes with the same store, which still holds the addresses of the killed ones. A process
    that reads such an address waits forever. So each process asks under a new name of its own, rank 0 answers every
    question with the name of this start, and the living processes confirm it.
    """
    own_name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asked by {rank}", own_name)
        attempt = store.get(f"answer to {own_name}").decode()
        store.add(f"joined {attempt}", 1)
        return attempt
    while store.add(f"joined {own_name}", 0) < world_size - 1:
        for other in range(1, world_size):
            store.set(f"answer to {store.get(f'asked by {other}').decode()}", own_name)
        time.sleep(0.01)
    return own_name


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Join the process group that torchrun or SLURM describes in the environment, if there is one.

    Sets `args.rank`, `args.world_size`, `args.gpu` (the local rank; 0 where SLURM shows each task one GPU alone),
    `args.distributed` and `args.dist_backend`: NCCL where `args.device` is cuda and there is a GPU, else gloo.

    Raises:
        DistributedError: the environment asks for more processes than there are GPUs, or does not say where to meet;
            `args.device` names one GPU for all processes.
    """
    slurm = False
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    elif "SLURM_PROCID" in os.environ:
        rank, world_size, local_rank = _slurm_rank(args)
        slurm = True
    elif args.world_size > 1:
        raise DistributedError(
            f"--world-size {args.world_size}: started as a single process; "
            f"use torchrun --nproc_per_node={args.world_size}"
        )
    else:
        rank, world_size, local_rank = 0, 1, 0
    use_cuda = args.device.startswith("cuda") and torch.cuda.is_available()
    # torchrun with one process makes a group of one, so that NCCL can be tested on one GPU.
    args.distributed = world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    if args.distributed and args.device.startswith("cuda:"):
        raise DistributedError(f"--device {args.device}: is one GPU for all processes; use --device cuda, a GPU each")
    if use_cuda:
        gpus = torch.cuda.device_count()
        if slurm and gpus == 1:  # --gpus-per-task=1 hides the GPUs of the other tasks
            local_rank = 0
        if local_rank >= gpus:
            error = DistributedError(
                f"{'--ntasks-per-node' if slurm else '--nproc_per_node'}: local process {local_rank} has no GPU, there "
                f"are {gpus}; start as many processes as GPUs, or use --device cpu"
            )
            error.alone = local_rank == gpus  # the first one without a GPU tells it
            raise error
        if args.distributed:
            torch.cuda.set_device(local_rank)  # NCCL's
    args.rank, args.world_size, args.gpu = rank, world_size, local_rank
    args.dist_backend = "nccl" if use_cuda and dist.is_nccl_available() else "gloo"  # Windows has no NCCL
    if args.distributed:
        try:
            store, rank, world_size = next(rendezvous(args.dist_url, rank, world_size))
            attempt = dist.PrefixStore(_agree_on_attempt(store, rank, world_size), store)
            dist.init_process_group(args.dist_backend, store=attempt, world_size=world_size, rank=rank)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DistributedError(
                f"--dist-url {args.dist_url}: process {rank} of {world_size} cannot join the others ({reason}); "
                "start them with torchrun, or set MASTER_ADDR and MASTER_PORT"
            ) from error


def leave_distributed_mode() -> None:
    """Leave the process group after the work is done."""
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()


def __getattr__(name: str) -> Any:
    # The tutorial's metrics are in this module too. Here they import it, so they are looked up when they are asked for.
    if name in ("ConfusionMatrix", "DiceCoefficient", "MetricLogger", "SmoothedValue"):
        return getattr(sys.modules[__package__], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
