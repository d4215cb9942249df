"""The loss of a batch, an epoch of training, an evaluation, and the learning-rate schedule. No file I/O."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from my_dataset import OUTSIDE
from src.devices import to_device
from src.errors import UserError
from src.inference import for_inference
from src.segment import logits_in_tiles, logits_of_size

from .cuda_graphs import RecordedSteps
from .dice_coefficient_loss import build_target, dice_loss, multiclass_dice_coeff
from .distributed_utils import sum_over_processes
from .logger import MetricLogger, SmoothedValue
from .scoring.counts import ConfusionMatrix, DiceCoefficient, most_probable

# Steps between two checks of the loss on a GPU. Each check makes the host wait for the GPU.
STEPS_UNCHECKED = 100


class NonFiniteLossError(UserError):
    """The training loss became NaN or infinite."""


def _cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Weighted mean cross-entropy of the pixels that are not ignored; 0, not NaN, if all are ignored."""
    total = F.cross_entropy(logits, target, weight=weight, ignore_index=ignore_index, reduction="sum")
    counted = target != ignore_index
    if weight is None:
        return total / counted.sum().clamp(min=1)
    pixel_weight = weight[target.masked_fill(~counted, 0)] * counted
    return total / pixel_weight.sum().clamp(min=torch.finfo(total.dtype).tiny)


def _centre(target: Tensor, height: int, width: int) -> Tensor:
    top, left = (target.shape[-2] - height) // 2, (target.shape[-1] - width) // 2
    return target[..., top : top + height, left : left + width]


def criterion(
    inputs: Mapping[str, Tensor],
    target: Tensor,
    loss_weight: Tensor | None = None,
    num_classes: int = 2,
    dice: bool = True,
    ignore_index: int = -100,
    foreground_dice: bool = False,
) -> Tensor:
    """Cross-entropy plus Dice loss of a model's outputs, a scalar.

    Args:
        inputs: logits [N, num_classes, h, w] under "out", and under "aux" where the model has a second head.
        target: labels [N, H, W], int64. Smaller logits (of unpadded convolutions) are compared with its centre.
        loss_weight: weights [num_classes] of the classes in the cross-entropy.
        num_classes: classes, background included.
        dice: whether to add the Dice loss (over all classes).
        ignore_index: the label of pixels that do not count.
        foreground_dice: leave the background out of the Dice loss.

    Returns:
        the loss of "out", plus half the loss of "aux" where there is one.
    """

    def loss(logits: Tensor) -> Tensor:
        labels = _centre(target, *logits.shape[-2:])
        value = _cross_entropy(logits, labels, loss_weight, ignore_index)
        if dice:
            one_hot = build_target(labels, num_classes, ignore_index)
            if foreground_dice:
                foreground = logits.softmax(dim=1)[:, 1:]
                value = value + 1 - multiclass_dice_coeff(foreground, one_hot[:, 1:], ignore_index)
            else:
                value = value + dice_loss(logits, one_hot, multiclass=True, ignore_index=ignore_index)
        return value

    return loss(inputs["out"]) + 0.5 * loss(inputs["aux"]) if "aux" in inputs else loss(inputs["out"])


def _require_finite(loss: SmoothedValue, epoch: int, step: int) -> None:
    # The epoch's sum is non-finite if any step's loss was. All processes sum up, so that all of them stop.
    total = sum_over_processes(torch.tensor(float(loss.total)))
    if not math.isfinite(total.item()):
        raise NonFiniteLossError(
            f"the training loss became {total.item()} in epoch {epoch}, by step {step}; training stops. "
            "Lower --lr, and train without --amp if it was on"
        )


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader,
    device: torch.device | str,
    epoch: int,
    num_classes: int,
    lr_scheduler: LambdaLR,
    print_freq: int = 10,
    scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    *,
    vessel_weight: float = 2.0,
    foreground_dice: bool = False,
    averaged: AveragedModel | None = None,
    one_line: bool = False,
    recorded: RecordedSteps | None = None,
) -> tuple[float, float]:
    """Train on every batch once; the scheduler steps after each batch.

    Autocast is on if `scaler` or `amp_dtype` is given. The cross-entropy weights two classes by [1, `vessel_weight`],
    and more than two classes equally. `foreground_dice` is passed to `criterion`. Each step updates `averaged`.
    With `one_line` the progress takes one line of a terminal. `recorded`, the same in all epochs of a run, makes the
    steps faster on a GPU.

    Returns:
        the mean loss over all steps (and processes), the last learning rate.

    Raises:
        ValueError: there is no batch.
        NonFiniteLossError: a loss was NaN or infinite. All processes raise it together, at the next progress line (on a
            GPU: at the next of the checks every STEPS_UNCHECKED steps, or at the end).
    """
    if len(data_loader) == 0:
        raise ValueError(
            "data_loader: gives no batch, as with fewer items than a batch and drop_last; give smaller ones"
        )
    device = torch.device(device)
    model.train()
    metric_logger = MetricLogger(delimiter="  ", one_line=one_line)
    metric_logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    # Vessels are about an eighth of the pixels.
    loss_weight = torch.tensor([1.0, vessel_weight], device=device) if num_classes == 2 else None

    check_freq = print_freq if device.type == "cpu" else max(print_freq, STEPS_UNCHECKED)

    def loss_and_gradients(image: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=amp_dtype, enabled=scaler is not None or amp_dtype is not None):
            outputs = model(image)
        # In float32, because sums over hundreds of thousands of pixels overflow half precision.
        logits = {name: output.float() for name, output in outputs.items()}
        loss = criterion(
            logits, target, loss_weight, num_classes=num_classes, ignore_index=OUTSIDE, foreground_dice=foreground_dice
        )
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    for step, (image, target) in enumerate(metric_logger.log_every(data_loader, print_freq, f"Epoch: [{epoch}]")):
        image = to_device(image, device)  # [N, C, H, W]
        target = to_device(target, device)  # [N, H, W]
        loss = recorded(loss_and_gradients, image, target) if recorded else loss_and_gradients(image, target)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        lr_scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)

        lr = optimizer.param_groups[0]["lr"]
        metric_logger.update(loss=loss, lr=lr)
        if step % check_freq == 0 and (step > 0 or device.type == "cpu"):
            _require_finite(metric_logger.meters["loss"], epoch, step)
    _require_finite(metric_logger.meters["loss"], epoch, len(data_loader) - 1)
    metric_logger.synchronize_between_processes()
    return metric_logger.meters["loss"].global_avg, lr


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader: DataLoader,
    device: torch.device,
    num_classes: int,
    *,
    amp_dtype: torch.dtype | None = None,
    per_photograph: bool = False,
) -> tuple[ConfusionMatrix, float]:
    """Score a model on every photograph of the loaders of all processes.

    Autocast is on if `amp_dtype` is given.

    Returns:
        the confusion matrix over all pixels inside the field of view (of the labels: photographs that were resized for
        the model are scored in their own size), and the mean over batches of the foreground Dice of the argmax
        prediction; with `per_photograph` the mean over photographs, whatever the batches (which must not be padded
        then).
    """
    model.eval()
    fast_model = for_inference(model, amp=amp_dtype is not None)
    confusion_matrix = ConfusionMatrix(num_classes)
    dice = DiceCoefficient(num_classes, ignore_index=OUTSIDE)
    metric_logger = MetricLogger(delimiter="  ")
    for image, target in metric_logger.log_every(data_loader, 100, "Test:"):
        image, target = to_device(image, device), to_device(target, device)
        logits = logits_of_size(logits_in_tiles(fast_model, image, amp_dtype), target.shape[-2:])
        confusion_matrix.update(target.flatten(), most_probable(logits).flatten())
        dice.update(logits, target, weight=len(image) if per_photograph else 1)
    confusion_matrix.reduce_from_all_processes()
    dice.reduce_from_all_processes()
    return confusion_matrix, dice.value.item()


def create_lr_scheduler(
    optimizer: Optimizer,
    num_step: int,
    epochs: int,
    warmup: bool = True,
    warmup_epochs: int = 1,
    warmup_factor: float = 1e-3,
    last_epoch: int = -1,
) -> LambdaLR:
    """Linear warm-up, then a polynomial decay of power 0.9 to zero; it steps after every batch.

    Args:
        optimizer: its learning rates are the peak.
        num_step: steps in an epoch.
        epochs: epochs of the whole run, warm-up included.
        warmup: whether to warm up.
        warmup_epochs: length of the warm-up, epochs.
        warmup_factor: the factor of the first step.
        last_epoch: one less than the number of steps already done, as in PyTorch's schedulers.
    """
    assert num_step > 0 and epochs > 0
    warmup_steps = warmup_epochs * num_step if warmup else 0
    decay_steps = epochs * num_step - warmup_steps

    def factor(step: int) -> float:
        if warmup and step <= warmup_steps:
            alpha = step / warmup_steps if warmup_steps else 1.0
            return warmup_factor * (1 - alpha) + alpha
        # A run resumed with fewer epochs may be past the last step. A negative base would give a complex power.
        remaining = 1 - (step - warmup_steps) / decay_steps if decay_steps > 0 else 0.0
        return max(remaining, 0.0) ** 0.9

    return LambdaLR(optimizer, lr_lambda=factor, last_epoch=last_epoch)


def create_one_cycle_scheduler(optimizer: Optimizer, steps: int, last_epoch: int = -1) -> LambdaLR:
    """One cycle of the learning rate: from 1/25 of the peak up to it in 3/10 of the steps, then down to nearly zero.

    Both parts follow half a cosine. The rates are those of torch's OneCycleLR; this scheduler can start at any step.
    Source: L. N. Smith, N. Topin, "Super-convergence", 2018.

    Args:
        optimizer: its learning rates are the peak.
        steps: of the whole run.
        last_epoch: one less than the number of steps already done, as in PyTorch's schedulers.
    """
    assert steps > 0
    start, end = 1 / 25, 1e-4 / 25
    peak = 0.3 * steps - 1  # below 0 for up to three steps, which only go down

    def factor(step: int) -> float:
        if step <= peak:
            low, distance = start, 1 - step / peak
        else:
            low, distance = end, min((step - peak) / (steps - 1 - peak), 1.0)
        return low + (1 - low) * (1 + math.cos(math.pi * distance)) / 2

    return LambdaLR(optimizer, lr_lambda=factor, last_epoch=last_epoch)
