import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src import ARCHITECTURES, create_model
from src.inference import for_inference

SMALL = {"unet": {"base_c": 4}, "unet_paper": {"base_c": 4}}


def trained(arch, **model_args):
    """A model whose BatchNorms have statistics, scales and shifts of their own, in training mode."""
    torch.manual_seed(0)
    model = create_model(arch, **model_args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.train()


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_logits_of_every_architecture(arch):
    model = trained(arch, **SMALL.get(arch, {}))
    quick = for_inference(model)
    image = torch.randn(2, 3, 70, 101)
    logits, expected = quick(image)["out"], model.eval()(image)["out"]
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert count(quick, nn.BatchNorm2d) == 0 < count(model, nn.BatchNorm2d)
    assert not quick.training and quick.model_args == model.model_args


@torch.no_grad()
def test_transposed_convolutions():
    model = trained("unet", base_c=4, bilinear=False)
    image = torch.randn(1, 3, 33, 48)
    torch.testing.assert_close(for_inference(model)(image)["out"], model.eval()(image)["out"], atol=1e-4, rtol=0)


def test_the_model_stays_as_it_is_and_goes_on_training():
    model = trained("unet", base_c=4)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():  # as evaluate calls it
        for_inference(model)(torch.randn(1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())
    model(torch.randn(2, 3, 32, 32))["out"].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_what_does_not_follow_a_convolution_or_has_no_statistics_is_left():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5, track_running_stats=False),
    ).eval()
    image = torch.randn(2, 3, 8, 8)
    quick = for_inference(model)
    assert count(quick, nn.BatchNorm2d) == 3
    torch.testing.assert_close(quick(image), model(image))


def test_models_without_parameters():
    assert isinstance(for_inference(nn.ReLU().train()), nn.ReLU)


def test_models_wrapped_for_many_processes(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = trained("unet", base_c=4)
        wrapped, image = DistributedDataParallel(model), torch.randn(1, 3, 32, 32)
        with torch.inference_mode():
            logits = for_inference(wrapped)(image)["out"]
            torch.testing.assert_close(logits, for_inference(model)(image)["out"])
        wrapped(image)["out"].sum().backward()
    finally:
        torch.distributed.destroy_process_group()


class Skip(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self[0](x)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_students_own_layers_stay():
    """A sequence or a convolution of another kind, a hook, a weight that is computed."""
    torch.manual_seed(0)
    hooked, normed = nn.Conv2d(4, 4, 3), torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    layers = Skip(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(Doubled(4, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(*layers, nn.Sequential(hooked, nn.BatchNorm2d(4)), nn.Sequential(normed, nn.BatchNorm2d(4)))
    model(torch.randn(4, 3, 20, 20))  # for the statistics
    image = torch.randn(2, 3, 20, 20)
    quick = for_inference(model)
    torch.testing.assert_close(quick(image), model.eval()(image), atol=1e-5, rtol=0)
    assert count(quick, nn.BatchNorm2d) == 4


def test_a_model_that_cannot_be_copied_is_used_itself():
    model = create_model(base_c=4).eval()
    model.last = model(torch.randn(1, 3, 32, 32))["out"]  # which torch does not copy, as it has a history
    assert for_inference(model) is model
