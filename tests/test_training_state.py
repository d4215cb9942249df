import pytest
import torch

import train
import train_multi_GPU
from train_utils.settings import settle
from train_utils.training_state import UNREPORTED, MovingAverage, TrainingState

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("working_directory")  # a checkpoint names its results files, which makes them


def new_state(*flags, steps_per_epoch=2):
    return TrainingState(train.create_model(base_c=2), CPU, steps_per_epoch, train.parse_args(flags))


def with_scaler(state, scale):
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return state


def as_loaded(state):
    """The checkpoint of a state one epoch on, as load_checkpoint would give it."""
    row = {"epoch": state.epoch, "dice": 0.5}
    state.finish_epoch(row)
    return state.checkpoint() | {"path": "a.pth"}


def test_scaler_of_mixed_precision_comes_back():
    checkpoint = as_loaded(with_scaler(new_state(), 512.0))
    restored = with_scaler(new_state(), 2.0)
    restored.restore(checkpoint)
    assert restored.scaler.get_scale() == 512.0


def test_mixed_precision_goes_on_from_a_checkpoint_without_scaler():
    checkpoint = as_loaded(new_state())
    assert "scaler" not in checkpoint
    restored = with_scaler(new_state(), 2.0)
    restored.restore(checkpoint)
    assert restored.scaler.get_scale() == 2.0 and restored.epoch == 1


def test_a_checkpoint_does_not_change_while_training_goes_on():
    state = new_state("--optimizer", "sgd")
    state.model(torch.rand(1, 3, 32, 32))["out"].sum().backward()
    state.optimizer.step()
    checkpoint = as_loaded(state)
    weight, momentum = (
        checkpoint["model"]["out_conv.0.weight"],
        checkpoint["optimizer"]["state"][0]["momentum_buffer"],
    )
    before = weight.clone(), momentum.clone()
    state.optimizer.step()
    state.finish_epoch({"epoch": 1, "dice": 0.6})
    assert torch.equal(weight, before[0]) and torch.equal(momentum, before[1])
    assert not torch.equal(weight, state.model.out_conv[0].weight)
    assert len(checkpoint["history"]) == 1


def test_flags_win_over_the_settings_of_the_checkpoint():
    checkpoint = as_loaded(new_state())
    restored = new_state("--lr", "0.5", "--momentum", "0.3", "--wd", "0", "--epochs", "7")
    restored.restore(checkpoint)
    (group,) = restored.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["initial_lr"]) == (0.3, 0, 0.5)
    assert group["lr"] == pytest.approx(0.5)  # the first epoch, of warm-up, is done
    assert restored.lr_scheduler.last_epoch == 2


def test_optimizer_state_of_an_older_torch():
    checkpoint = as_loaded(new_state())
    for group in checkpoint["optimizer"]["param_groups"]:
        for name in ("maximize", "foreach", "differentiable", "fused"):
            group.pop(name)
    new_state().restore(checkpoint)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_optimizer_state_takes_the_memory_format_of_the_weights(optimizer):
    """Fused kernels would otherwise read it in the wrong order."""

    def stepped(memory_format):
        state = new_state("--optimizer", optimizer)
        state.model.to(memory_format=memory_format)
        torch.manual_seed(0)
        state.model(torch.rand(1, 3, 32, 32))["out"].square().mean().backward()
        state.optimizer.step()
        return state

    checkpoint = as_loaded(stepped(torch.channels_last))
    restored = new_state("--optimizer", optimizer)
    restored.restore(checkpoint)
    assert restored.optimizer.state
    for parameter, values in restored.optimizer.state.items():
        for value in values.values():
            assert value.ndim == 0 or value.stride() == parameter.stride()
    saved = checkpoint["optimizer"]["state"]
    for index, values in enumerate(restored.optimizer.state.values()):
        assert all(torch.equal(values[name], saved[index][name]) for name in values)


def test_steps_of_adamw_are_counted_where_a_fused_kernel_looks_for_them():
    checkpoint = as_loaded(new_state("--optimizer", "adamw"))
    seen = []
    restored = new_state("--optimizer", "adamw")
    restored.optimizer.param_groups[0]["fused"] = True  # as on a GPU
    load = restored.optimizer.load_state_dict
    restored.optimizer.load_state_dict = lambda saved: (seen.append(saved), load(saved))
    restored.restore(checkpoint)
    assert [group["fused"] for group in seen[0]["param_groups"]] == [True]


def test_flips_are_remembered(shared_drive):
    checkpoint = as_loaded(new_state("--tta"))
    restored, told_otherwise = new_state(), new_state("--no-tta")
    for state in (restored, told_otherwise):
        state.args.data_path = str(shared_drive)
        settle(state.args, CPU, checkpoint)
        state.restore(checkpoint)
    assert restored.checkpoint()["tta"] is True and told_otherwise.checkpoint()["tta"] is False


def test_changes_against_a_checkpoint_that_does_not_name_them(capsys):
    checkpoint = as_loaded(new_state())
    for name in ("ema_decay", "schedule", "normalization"):
        del checkpoint["args"][name]
    new_state("--ema-decay", "0.9").restore(checkpoint)
    assert "changed since the checkpoint: ema_decay 0.0 -> 0.9;" in capsys.readouterr().out


def test_another_number_of_processes_is_reported(capsys):
    """Of a checkpoint of train.py, which names none, too."""
    one, two = new_state(), new_state()
    two.args.world_size, two.args.sync_bn = 2, True
    checkpoint = as_loaded(two)
    two.restore(as_loaded(one))
    assert "changed since the checkpoint: world_size 1 -> 2, sync_bn False -> True;" in capsys.readouterr().out
    new_state().restore(checkpoint)
    assert "changed since the checkpoint: world_size 2 -> 1, sync_bn True -> False;" in capsys.readouterr().out


def test_the_average_counts_the_steps_of_batch_normalisation():
    model = train.create_model(base_c=4)
    average = MovingAverage(model, 0.9)
    for _ in range(3):
        model(torch.rand(2, 3, 32, 32))
        average.update_parameters(model)
    counts = [value for name, value in average.module.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counts and all(count == 3 for count in counts) and average.n_averaged == 3


def test_an_unchanged_run_reports_nothing(capsys):
    new_state().restore(as_loaded(new_state()))
    assert capsys.readouterr().out == ""


def test_a_flag_that_nobody_thought_of_is_reported(capsys):
    """Every flag that changed is, unless UNREPORTED names it."""
    states = []
    for value in (1, 2):
        states.append(new_state())
        states[-1].args.flag_of_tomorrow = value
        states[-1].args.print_freq = states[-1].args.workers = 10 + value
    states[1].restore(as_loaded(states[0]))
    assert "changed since the checkpoint: flag_of_tomorrow 1 -> 2; the schedule" in capsys.readouterr().out


def test_what_goes_unreported_are_flags():
    args = vars(train.parse_args([])) | vars(train_multi_GPU.parse_args([]))
    of_the_process_group = {"gpu", "rank", "dist_backend", "distributed"}
    assert set(args) >= UNREPORTED - of_the_process_group
    numbers = {"seed", "lr", "batch_size", "epochs", "crop_size", "amp", "val_split", "world_size", "normalization"}
    assert not UNREPORTED & numbers


@pytest.fixture
def memory_is_nan():
    """What torch allocates without a value is NaN, not by chance zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def fused_step(state, overflow):
    """A step of the CPU's fused kernel, with gradients that -0.0 is one of."""
    state.optimizer.found_inf = torch.tensor(float(overflow))  # as the loss scaler tells it
    for parameter in state.model.parameters():
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter).clone()
        parameter.grad.view(-1)[0] = -0.0
    state.optimizer.step()


def bits(state):
    tensors = [*state.model.parameters(), *(values["momentum_buffer"] for values in state.optimizer.state.values())]
    return [tensor.detach().view(torch.int32).tolist() for tensor in tensors]


@pytest.mark.parametrize("start", ["afresh", "from a run without momentum"])
def test_momentum_after_an_overflow_in_the_first_step(start, monkeypatch, memory_is_nan):
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)  # the fused kernel is used as on a GPU
    states = []
    for overflows in ([True, False], [False]):
        torch.manual_seed(0)
        state = new_state("--wd", "0")
        if start != "afresh":
            earlier = new_state("--wd", "0", "--momentum", "0")
            fused_step(earlier, overflow=False)
            state.restore(as_loaded(earlier))
        for overflow in overflows:
            fused_step(state, overflow)
        states.append(state)
    assert bits(states[0]) == bits(states[1])  # the overflowed step left nothing


def test_momentum_starts_as_torch_starts_it(monkeypatch):
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)
    states = []
    for own_start in (True, False):
        torch.manual_seed(0)
        state = new_state("--wd", "0")
        if not own_start:
            state.optimizer.state.clear()
        for _ in range(2):
            fused_step(state, overflow=False)
        states.append(state)
    assert bits(states[0]) == bits(states[1])
