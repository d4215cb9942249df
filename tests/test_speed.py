import argparse
import shutil

import pytest
import torch

import train
from tests.conftest import SMALL_RUN
from train_utils import fit, load_checkpoint
from train_utils.command_line import UsageError, run_script
from train_utils.speed import amp_dtype, evaluation_pixels, place_photographs, settle_speed

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)  # settling a flag needs no GPU


def settled(device, *flags):
    args = train.parse_args(flags)
    settle_speed(args, device)
    return args


def run(data, *flags):
    train.main(train.parse_args(["--data-path", str(data), *SMALL_RUN, *flags]))
    return load_checkpoint("save_weights/last_model.pth")


def cpu_capability(monkeypatch, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


def assert_same_but_for_rounding(first, second):
    """Two runs went the same way: rounding grows from step to step, but hardly in the first few."""
    assert list(first["model"]) == list(second["model"])
    for name, value in second["model"].items():
        torch.testing.assert_close(first["model"][name], value, atol=5e-3, rtol=0.01)
    losses = [[row["train_loss"] for row in checkpoint["history"]] for checkpoint in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ([], None),
        (["--amp"], torch.float16),
        (["--amp", "--amp-dtype", "bfloat16"], torch.bfloat16),
        (["--amp", "--amp-dtype", "float16"], torch.float16),
    ],
)
def test_precision_on_a_gpu(flags, dtype, capsys):
    assert amp_dtype(settled(CUDA, *flags)) is dtype
    assert capsys.readouterr().out == ""


def test_precision_on_a_cpu(capsys):
    assert amp_dtype(settled(CPU)) is None
    assert capsys.readouterr().out == ""
    assert amp_dtype(settled(CPU, "--amp")) is torch.bfloat16
    assert "--amp: bfloat16 on cpu" in capsys.readouterr().out


def test_wrong_precision(shared_drive, working_directory, capsys):
    data = ["--data-path", str(shared_drive), *SMALL_RUN]
    for flags, message in (
        (["--amp", "--amp-dtype", "float16"], "--amp-dtype float16: works on GPUs alone; use --amp-dtype bfloat16"),
        (["--amp-dtype", "bfloat16"], "--amp-dtype bfloat16: does nothing without --amp"),
        (["--amp", "--amp-dtype", "half"], "--amp-dtype: invalid choice"),
    ):
        with pytest.raises(SystemExit):
            run_script(train.main, train.parse_args([*data, *flags]))
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_loss_scaling_is_for_float16_alone():
    for flags, scaled in ((["--amp"], True), (["--amp", "--amp-dtype", "bfloat16"], False), ([], False)):
        state = fit.TrainingState(train.create_model(base_c=2), CPU, 1, settled(CUDA, *flags))
        assert (state.scaler is not None) == scaled


def test_memory_format_by_device(monkeypatch):
    for capability, default in (("AVX512", True), ("AVX512_VNNI", True), ("AVX2", False), ("DEFAULT", False)):
        cpu_capability(monkeypatch, capability)
        assert settled(CPU).channels_last is default
        assert settled(CPU, "--channels-last").channels_last is True
        assert settled(CPU, "--no-channels-last").channels_last is False
    assert settled(CUDA).channels_last is False and settled(CUDA, "--amp").channels_last is True


def test_photographs_go_to_a_gpu_where_they_fit(shared_drive, monkeypatch):
    datasets = fit.open_datasets(train.parse_args(["--data-path", str(shared_drive)]))
    size = sum(dataset.nbytes for dataset in datasets)
    assert size == 10 * 80 * 72 * 4  # 6 + 4 photographs, three colours and a label
    moved = []
    monkeypatch.setattr(fit.DriveDataset, "to", lambda self, device: moved.append(device) or self)
    for device, free, flags, expected in (
        (CUDA, 4 * size, [], True),
        (CUDA, 4 * size - 4, [], False),
        (CUDA, 0, ["--device-data"], True),
        (CUDA, 4 * size, ["--no-device-data"], False),
        (CPU, 4 * size, [], False),
        (CPU, 0, ["--device-data"], True),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        args = train.parse_args(["-j", "3", *flags])
        moved.clear()
        place_photographs(datasets, device, args)
        assert args.device_data is expected
        assert moved == ([device, device] if expected else [])
        assert args.workers == (0 if expected else 3)


def test_pixels_of_an_evaluation_batch():
    sizes = {"batch_size": 4, "crop_size": 480}
    assert evaluation_pixels(argparse.Namespace(device_data=False, **sizes)) is None
    assert evaluation_pixels(argparse.Namespace(device_data=True, **sizes)) == 2 * 4 * 480 * 480


def test_the_flags_are_those_of_the_weights_in_memory(shared_drive, working_directory, monkeypatch):
    formats, original = [], fit.train_one_epoch

    def remember(model, *args, **kwargs):
        formats.append(model.in_conv[0].weight.is_contiguous(memory_format=torch.channels_last))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(fit, "train_one_epoch", remember)
    plain = run(shared_drive, "--epochs", "2", "--no-channels-last")
    changed = run(shared_drive, "--epochs", "2", "--channels-last")
    assert formats == [False, False, True, True]
    assert_same_but_for_rounding(changed, plain)


def test_what_changed_is_said(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", "1", "--device-data")
    capsys.readouterr()
    run(shared_drive, "--epochs", "2", "--resume", "auto", "--amp")
    output = capsys.readouterr().out
    assert "amp False -> True, amp_dtype None -> bfloat16, device_data True -> False" in output


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.slow
def test_compiled_training_is_training(shared_drive, working_directory):
    flags = ["--epochs", "2", "-b", "3"]  # of 6 photographs: one shape to compile
    assert_same_but_for_rounding(run(shared_drive, *flags, "--compile"), run(shared_drive, *flags))


def test_without_a_compiler(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"^--compile: torch.compile does not work here \(no compiler found\); train"):
        settled(CPU, "--compile")
