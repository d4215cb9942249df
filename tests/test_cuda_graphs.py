"""The steps by graphs, on a GPU; and by an imitation of a graph on a CPU, which computes the step anew."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

import train
from my_dataset import DriveDataset
from train_utils import create_lr_scheduler, train_and_eval
from train_utils.cuda_graphs import WARM_UP, RecordedSteps, _Graph
from train_utils.data_loading import training_loader
from train_utils.training_state import MovingAverage
from transforms import get_transform

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def batch(size, device, seed):
    image = torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return image.to(device), (image[:, 0] > 0).long().to(device)


def batches(device):
    """Of two shapes, and of either more in two epochs than are needed before a step is recorded."""
    return [batch(1 if step % 3 == 2 else 2, device, seed=step) for step in range(15)]


def recorded_steps(model, device, monkeypatch):
    if device == CUDA:
        return RecordedSteps(model.parameters())

    class Recording:
        """What is computed in it changes no buffer of the model, as in the recording of a graph."""

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            self.buffers = [buffer.clone() for buffer in model.buffers()]

        def __exit__(self, *_):
            for buffer, before in zip(model.buffers(), self.buffers, strict=True):
                buffer.copy_(before)

    def replay(graph, image, target):
        def again():
            graph.loss.copy_(graph.function(graph.image, graph.target))
            for parameter, gradient in zip(graph.parameters, graph.gradients, strict=True):
                gradient.copy_(parameter.grad)
                parameter.grad = None

        graph.graph = SimpleNamespace(replay=again)
        return _replay(graph, image, target)

    _replay = _Graph.replay
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": SimpleNamespace,
        "graph": Recording,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(_Graph, "replay", replay)
    return RecordedSteps(model.parameters())


def losses_of_two_epochs(model, device, recorded, lr=0.05, scaler=None, amp_dtype=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=device == CUDA)
    data = batches(device)
    scheduler = create_lr_scheduler(optimizer, len(data), 2)
    options = {"scaler": scaler, "amp_dtype": amp_dtype, "recorded": recorded}
    return [
        train_and_eval.train_one_epoch(model, optimizer, data, device, epoch, 2, scheduler, 100, **options)[0]
        for epoch in range(2)
    ]


@pytest.mark.parametrize(
    "arch, device",
    [
        ("unet", CPU),
        *(pytest.param(arch, CUDA, marks=needs_gpu) for arch in ("unet", "unet_paper", "mobilenet_v3", "vgg16")),
    ],
)
def test_recorded_steps_are_the_steps(arch, device, monkeypatch):
    torch.manual_seed(0)
    widths = {"base_c": 4} if arch.startswith("unet") else {}
    model = train.create_model(arch=arch, num_classes=2, **widths).to(device)
    other = copy.deepcopy(model)
    # On a GPU the order of sums is not fixed, so two runs part.
    lr, rounding = (0.05, {"atol": 0, "rtol": 0}) if device == CPU else (1e-3, {"atol": 0.01, "rtol": 0.05})
    found = losses_of_two_epochs(model, device, recorded_steps(model, device, monkeypatch), lr)
    assert found == pytest.approx(losses_of_two_epochs(other, device, None, lr), rel=rounding["rtol"])
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], **rounding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recorded_steps_in_mixed_precision(dtype, monkeypatch):
    torch.manual_seed(0)
    model = train.create_model(base_c=4).to(CUDA, memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    scalers = [torch.amp.GradScaler("cuda") if dtype is torch.float16 else None for _ in range(2)]
    recorded = recorded_steps(model, CUDA, monkeypatch)
    found = losses_of_two_epochs(model, CUDA, recorded, 1e-3, scalers[0], dtype)
    assert found == pytest.approx(losses_of_two_epochs(other, CUDA, None, 1e-3, scalers[1], dtype), rel=0.02)


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=needs_gpu)])
def test_the_loss_of_each_step_is_its_own(device, monkeypatch):
    torch.manual_seed(0)
    model = train.create_model(base_c=4).to(device)

    def loss_and_gradients(image, target):
        loss = model(image)["out"].square().mean() + target.sum()
        model.zero_grad()
        loss.backward()
        return loss.detach()

    recorded = recorded_steps(model, device, monkeypatch)
    steps = [batch(2, device, seed) for seed in range(WARM_UP + 3)]
    found = [recorded(loss_and_gradients, *step) for step in steps]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    expected = [loss_and_gradients(*step).item() for step in steps]
    assert [loss.item() for loss in found] == pytest.approx(expected, rel=1e-3)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-3, rtol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_epoch_of_recorded_steps_does_not_wait(shared_drive):
    transform = get_transform(True, (0.5,) * 3, (0.2,) * 3, 80, 48)
    data = DriveDataset(shared_drive, True, transform).to(CUDA)
    model = train.create_model(base_c=4).to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    recorded, averaged, counts = RecordedSteps(model.parameters()), MovingAverage(model, 0.9), []
    for steps in (2 * WARM_UP, 1, 2 * WARM_UP):
        loader = training_loader(data, 2, 0, seed=0, drop_last=False, pin_memory=False, steps=steps)
        scheduler = create_lr_scheduler(optimizer, steps, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train_and_eval.train_one_epoch(
                model, optimizer, loader, CUDA, 0, 2, scheduler, 1, averaged=averaged, recorded=recorded
            )
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert 0 < counts[1] == counts[2]  # the end of the epoch, however many steps it has
