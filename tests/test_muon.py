import copy

import pytest
import torch
from torch import nn

from src import UNet
from train_utils.muon import Muon, is_filter, orthogonalise, orthogonalise_together


@pytest.mark.parametrize("shape", [(8, 27), (64, 16), (1, 9)])
def test_singular_values_are_brought_to_about_one(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, len(right))
    result = orthogonalise(1e-3 * (left * values) @ right)
    found = torch.linalg.svdvals(result)
    assert result.shape == shape and found.min() > 0.5 and found.max() < 1.3
    # The directions stay: what is left beside the singular values of the same directions is rounding.
    turned = left.T @ result @ right.T
    assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 27), (64, 16)])
def test_the_products_with_the_transpose_give_the_iteration_itself(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -3, shape[1])
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    torch.testing.assert_close(orthogonalise(matrix), x.float(), atol=1e-4, rtol=0)


def test_a_gradient_of_zero_is_no_step():
    assert torch.equal(orthogonalise(torch.zeros(4, 9)), torch.zeros(4, 9))
    assert all(not result.any() for result in orthogonalise_together([torch.zeros(4, 9), torch.zeros(9, 4)]))


def test_together_as_each_alone():
    torch.manual_seed(0)
    shapes = [(32, 27), (27, 32), (8, 72), (27, 288), (8, 27), (1, 9)]
    matrices = [torch.randn(shape) * 10.0**-power for power, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, orthogonalise_together(iter(matrices)), strict=True):
        torch.testing.assert_close(found, orthogonalise(matrix), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_on_a_gpu():
    torch.manual_seed(0)
    model = UNet(3, 2, base_c=8)
    on_gpu = copy.deepcopy(model).cuda()
    optimizers = Muon(model, lr=0.01, weight_decay=0.01), Muon(on_gpu, lr=0.01, weight_decay=0.01)
    for step in range(3):
        for parameter, other in zip(model.parameters(), on_gpu.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            other.grad = parameter.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, other in zip(model.parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), parameter, atol=1e-4, rtol=0)


def stepped(model, optimizer, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.rand(2, 3, 32, 32))["out"].square().mean().backward()
        optimizer.step()
    return model


def test_a_filters_step_is_as_long_as_one_of_adamw():
    torch.manual_seed(0)
    model = UNet(3, 2, base_c=8)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepped(model, Muon(model, lr=0.01, weight_decay=0), steps=1)
    for old, new in zip(before, model.parameters(), strict=True):
        change = (new - old).square().mean().sqrt().item()
        assert 0 < change <= (0.01 * 0.2 * 1.3 if is_filter(new) else 0.0101)
    change = (model.in_conv[3].weight - before[3]).square().mean().sqrt().item()  # its gradient has full rank
    assert change == pytest.approx(0.01 * 0.2, rel=0.3)


def test_what_is_no_filter_is_trained_by_adamw():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours, expected = copy.deepcopy(layers), layers
    optimizers = Muon(ours, lr=0.01, weight_decay=0.1), torch.optim.AdamW(expected.parameters(), 0.01, weight_decay=0.1)
    for step in range(3):
        for model, optimizer in zip((ours, expected), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.rand(2, 3, 8, 8)).pow(3).mean().backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weight_decay_gradients_and_frozen_filters():
    torch.manual_seed(0)
    model = UNet(3, 2, base_c=4)
    frozen, kept = model.in_conv[0].weight.requires_grad_(False), model.in_conv[0].weight.clone()
    before = model.down4[1][0].weight.norm().item()
    optimizer = Muon(model, lr=0.01, weight_decay=50.0)
    stepped(model, optimizer)
    assert torch.equal(frozen, kept)
    assert model.down4[1][0].weight.norm() < 0.3 * before  # three times halved
    assert all((parameter.grad is None) == (parameter is frozen) for parameter in model.parameters())
