import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from my_dataset import DRIVE_MEAN, DRIVE_STD, DriveDataset
from src import create_model, segment
from tests.reference import loop_criterion, loop_dice
from train_utils import create_lr_scheduler, evaluate, train_one_epoch
from train_utils.synthetic_drive import write_synthetic_drive
from train_utils.train_and_eval import NonFiniteLossError, create_one_cycle_scheduler, criterion
from transforms import get_transform

CPU = torch.device("cpu")


def sgd(model=None, lr=0.01):
    return torch.optim.SGD((model or nn.Linear(1, 1)).parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)


def factors(steps, **kwargs):
    optimizer = sgd(lr=1.0)
    scheduler = create_lr_scheduler(optimizer, **kwargs)
    values = {}
    for step in range(max(steps) + 1):
        values[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    return [values[step] for step in steps]


def test_schedule_of_the_tutorial():
    expected = [0.001, 0.2008, 1, 0.99909543, 0.53830973, 0]
    assert factors([0, 1, 5, 6, 500, 1000], num_step=5, epochs=200) == pytest.approx(expected, abs=1e-8)


def test_schedule_past_the_end_is_zero_and_real():
    assert factors([1000, 1001, 1300], num_step=5, epochs=200) == [0, 0, 0]


def test_schedule_where_all_epochs_warm_up():
    assert factors([0, 3, 6, 7], num_step=3, epochs=2, warmup_epochs=2) == pytest.approx([0.001, 0.5005, 1, 0])
    assert factors([0, 5, 6], num_step=5, epochs=1) == pytest.approx([0.001, 1, 0])


def test_schedule_without_warmup():
    expected = [1, (1 - 4 / 10) ** 0.9, 0]
    assert factors([0, 4, 10], num_step=5, epochs=2, warmup=False) == pytest.approx(expected)


def test_schedule_goes_on_where_it_stopped():
    optimizer = sgd(lr=0.3)
    optimizer.param_groups[0]["initial_lr"] = 0.3
    create_lr_scheduler(optimizer, num_step=5, epochs=20, last_epoch=36)
    assert optimizer.param_groups[0]["lr"] == 0.3 * factors([37], num_step=5, epochs=20)[0]


class Constant(nn.Module):
    """Logits that do not look at the image; their scale is the one parameter."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        pattern = torch.linspace(-1, 1, x[0, 0].numel()).view(1, *x.shape[2:]).expand(len(x), -1, -1)
        return {"out": torch.stack([-pattern, pattern], 1) * self.scale + 0 * x.sum()}


def batches(count, size=(6, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        target = torch.randint(0, 2, size, generator=generator)
        target[0] = 255
        items.append((torch.rand(3, *size, generator=generator), target))
    return DataLoader(items, batch_size=1)


def train(model, loader, print_freq=10, scaler=None, lr=0.01):
    optimizer = sgd(model, lr)
    scheduler = create_lr_scheduler(optimizer, max(len(loader), 1), epochs=3)
    return train_one_epoch(model, optimizer, loader, CPU, 0, 2, scheduler, print_freq, scaler)


def test_a_loader_without_a_batch():
    with pytest.raises(ValueError, match="data_loader: gives no batch, as with fewer items than a batch"):
        train(Constant(), batches(0))


def test_mean_loss_is_over_all_steps_whatever_is_printed(capsys):
    results = {train(Constant(), batches(7), print_freq) for print_freq in (1, 3, 100)}
    assert len(results) == 1
    loss, lr = results.pop()
    assert lr == pytest.approx(0.01)  # one epoch of warm-up has passed
    first_lines = re.findall(r"loss: ([\d.]+) \(([\d.]+)\)", capsys.readouterr().out)[:7]
    each = [float(value) for _, value in first_lines]  # running means of the run with print_freq 1
    assert each[-1] == pytest.approx(loss, abs=1e-4) and each[0] != each[-1]


@pytest.mark.parametrize("classes, weight", [(2, [1, 2]), (3, [1, 1, 1])])
def test_class_weights(classes, weight):
    """Background 1 and vessel 2 where there are two classes; else none."""
    (image, target), *_ = batches(1).dataset
    logits = torch.randn(1, classes, *target.shape, generator=torch.Generator().manual_seed(0))
    model = Constant()
    model.forward = lambda x: {"out": logits + 0 * model.scale}
    optimizer = sgd(model)
    scheduler = create_lr_scheduler(optimizer, 1, epochs=3)
    loader = DataLoader([(image, target)], batch_size=1)
    loss, _ = train_one_epoch(model, optimizer, loader, CPU, 0, classes, scheduler)
    assert loss == pytest.approx(loop_criterion(logits, target[None], weight, 255), abs=2e-6)


def test_progress_line(capsys):
    train(Constant(), batches(2), print_freq=1)
    assert re.search(
        r"^Epoch: \[0\]  \[0/2\]  eta: 0:00:0\d  lr: 0\.005005  loss: [\d.]+ \([\d.]+\)  time: [\d.]+  data: [\d.]+",
        capsys.readouterr().out,
    )


def test_only_progress_lines_read_the_loss(monkeypatch):
    reads = []
    item = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or item(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(1) or item(self))
    counts = []
    for steps in (20, 40):
        reads.clear()
        train(Constant(), batches(steps), print_freq=1000)
        counts.append(len(reads))
    # The window behind the progress line holds 20 values at most: twice the steps read no more.
    assert counts[0] == counts[1] < 20


def test_batch_with_everything_ignored_trains_on():
    model = Constant()
    loader = DataLoader([(torch.rand(3, 4, 4), torch.full((4, 4), 255))], batch_size=1)
    loss, _ = train(model, loader)
    assert loss == pytest.approx(0.0, abs=1e-6) and model.scale.isfinite()


@pytest.mark.parametrize("print_freq", [1, 2, 100])
def test_non_finite_loss_stops(print_freq):
    items = list(batches(5).dataset)
    items[3] = (torch.full_like(items[3][0], math.nan), items[3][1])
    with pytest.raises(NonFiniteLossError, match=r"became nan in epoch 0, by step (3|4).*--lr"):
        train(Constant(), DataLoader(items, batch_size=1), print_freq)


def test_loss_is_taken_in_float32_under_autocast(monkeypatch):
    seen = []

    def criterion(inputs, *args, **kwargs):
        seen.append(inputs["out"].dtype)
        return inputs["out"].sum() * 0

    monkeypatch.setattr("train_utils.train_and_eval.criterion", criterion)
    model = create_model(base_c=2)
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output["out"].dtype))
    train(model, batches(2, (32, 32)), scaler=torch.amp.GradScaler("cpu"))
    assert set(outputs) == {torch.bfloat16} and set(seen) == {torch.float32}


def test_evaluate_is_the_mean_over_photographs():
    loader = batches(3, size=(17, 16))  # smaller ones are padded
    model = Constant()
    confusion_matrix, dice = evaluate(model, loader, CPU, 2)
    expected, counts = [], [[0, 0], [0, 0]]
    for image, target in loader:
        prediction = model(image)["out"].argmax(1).flatten().tolist()
        truth = target.flatten().tolist()
        expected.append(loop_dice([prediction], [truth], ignore_index=255))
        for t, p in zip(truth, prediction, strict=True):
            if t != 255:
                counts[t][p] += 1
    assert dice == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert confusion_matrix.mat.tolist() == counts
    assert not model.training


def test_a_device_may_be_named():
    model = Constant()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = create_lr_scheduler(optimizer, 2, 1, warmup=False)
    loss, _ = train_one_epoch(model, optimizer, batches(2), "cpu", 0, 2, scheduler)
    assert loss > 0 and evaluate(model, batches(1, size=(17, 16)), "cpu", 2)[1] >= 0


def test_photographs_smaller_than_the_network_needs_are_evaluated():
    confusion_matrix, dice = evaluate(create_model(base_c=4), batches(2, size=(4, 40)), CPU, 2)
    assert confusion_matrix.mat.sum() == 2 * 3 * 40 and 0 <= dice <= 1


def test_large_photographs_are_evaluated_in_tiles(monkeypatch):
    torch.manual_seed(0)
    model = create_model(base_c=4)
    loader = batches(2, size=(200, 260))
    whole = evaluate(model, loader, CPU, 2)
    monkeypatch.setattr(segment, "LARGEST_WHOLE", 200 * 260 * 4 * 43 - 1)
    monkeypatch.setattr(segment, "LARGEST_TILES", 128 * 128 * 4 * 43)
    sides = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: sides.append(max(inputs[0].shape[2:])) if isinstance(module, type(model)) else None
    )
    tiled = evaluate(model, loader, CPU, 2)
    hook.remove()
    assert len(sides) > 2 and max(sides) < 160
    assert tiled[0].mat.sum() == whole[0].mat.sum()
    assert tiled[1] == pytest.approx(whole[1], abs=0.05)


def test_overfits_one_photograph(tmp_path):
    write_synthetic_drive(tmp_path, training=1, test=1, width=96, height=96, seed=1)
    torch.manual_seed(0)
    dataset = DriveDataset(tmp_path, True, get_transform(False, DRIVE_MEAN, DRIVE_STD))
    loader = DataLoader(dataset, batch_size=1)
    model = create_model(base_c=8)
    optimizer = sgd(model, lr=0.1)
    scheduler = create_lr_scheduler(optimizer, 1, epochs=150)
    for epoch in range(150):
        train_one_epoch(model, optimizer, loader, CPU, epoch, 2, scheduler)
    # Batch statistics are those of the one photograph.
    assert evaluate(model, loader, CPU, 2)[1] > 0.95


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 800])
def test_one_cycle_against_torchs(steps):
    def run(optimizer, scheduler):
        rates = [optimizer.param_groups[0]["lr"]]
        while scheduler.last_epoch < steps - 1:
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer = sgd(lr=0.3)
    theirs = run(
        optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, cycle_momentum=False)
    )
    optimizer = sgd(lr=0.3)
    ours = run(optimizer, create_one_cycle_scheduler(optimizer, steps))
    assert len(ours) == steps and ours == pytest.approx(theirs, abs=1e-12)
    for done in range(0, steps, max(steps // 40, 1)):  # a run that is resumed after so many steps
        optimizer = sgd(lr=0.3)
        optimizer.param_groups[0]["initial_lr"] = 0.3
        assert run(optimizer, create_one_cycle_scheduler(optimizer, steps, last_epoch=done - 1)) == ours[done:]


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_one_cycle_past_its_end(steps):
    (factor,) = create_one_cycle_scheduler(sgd(), steps).lr_lambdas
    assert [factor(step) for step in (steps, 2 * steps)] == pytest.approx([4e-6, 4e-6], abs=1e-15)


def test_foreground_dice_in_the_criterion():
    logits, target = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    target[0, :2] = 255
    expected = []
    for probability, label in zip(logits.softmax(dim=1), target, strict=True):
        for number in (1, 2):
            p, t = probability[number][label != 255], (label[label != 255] == number).float()
            expected.append((2 * (p * t).sum() + 1e-6) / (p.sum() + t.sum() + 1e-6))
    loss = criterion({"out": logits}, target, num_classes=3, ignore_index=255, foreground_dice=True)
    cross_entropy = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
    assert loss.item() == pytest.approx((cross_entropy + 1 - torch.stack(expected).mean()).item(), abs=1e-5)
