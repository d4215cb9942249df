"""The state of a run between epochs, and its restoration from a checkpoint."""

import argparse
import copy
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from src.dataset_files import LabelledPhotograph, describe
from src.segment import ONE_SIZE
from src.weights import Checkpoint, CheckpointError, load_checkpoint, load_weights

from .checkpoint import LAST_MODEL, warn_of_unknown_training
from .distributed_utils import is_main_process, on_main_process
from .flags import default_flags
from .mixed_precision import amp_dtype
from .muon import Muon, is_filter
from .results import ResultsFiles, Row
from .train_and_eval import create_lr_scheduler, create_one_cycle_scheduler

# Flags that may differ from those of the checkpoint without a report: they change no number of a run, or are checked
# elsewhere. A resumed run reports every other flag that changed.
UNREPORTED = frozenset(
    (
        # where things are, and what is printed or written
        *("data_path", "masks", "output_dir", "device", "gpu", "rank", "dist_url", "dist_backend", "distributed"),
        *(
            "print_freq",
            "progress_lines",
            "tensorboard",
            "save_best",
            "test_only",
            "demo",
            "resume",
            "init_weights",
            "start_epoch",
        ),
        "overwrite",
        # speed
        *("workers", "channels_last", "compile", "cuda_graphs"),
        # scoring after training
        *("threshold", "tta", "tta_scales"),
        # defaults of other flags; another model or optimizer is refused
        *("recipe", "arch", "base_c", "num_classes", "backbone_weights", "optimizer"),
    )
)


class TrainingState:
    """Model, optimizer, schedule, loss scaler, the epoch to come, the best Dice so far (None: unknown), the results.

    With `args.ema_decay`, `averaged` holds the exponential moving average of the weights. That model is then evaluated
    and saved. The state holds no random generator: an epoch's random numbers follow from the seed and its number (see
    data_loading.py).
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        steps_per_epoch: int,
        args: argparse.Namespace,
        trained_on: Sequence[LabelledPhotograph] = (),
        validated_on: Sequence[LabelledPhotograph] = (),
        trained_scale: float = 1.0,
        close_ups: bool = False,
    ) -> None:
        self.model = model
        self.device = device
        self.selected_on = describe(validated_on)  # the photographs that the best epoch is chosen on, in words
        self.trained_on = [item.digest for item in trained_on]
        self.trained_labels = [item.label_digest for item in trained_on]
        self.validated_on = [item.digest for item in validated_on]
        self.validated_labels = [item.label_digest for item in validated_on]
        self._held_out = validated_on
        self.trained_scale = trained_scale  # that the training photographs were resized by, in the median
        self.close_ups = close_ups  # whether most of them show no border of the field of view
        self.steps_per_epoch = steps_per_epoch
        self.args = args
        self.averaged = MovingAverage(model, args.ema_decay) if args.ema_decay else None
        self.optimizer = _make_optimizer(model, args)
        _start_momentum(self.optimizer)
        self.scaler = _make_scaler(args, device)
        self.epoch = args.start_epoch
        self.best_dice: float | None = -1.0  # the first epoch is always an improvement
        self.compared_from = 0  # the first epoch whose Dice is on these photographs to validate on
        self.other_photographs = False  # whether a checkpoint's Dice is on others
        self.results = ResultsFiles()
        self.saved_in: str | None = None  # the file that holds the state before the epoch to come
        self._start_schedule()

    def _start_schedule(self) -> None:
        # The position follows from the epoch, not from a stored step, so --epochs and --batch-size may change.
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.args.lr
        last_step = self.epoch * self.steps_per_epoch - 1
        if self.args.schedule == "poly":
            self.lr_scheduler = create_lr_scheduler(
                self.optimizer, self.steps_per_epoch, self.args.epochs, last_epoch=last_step
            )
        else:
            self.lr_scheduler = create_one_cycle_scheduler(
                self.optimizer, self.steps_per_epoch * self.args.epochs, last_epoch=last_step
            )

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and saved for use."""
        return self.model if self.averaged is None else self.averaged.module

    def finish_epoch(self, row: Row) -> bool:
        """Count the epoch of this row as done; return whether it is the best so far: without a Dice, the newest is."""
        improved = True
        if "dice" in row:
            improved = row["dice"] > self.best_dice
            self.best_dice = max(row["dice"], self.best_dice)
        self.results.rows.append(row)
        self.epoch += 1
        return improved

    def checkpoint(self) -> Checkpoint:
        """The state after the last finished epoch, as a copy that later epochs do not change."""
        state = {
            "model": self.evaluated_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "epoch": self.epoch - 1,
            "args": vars(self.args),
            "model_args": self.model.model_args,
            "mean": list(self.args.mean),
            "std": list(self.args.std),
            "normalization": self.args.normalization,
            "tta": bool(self.args.tta),
            "tta_scales": list(self.args.tta_scales or ONE_SIZE),
            "fov_diameter": self.args.fov_diameter,
            "trained_scale": self.trained_scale,
            "close_ups": self.close_ups,
            "best_dice": self.best_dice,
            "selected_on": self.selected_on,
            "trained_on": self.trained_on,
            "trained_labels": self.trained_labels,
            "validated_on": self.validated_on,
            "validated_labels": self.validated_labels,
            "compared_from": self.compared_from,
            "results": self.results.stem,
            "history": self.results.rows,
        }
        if self.averaged is not None:
            state["training_model"] = self.model.state_dict()
            state["averaged_steps"] = int(self.averaged.n_averaged)
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return _copy_on_host(state)

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Begin a new run with the weights of a checkpoint, which count as trained on its photographs.

        Raises:
            CheckpointError: they are of another model, or were trained on photographs to validate on.
        """
        load_weights(self.model, checkpoint)
        if self.averaged is not None:
            load_weights(self.averaged.module, checkpoint)
            self.averaged.n_averaged.fill_(_whole_average(self.args.ema_decay))
        self._count_as_trained_on(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue after the last epoch of a checkpoint; the flags take precedence over its settings."""
        args = self.args
        optimizer = checkpoint["args"].get("optimizer", "sgd")
        if optimizer != args.optimizer:
            raise CheckpointError(
                f"{checkpoint['path']}: of a run with --optimizer {optimizer}, not {args.optimizer}; "
                "give the --optimizer or the --recipe of that run"
            )
        load_weights(self.model, checkpoint | {"model": checkpoint.get("training_model", checkpoint["model"])})
        if self.averaged is not None:
            load_weights(self.averaged.module, checkpoint)
            steps = checkpoint.get("averaged_steps", _whole_average(args.ema_decay))
            self.averaged.n_averaged.fill_(steps)
        self._restore_optimizer(checkpoint)
        if self.scaler is not None and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"] + 1
        self.saved_in = checkpoint["path"]
        self._take_over_photographs(checkpoint)
        # Several runs may go on from one file, each in a folder of its own; the files of results would be the same.
        same_folder = os.path.realpath(Path(checkpoint["path"]).parent) == os.path.realpath(args.output_dir)
        self.results.resume(checkpoint.get("results") if same_folder else None, checkpoint.get("history", []))
        self._start_schedule()
        self._report_changed_flags(checkpoint["args"])

    def _count_as_trained_on(self, checkpoint: Checkpoint) -> None:
        if any(item.part == "training" for item in self._held_out):
            warn_of_unknown_training(checkpoint)
        before = checkpoint.get("trained_on", [])
        if mixed := set(before) & set(self.validated_on):
            raise CheckpointError(
                f"{checkpoint['path']}: was trained on {len(mixed)} of the {len(self.validated_on)} photographs to "
                "validate on, whose Dice would be too high; validate on others (as the run of these weights did, by "
                "its --data-path, --fold and --val-split; earlier versions parted the two eyes of a person), or give "
                "--train-on-all, which validates nothing"
            )
        self.trained_on += [digest for digest in before if digest not in self.trained_on]

    def _take_over_photographs(self, checkpoint: Checkpoint) -> None:
        new_photographs = len(set(self.trained_on) - set(checkpoint.get("trained_on", self.trained_on)))
        other_labels = sorted(checkpoint.get("trained_labels", self.trained_labels)) != sorted(self.trained_labels)
        self._count_as_trained_on(checkpoint)
        # A Dice on other photographs or labels cannot be compared with those of the next epochs.
        self.other_photographs = (
            sorted(checkpoint["validated_on"]) != sorted(self.validated_on)
            if "validated_on" in checkpoint
            else checkpoint.get("selected_on", self.selected_on) != self.selected_on
        ) or sorted(checkpoint.get("validated_labels", self.validated_labels)) != sorted(self.validated_labels)
        self.compared_from = self.epoch if self.other_photographs else checkpoint.get("compared_from", 0)
        self.best_dice = None if self.other_photographs else checkpoint.get("best_dice")
        if not is_main_process():
            return
        if new_photographs:
            print(f"changed since the checkpoint: {new_photographs} of the training photographs are new")
        elif other_labels:
            print("changed since the checkpoint: labels of the training, or photographs were taken out of it")
        if self.other_photographs and self.epoch < self.args.epochs:
            print(
                "changed since the checkpoint: the photographs that are held out, or their labels; the best epoch is "
                f"chosen anew, from epoch {self.epoch - 1} on"
            )

    def _restore_optimizer(self, checkpoint: Checkpoint) -> None:
        # The settings follow from the flags. `fused` must be right before loading: it decides on which device AdamW
        # counts its steps.
        own, saved = self.optimizer.state_dict(), checkpoint["optimizer"]
        parameters = dict(enumerate(itertools.chain(*(group["params"] for group in self.optimizer.param_groups))))
        if not all(
            index in parameters and _is_kept_by(self.args.optimizer, values, parameters[index])
            for index, values in saved["state"].items()
        ):
            raise CheckpointError(
                f"{checkpoint['path']}: 'optimizer' does not hold the state of --optimizer {self.args.optimizer} for "
                "this model; resume from another file"
            )
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})
        _start_momentum(self.optimizer)
        # Fused kernels need the state in the memory format of its weight, but it was saved in that of the earlier run.
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)

    def _report_changed_flags(self, before: dict[str, Any]) -> None:
        # Flags that the file does not name had their defaults: the run is older than the flag, or the tutorial's.
        # (Its working diameter was not recorded, but follows from the same photographs.)
        # One whose default is open was settled in a way that is not known.
        defaults = {name: value for name, value in default_flags().items() if value is not None}
        of_one_process = {"world_size": 1, "sync_bn": False}  # of train_multi_GPU.py alone
        before = defaults | of_one_process | {"fov_diameter": self.args.fov_diameter} | before
        changed = [
            f"{name} {before[name]} -> {value}"
            for name, value in (of_one_process | vars(self.args)).items()
            if name not in UNREPORTED and name in before and before[name] != value
        ]
        if changed and is_main_process():
            print(
                f"changed since the checkpoint: {', '.join(changed)}; the schedule is made anew from epoch {self.epoch}"
            )


def _copy_on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the attributes of a state dict
        copied.update((name, _copy_on_host(item)) for name, item in value.items())
        return copied
    return [_copy_on_host(item) for item in value] if isinstance(value, list) else value


def _make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    # A fused kernel skips an overflowed step of mixed precision by itself, so the host does not wait for the GPU. On a
    # CPU it is not faster.
    fused = next(model.parameters()).is_cuda or None
    if args.optimizer == "muon":
        return Muon(model, args.lr, args.weight_decay)
    common = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": fused}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **common)
    return torch.optim.SGD(model.parameters(), momentum=args.momentum, **common)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters of a fused SGD the momentum that they do not have yet: zero.

    Torch allocates it without a value in the first step. If that step overflows, the kernel writes nothing, and the
    second step would read what happened to be in memory. (-0.0 + x is x, of x = -0.0 too.)
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, -0.0)


def _is_kept_by(optimizer: str, values: Any, parameter: nn.Parameter) -> bool:
    """Whether these are what an optimizer keeps of a parameter: finite tensors of the right shapes."""
    shapes = {"momentum_buffer": parameter.shape}
    if optimizer == "muon" and is_filter(parameter):
        shapes["step"] = ()
    elif optimizer in ("adamw", "muon"):
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    elif values == {"momentum_buffer": None}:  # --momentum 0
        return True
    if not isinstance(values, Mapping) or values.keys() != shapes.keys():
        return False
    return all(
        isinstance(value, Tensor)
        and value.shape == shapes[name]
        and bool(value.isfinite().all())
        and not (name in ("step", "exp_avg_sq") and (value < 0).any())
        for name, value in values.items()
    )


class MovingAverage(AveragedModel):
    """The moving average of a model's weights; until it is as long as `decay` makes it, step n counts n times.

    torch's own copies its counter to the device twice in each step, and the host waits for a GPU meanwhile.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)  # which is on the host
        averages, values = (itertools.chain(of.parameters(), of.buffers()) for of in (self.module, model))
        pairs = list(zip(averages, values, strict=True))
        numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*numbers, strict=True)), 1 - min(self.decay, steps / (steps + 2)))
        for average, value in pairs:
            if not average.is_floating_point():  # the steps that BatchNorm counts
                average.copy_(value)
        self.n_averaged += 1


def _whole_average(decay: float) -> int:
    """After how many steps a moving average has its full length."""
    return math.ceil(2 * decay / (1 - decay))


def _make_scaler(args: argparse.Namespace, device: torch.device) -> torch.amp.GradScaler | None:
    # The gradients of float16 underflow; bfloat16 has the range of float32.
    return torch.amp.GradScaler(device.type) if amp_dtype(args) is torch.float16 else None


def load_to_resume(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint that `--resume` names; with `auto`, the newest undamaged one in `--output-dir`, if any.

    Only the main process reads it, because the other machines of a run may not have the file.

    Raises:
        CheckpointError: training cannot continue from the named file.
    """
    if not args.resume:
        return None
    if args.resume == "auto":
        return on_main_process(_newest_checkpoint, Path(args.output_dir), args.overwrite)
    return on_main_process(_load, Path(args.resume))


def load_initial(args: argparse.Namespace, checkpoint: Checkpoint | None = None) -> Checkpoint | None:
    """The checkpoint of `--init-weights`, unless training goes on from another one.

    The main process reads it for all (each has read the file's flags before, `train_utils.flags.parse_with_recipe`).

    Raises:
        CheckpointError: it cannot be used.
    """
    return on_main_process(load_checkpoint, args.init_weights) if args.init_weights and checkpoint is None else None


def _load(path: Path) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    for key in ("optimizer", "epoch"):
        if key not in checkpoint:
            raise CheckpointError(
                f"{path}: holds weights but no '{key}', so its run cannot go on; --init-weights starts a new one"
            )
    print(f"resuming from {path}, after epoch {checkpoint['epoch']}")
    return checkpoint


def _newest_checkpoint(folder: Path, overwrite: bool) -> Checkpoint | None:
    files = [path for path in folder.glob("*.pth") if path.exists()]  # not a dead link
    newest_first = sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    # Every writing here ends with LAST_MODEL. The other names matter in a folder that the tutorial wrote.
    for path in sorted(newest_first, key=lambda path: path.name != LAST_MODEL):
        try:
            return _load(path)
        except CheckpointError as error:
            print(f"passed over: {error}")
    if newest_first and not overwrite:
        raise CheckpointError(
            f"--resume auto: {folder} holds weights, but none that a run can go on from; choose another --output-dir, "
            "or let --overwrite replace them"
        )
    print(f"--resume auto: nothing to resume in {folder}, starting afresh")
    return None
