"""Copies of tensors to a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; the CPU does not wait for the copy.

    On MPS it does: in PyTorch 2.6 to 2.10 nothing keeps the memory that such a copy reads from.
    """
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")
