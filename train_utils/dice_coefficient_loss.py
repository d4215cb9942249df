"""Dice coefficient and Dice loss as pure functions.

Source: F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016, with plain (not squared) sums in the denominator.
Everything is masked arithmetic on whole batches, because boolean indexing would make the host wait for a GPU.
"""

import torch
from torch import Tensor


def build_target(target: Tensor, num_classes: int = 2, ignore_index: int = -100) -> Tensor:
    """One-hot encode labels; every channel of an ignored pixel becomes `ignore_index`.

    Args:
        target: class indices [N, H, W], int64.
        num_classes: channels of the result.
        ignore_index: the label of ignored pixels; none are ignored where it is negative.

    Returns:
        float32 [N, num_classes, H, W].
    """
    classes = torch.arange(num_classes, device=target.device).view(1, -1, 1, 1)
    target = target.unsqueeze(1)  # [N, 1, H, W]
    one_hot = (target == classes).float()
    if ignore_index >= 0:
        one_hot = one_hot.masked_fill(target == ignore_index, float(ignore_index))
    return one_hot


def dice_coeff(x: Tensor, target: Tensor, ignore_index: int = -100, epsilon: float = 1e-6) -> Tensor:
    """Dice coefficient of each image over its pixels that are not ignored, averaged over the images.

    Dice = (2 * sum(x * t) + eps) / (sum(x) + sum(t) + eps); an image with both sums 0 counts as 1.

    Args:
        x: probabilities or 0/1 predictions [N, ...].
        target: 0/1 truth of the same shape, `ignore_index` where ignored (as `build_target` gives it).
        ignore_index: the value of ignored pixels; none are ignored where it is negative.
        epsilon: keeps the quotient defined.

    Returns:
        a scalar.
    """
    if ignore_index >= 0:
        ignored = target == ignore_index
        x = x.masked_fill(ignored, 0)
        target = target.masked_fill(ignored, 0)
    x, target = x.flatten(1), target.flatten(1)  # [N, pixels]
    intersection = (x * target).sum(1)  # [N]
    total = x.sum(1) + target.sum(1)  # [N]
    return ((2 * intersection + epsilon) / (total + epsilon)).mean()


def multiclass_dice_coeff(x: Tensor, target: Tensor, ignore_index: int = -100, epsilon: float = 1e-6) -> Tensor:
    """Mean of `dice_coeff` over the channels of x and target [N, C, H, W]."""
    # Every channel has the same N images, so the mean over channels of means over images is one mean over N * C.
    return dice_coeff(x.flatten(0, 1), target.flatten(0, 1), ignore_index, epsilon)


def dice_loss(x: Tensor, target: Tensor, multiclass: bool = False, ignore_index: int = -100) -> Tensor:
    """1 - Dice of softmax(x, dim=1).

    Args:
        x: logits [N, C, H, W].
        target: one-hot truth [N, C, H, W] as `build_target` gives it.
        multiclass: average over the channels; else take all channels of an image as one set.
        ignore_index: the value of ignored pixels.
    """
    coefficient = multiclass_dice_coeff if multiclass else dice_coeff
    return 1 - coefficient(torch.softmax(x, dim=1), target, ignore_index=ignore_index)
