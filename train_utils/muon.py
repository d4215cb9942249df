"""Muon: steps that change all directions of a convolution's filters alike.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

# Of the polynomial x -> a x + b x^3 + c x^5 that draws singular values from (0, 1] to about 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix [M, N] with its singular values brought to between about 0.7 and 1.2; 0 stays 0.

    By a Newton-Schulz iteration, which needs products of matrices alone. It is written for the products with the
    transpose, [M, M] where M <= N, because filters are much longer than they are many: a third of the arithmetic.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)  # of the factors of all iterations
    for _ in range(iterations):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


class Muon(AdamW):
    """Muon for the filters of convolutions, each as a matrix [out, in * height * width], and AdamW for all else.

    A filter's step is its momentum (Nesterov's), orthogonalised, and as long as a usual step of AdamW: 0.2 times the
    learning rate in each weight on average. So one learning rate serves both.

    Args:
        model: its parameters are trained. 1 x 1 convolutions count as "all else".
        lr: learning rate.
        weight_decay: of all parameters, decoupled from the gradient.
        momentum: of the filters.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> None:
        filters = [parameter for parameter in model.parameters() if is_filter(parameter)]
        others = [parameter for parameter in model.parameters() if not is_filter(parameter)]
        groups = [{"params": filters, "momentum": momentum}, {"params": others}]
        super().__init__([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change all parameters that have a gradient."""
        assert closure is None, "the loss is not computed again"
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"] if "momentum" in group else ():
                if parameter.grad is not None:
                    gradients[parameter] = parameter.grad
                    self._step_filter(parameter, group)
                    parameter.grad = None  # AdamW leaves out parameters without a gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _step_filter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, momentum = parameter.grad, group["momentum"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        buffer = state["momentum_buffer"]
        buffer.mul_(momentum).add_(gradient)
        direction = orthogonalise(gradient.add(buffer, alpha=momentum).flatten(1))
        length = 0.2 * max(direction.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * length)


def is_filter(parameter: Tensor) -> bool:
    return parameter.ndim == 4 and parameter[0, 0].numel() > 1
