import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import loop_criterion, loop_dice
from train_utils import build_target, dice_coeff, dice_loss, multiclass_dice_coeff
from train_utils.scoring.counts import ConfusionMatrix, DiceCoefficient
from train_utils.train_and_eval import criterion


def random_case(classes=2, seed=0, images=3, size=(6, 5)):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, *size, generator=generator) * 2
    target = torch.randint(0, classes, (images, *size), generator=generator)
    return logits, target


def test_build_target():
    target = torch.tensor([[[0, 1], [255, 1]]])
    assert build_target(target, 2, 255).tolist() == [[[[1, 0], [255, 0]], [[0, 1], [255, 1]]]]
    plain = build_target(torch.tensor([[[2, 0]]]), num_classes=3)
    assert plain.dtype == torch.float32 and plain.tolist() == [[[[0, 1]], [[0, 0]], [[1, 0]]]]


def test_dice_coeff_by_hand():
    x = torch.tensor([[[0.5, 1.0], [0.25, 0.0]]])
    target = torch.tensor([[[1.0, 1.0], [0.0, 255.0]]])
    # ignored: 2 * 1.5 / (1.75 + 2); not ignored, 255 is a number like others.
    assert dice_coeff(x, target, ignore_index=255).item() == pytest.approx(3 / 3.75, abs=1e-6)
    assert dice_coeff(x, target).item() == pytest.approx(3 / (1.75 + 257), abs=1e-6)


def test_an_image_without_anything_counts_as_one():
    x = torch.zeros(2, 2, 2)
    x[1] = 1
    target = torch.zeros(2, 2, 2)
    assert dice_coeff(x, target).item() == pytest.approx((1 + 1e-6 / 4) / 2, abs=1e-6)
    assert dice_coeff(torch.rand(1, 2, 2), torch.full((1, 2, 2), 255.0), ignore_index=255).item() == 1


def test_multiclass_is_the_mean_over_channels():
    x = torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    target = build_target(random_case(4, images=3, size=(5, 6))[1], 4)
    channels = [loop_dice(x[:, c].flatten(1).tolist(), target[:, c].flatten(1).tolist()) for c in range(4)]
    assert multiclass_dice_coeff(x, target).item() == pytest.approx(sum(channels) / 4, abs=1e-5)


def test_dice_loss_without_multiclass_takes_all_channels_as_one_set():
    logits, target = random_case()
    one_hot = build_target(target)
    probabilities = logits.double().softmax(1).flatten(1).tolist()
    expected = 1 - loop_dice(probabilities, one_hot.flatten(1).tolist())
    assert dice_loss(logits, one_hot).item() == pytest.approx(expected, abs=1e-5)
    assert dice_loss(logits, one_hot, multiclass=True).item() != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dice", [True, False])
@pytest.mark.parametrize("classes, weight", [(2, [1.0, 2.0]), (2, None), (3, None), (3, [0.5, 1.0, 4.0])])
@pytest.mark.parametrize("ignored", ["none", "some", "one image", "all"])
@pytest.mark.parametrize("foreground", [True, False])
def test_criterion_against_loops(dice, classes, weight, ignored, foreground):
    logits, target = random_case(classes, seed=1)
    if not foreground:
        target.zero_()
    if ignored == "some":
        target[:, 1:3, ::2] = 255
    elif ignored == "one image":
        target[1] = 255
    elif ignored == "all":
        target[:] = 255
    expected = loop_criterion(logits, target, weight or [1.0] * classes, 255, dice)
    loss_weight = None if weight is None else torch.tensor(weight)
    loss = criterion({"out": logits}, target, loss_weight, classes, dice, ignore_index=255)
    assert loss.item() == pytest.approx(expected, abs=2e-6)


def test_criterion_adds_half_of_aux():
    logits, target = random_case()
    aux, _ = random_case(seed=5)
    expected = loop_criterion(logits, target, [1, 1], -100) + 0.5 * loop_criterion(aux, target, [1, 1], -100)
    assert criterion({"out": logits, "aux": aux}, target).item() == pytest.approx(expected, abs=2e-6)


def test_gradient_is_finite_where_all_is_ignored():
    logits, _ = random_case()
    logits.requires_grad_()
    loss = criterion({"out": logits}, torch.full((3, 6, 5), 255), torch.tensor([1.0, 2.0]), ignore_index=255)
    loss.backward()
    assert loss.isfinite() and not logits.grad.any()


class WaitsForTheDevice(TorchDispatchMode):
    """Fails at the operations that make the host wait for a GPU: their result's value or shape depends on data."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        boolean_index = "index.Tensor" in str(function) or "index_put" in str(function)
        if boolean_index:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{function} with a mask"
        assert not any(name in str(function) for name in self.NAMES), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def test_the_guard_notices_waiting():
    x = torch.rand(4)
    for waits in (lambda: x.sum().item(), lambda: x[x > 0.5], lambda: torch.bincount(torch.arange(3))):
        with pytest.raises(AssertionError), WaitsForTheDevice():
            waits()


def test_loss_and_metrics_never_wait_for_the_device():
    logits, target = random_case()
    target[0, :2] = 255
    logits.requires_grad_()
    weight = torch.tensor([1.0, 2.0])
    matrix, dice = ConfusionMatrix(2), DiceCoefficient(2, ignore_index=255)
    with WaitsForTheDevice():
        criterion({"out": logits}, target, weight, ignore_index=255).backward()
        for _ in range(2):
            matrix.update(target.flatten(), logits.argmax(1).flatten())
            dice.update(logits.detach(), target)
