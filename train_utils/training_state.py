"""All that a run must remember from one epoch to the next, and how it comes back from a checkpoint."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from my_dataset import DRIVE_FOV_DIAMETER

from .checkpoint import LAST_MODEL, Checkpoint, CheckpointError, load_checkpoint, load_weights
from .distributed_utils import is_main_process, on_main_process
from .logger import ResultsFiles, Row
from .recipes import RECIPES
from .speed import amp_dtype
from .train_and_eval import create_lr_scheduler, create_one_cycle_scheduler

# Flags that change the numbers of a run, but that earlier checkpoints, and the tutorial's, do not name: those runs did
# as the tutorial does.
NEWER_SETTINGS = (
    "schedule",
    "steps_per_epoch",
    "ema_decay",
    "augmentation",
    "normalization",
    "vessel_weight",
    "dice_loss",
)

# Flags that change the numbers of a run: where a resumed run has others than its checkpoint, it says so.
SETTINGS = (
    "batch_size",
    "epochs",
    "lr",
    "momentum",
    "weight_decay",
    "amp",
    "amp_dtype",
    "device_data",
    "seed",
    "base_size",
    "crop_size",
    "val_split",
    "mean",
    "std",
    "sync_bn",
    "world_size",
    *NEWER_SETTINGS,
)


class TrainingState:
    """Model, optimizer, schedule, loss scaler, the epoch to come, the best Dice so far (None: unknown), the results.

    With `args.ema_decay`, `averaged` holds the exponential moving average of the weights, which is the model that is
    evaluated and saved.

    Nothing random is in it: what an epoch draws follows from the seed and its number (see data_loading.py).
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        steps_per_epoch: int,
        args: argparse.Namespace,
        selected_on: str | None = None,
        fov_diameter: float = DRIVE_FOV_DIAMETER,
    ) -> None:
        self.model = model
        self.selected_on = selected_on  # the photographs that the best epoch is chosen on, in words
        self.fov_diameter = fov_diameter  # of the training photographs, pixels
        self.steps_per_epoch = steps_per_epoch
        self.args = args
        self.averaged = _make_average(model, args.ema_decay)
        self.optimizer = _make_optimizer(model, args)
        self.scaler = _make_scaler(args, device)
        self.epoch = args.start_epoch
        self.best_dice: float | None = -1.0  # so that the first epoch is always an improvement
        self.results = ResultsFiles()
        self.saved_in: str | None = None  # the file that holds the state before the epoch to come
        self._start_schedule()

    def _start_schedule(self) -> None:
        # The position follows from the epoch, not from a stored step: other epochs or batch sizes than before fit in.
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
        """Count the epoch of this row as done; return whether its Dice is the best so far."""
        improved = row["dice"] > self.best_dice
        self.best_dice = max(row["dice"], self.best_dice)
        self.results.rows.append(row)
        self.epoch += 1
        return improved

    def checkpoint(self) -> Checkpoint:
        """The state after the last finished epoch, as tensors and plain values, which later epochs do not change."""
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
            "fov_diameter": self.fov_diameter,
            "best_dice": self.best_dice,
            "selected_on": self.selected_on,
            "results": self.results.stem,
            "history": self.results.rows,
        }
        if self.averaged is not None:
            state["training_model"] = self.model.state_dict()
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return _copy_on_host(state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on after the epoch that a checkpoint ends with; the flags win over the settings stored in it."""
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
            self.averaged.n_averaged.fill_(1)  # so that the next step's weights do not replace the average
        self._restore_optimizer(checkpoint["optimizer"])
        if self.scaler is not None and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch = checkpoint["epoch"] + 1
        if args.tta is None:
            args.tta = checkpoint.get("tta")
        self.saved_in = checkpoint["path"]
        # A Dice on other photographs is no measure for the epochs to come.
        same_photographs = checkpoint.get("selected_on", self.selected_on) == self.selected_on
        self.best_dice = checkpoint.get("best_dice") if same_photographs else None
        self.results.resume(checkpoint.get("results"), checkpoint.get("history", []))
        self._start_schedule()
        self._report_changes(checkpoint["args"])

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        settings = {"weight_decay": self.args.weight_decay, "fused": self.optimizer.defaults["fused"]}
        if self.args.optimizer == "sgd":
            settings["momentum"] = self.args.momentum
        # `fused` before the rest is loaded: it decides on which device AdamW counts its steps.
        groups = [{**group, **settings} for group in saved["param_groups"]]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})
        # Fused kernels take the memory format of a weight for that of its state, which comes as the run before had it.
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)

    def _report_changes(self, before: dict) -> None:
        now = vars(self.args)
        before = {name: RECIPES["tutorial"][name] for name in NEWER_SETTINGS} | before
        changed = [
            f"{name} {before[name]} -> {now[name]}"
            for name in SETTINGS
            if name in before and name in now and before[name] != now[name]
        ]
        if changed and is_main_process():
            print(
                f"changed since the checkpoint: {', '.join(changed)}; the schedule is made anew from epoch {self.epoch}"
            )


def _copy_on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with what a state dict holds besides its items
        copied.update((name, _copy_on_host(item)) for name, item in value.items())
        return copied
    return [_copy_on_host(item) for item in value] if isinstance(value, list) else value


def _make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    # One kernel for all the weights, which looks for itself whether to leave out a step of mixed precision that
    # overflowed: no wait for the GPU. On a CPU it gains nothing.
    fused = next(model.parameters()).is_cuda or None
    common = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": fused}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **common)
    return torch.optim.SGD(model.parameters(), momentum=args.momentum, **common)


def _make_average(model: nn.Module, decay: float) -> AveragedModel | None:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def _make_scaler(args: argparse.Namespace, device: torch.device) -> torch.amp.GradScaler | None:
    # The gradients of float16 underflow; bfloat16 has the range of float32.
    return torch.amp.GradScaler(device.type) if amp_dtype(args) is torch.float16 else None


def load_to_resume(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint that `--resume` asks for: a file, or with `auto` the newest whole one in `--output-dir`, if any.

    The main process alone reads it: the other machines of a run may not see the file.

    Raises:
        CheckpointError: the file that is named cannot be resumed from.
    """
    if not args.resume:
        return None
    if args.resume == "auto":
        return on_main_process(_newest_checkpoint, Path(args.output_dir))
    return on_main_process(_load, Path(args.resume))


def _load(path: Path) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    for key in ("optimizer", "epoch"):
        if key not in checkpoint:
            raise CheckpointError(f"{path}: holds weights but no '{key}', so training cannot go on from it")
    print(f"resuming from {path}, after epoch {checkpoint['epoch']}")
    return checkpoint


def _newest_checkpoint(folder: Path) -> Checkpoint | None:
    newest_first = sorted(folder.glob("*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    # Every epoch ends with writing LAST_MODEL; the others matter in a folder that the tutorial wrote.
    for path in sorted(newest_first, key=lambda path: path.name != LAST_MODEL):
        try:
            return _load(path)
        except CheckpointError as error:
            print(f"passed over: {error}")
    print(f"--resume auto: nothing to resume in {folder}, starting afresh")
    return None
