"""Muon: steps that change all directions of a convolution's filters alike.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

# Of the polynomial x -> a x + b x^3 + c x^5 that draws singular values from (0, 1] to about 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7  # added to that of each matrix


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix [M, N] with its singular values brought to between about 0.7 and 1.2; 0 stays 0.

    By a Newton-Schulz iteration, which needs products of matrices alone. It is written for the products with the
    transpose, [M, M] where M <= N, because filters are much longer than they are many: a third of the arithmetic.
    """
    wide = _wide(matrix)
    x = wide / (wide.norm() + SMALLEST_NORM)
    x = _product_of_factors(x @ x.T, iterations) @ x
    return x if wide is matrix else x.T


def orthogonalise_together(matrices: Iterable[Tensor], iterations: int = 5) -> list[Tensor]:
    """`orthogonalise` of each of several matrices; those of equally many rows M are iterated together.

    For a GPU, where the launch of a product of such matrices takes longer than the product.
    """
    matrices = list(matrices)
    by_rows = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_rows[min(matrix.shape)].append(index)
    results = dict.fromkeys(range(len(matrices)))
    for indices in by_rows.values():
        wide = [_wide(matrices[index]) for index in indices]
        gram = torch.stack([x @ x.T for x in wide])  # [filters, M, M]
        norm = gram.diagonal(dim1=1, dim2=2).sum(dim=1).sqrt().add(SMALLEST_NORM)[:, None, None]
        products = _product_of_factors(gram / norm.square(), iterations) / norm
        for index, x, product in zip(indices, wide, products, strict=True):
            results[index] = product @ x if x is matrices[index] else (product @ x).T
    return list(results.values())


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _product_of_factors(gram: Tensor, iterations: int) -> Tensor:
    """What the iterations multiply a matrix by, of its product with its transpose: [..., M, M] -> [..., M, M]."""
    a, b, c = _COEFFICIENTS
    product = None
    for _ in range(iterations):
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    return product


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
            if "momentum" not in group:
                continue
            filters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients |= {parameter: parameter.grad for parameter in filters}
            with_momentum = (self._with_momentum(parameter, group["momentum"]).flatten(1) for parameter in filters)
            on_gpu = bool(filters) and filters[0].is_cuda
            directions = orthogonalise_together(with_momentum) if on_gpu else map(orthogonalise, with_momentum)
            for parameter, direction in zip(filters, directions, strict=True):
                length = 0.2 * max(direction.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * length)
                parameter.grad = None  # AdamW leaves out parameters without a gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _with_momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum, which is brought up to date."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        buffer = state["momentum_buffer"]
        buffer.mul_(momentum).add_(parameter.grad)
        return parameter.grad.add(buffer, alpha=momentum)


def is_filter(parameter: Tensor) -> bool:
    return parameter.ndim == 4 and parameter[0, 0].numel() > 1
