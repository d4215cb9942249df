import copy
import warnings

import pytest
import torch

import train
from my_dataset import DriveDataset
from train_utils import create_lr_scheduler, train_and_eval
from train_utils.cuda_graphs import WARM_UP, RecordedSteps
from train_utils.data_loading import training_loader
from transforms import get_transform

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def batches():
    """Of two shapes, and of either more in two epochs than are needed before a step is recorded."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1 if step % 3 == 2 else 2, 3, 64, 64, generator=generator) for step in range(15)]
    return [(image.to(CUDA), (image[:, 0] > 0).long().to(CUDA)) for image in images]


def losses_of_two_epochs(model, batches, recorded, scaler=None, amp_dtype=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    scheduler = create_lr_scheduler(optimizer, len(batches), 2)
    options = {"scaler": scaler, "amp_dtype": amp_dtype, "recorded": recorded}
    return [
        train_and_eval.train_one_epoch(model, optimizer, batches, CUDA, epoch, 2, scheduler, 100, **options)[0]
        for epoch in range(2)
    ]


@pytest.mark.parametrize("arch", ["unet", "unet_paper", "mobilenet_v3", "vgg16"])
def test_recorded_steps_are_the_steps(arch, batches):
    torch.manual_seed(0)
    widths = {"base_c": 4} if arch.startswith("unet") else {}
    model = train.create_model(arch=arch, num_classes=2, **widths).to(CUDA)
    other = copy.deepcopy(model)
    found = losses_of_two_epochs(model, batches, RecordedSteps(model.parameters()))
    assert found == pytest.approx(losses_of_two_epochs(other, batches, None), rel=0.01)
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=0.01, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recorded_steps_in_mixed_precision(dtype, batches):
    torch.manual_seed(0)
    model = train.create_model(base_c=4).to(CUDA, memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    scalers = [torch.amp.GradScaler("cuda") if dtype is torch.float16 else None for _ in range(2)]
    found = losses_of_two_epochs(model, batches, RecordedSteps(model.parameters()), scalers[0], dtype)
    assert found == pytest.approx(losses_of_two_epochs(other, batches, None, scalers[1], dtype), rel=0.02)


def test_the_loss_of_each_step_is_its_own(batches):
    torch.manual_seed(0)
    model = train.create_model(base_c=4).to(CUDA)

    def loss_and_gradients(image, target):
        loss = model(image)["out"].square().mean() + target.sum()
        model.zero_grad()
        loss.backward()
        return loss.detach()

    alike = [batch for batch in batches if len(batch[0]) == 2]
    assert len(alike) > 2 * WARM_UP
    recorded = RecordedSteps(model.parameters())
    found = [recorded(loss_and_gradients, *batch) for batch in alike]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    expected = [loss_and_gradients(*batch).item() for batch in alike]
    assert [loss.item() for loss in found] == pytest.approx(expected, rel=1e-3)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-3, rtol=0.01)


def test_an_epoch_of_recorded_steps_does_not_wait(shared_drive):
    transform = get_transform(True, (0.5,) * 3, (0.2,) * 3, 80, 48)
    data = DriveDataset(shared_drive, True, transform).to(CUDA)
    model = train.create_model(base_c=4).to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    recorded, counts = RecordedSteps(model.parameters()), []
    for steps in (2 * WARM_UP, 1, 2 * WARM_UP):
        loader = training_loader(data, 2, 0, seed=0, drop_last=False, pin_memory=False, steps=steps)
        scheduler = create_lr_scheduler(optimizer, steps, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train_and_eval.train_one_epoch(model, optimizer, loader, CUDA, 0, 2, scheduler, 1, recorded=recorded)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert 0 < counts[1] == counts[2]  # the end of the epoch, however many steps it has
