import argparse
import csv
import functools
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compute_mean_std
import predict
import train
from src.errors import DatasetError
from tests.conftest import SMALL_RUN, on_posix, refusal
from tests.test_checkpoint import save_as_the_tutorial
from train_utils import fit, load_checkpoint
from train_utils.scoring.score import score_weights
from train_utils.train_and_eval import NonFiniteLossError

PROJECT = Path(train.__file__).parent


def run(data, *flags):
    train.main(train.parse_args(["--data-path", str(data), *SMALL_RUN, *flags]))


def fails(capsys, *flags):
    return refusal(capsys, train, *SMALL_RUN, *flags)


def csv_rows():
    (table,) = Path().glob("results*.csv")
    with open(table, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def flags(*argv):
    return train.parse_args(argv)


def test_defaults_are_the_tutorials():
    args = vars(flags())
    tutorial = {
        "data_path": "./",
        "num_classes": 1,
        "device": "cuda",
        "batch_size": 4,
        "epochs": 200,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "print_freq": 1,
        "resume": "",
        "start_epoch": 0,
        "save_best": True,
        "amp": False,
    }
    ours = {"seed": 0, "base_c": 32, "crop_size": 480, "base_size": None, "output_dir": "./save_weights"}
    assert tutorial | ours == {name: args[name] for name in tutorial | ours}
    assert flags("-b", "2", "--wd", "0.1").batch_size == 2 and flags("--weight-decay", "0.1").weight_decay == 0.1


@pytest.mark.parametrize("name", ["amp", "save_best"])
def test_switches_mean_what_they_say(name):
    flag = name.replace("_", "-")
    assert getattr(flags(f"--{flag}"), name) is True
    assert getattr(flags(f"--{flag}", "True"), name) is True
    assert getattr(flags(f"--{flag}", "False"), name) is False
    assert getattr(flags(f"--no-{flag}"), name) is False


def test_a_run(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", "3")
    output = capsys.readouterr().out
    (text,) = Path().glob("results*.txt")
    blocks = text.read_text().split("\n\n")
    assert [block.splitlines()[0] for block in blocks[:-1]] == ["[epoch: 0]", "[epoch: 1]", "[epoch: 2]"]
    assert [line.split(":")[0] for line in blocks[0].splitlines()] == [
        *("[epoch", "train_loss", "lr", "dice coefficient"),
        *("global correct", "average row correct", "IoU", "mean IoU"),
    ]
    assert all(line in output for line in blocks[2].splitlines()[4:])
    rows = csv_rows()
    dice = [float(row["dice"]) for row in rows]
    assert sorted(path.name for path in Path("save_weights").glob("*.pth")) == ["best_model.pth", "last_model.pth"]
    best, last = (load_checkpoint(Path("save_weights", f"{name}_model.pth")) for name in ("best", "last"))
    assert last["epoch"] == 2 and best["epoch"] == dice.index(max(dice))
    assert last["best_dice"] == best["best_dice"] == max(dice)
    shape = {"in_channels": 3, "num_classes": 2, "base_c": 4, "bilinear": True}
    assert last["model_args"] == {"arch": "unet"} | shape
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args", "mean", "std"} <= set(last) and "scaler" not in last
    plain = torch.load("save_weights/last_model.pth", weights_only=True)
    assert type(plain["args"]) is dict and plain["args"]["epochs"] == 3
    assert float(rows[0]["lr"]) == pytest.approx(0.05)


def test_epochs_differ_in_what_they_draw(shared_drive, working_directory):
    run(shared_drive, "--epochs", "3", "--lr", "0")
    losses = [row["train_loss"] for row in csv_rows()]
    assert len(set(losses)) == 3  # with weights that stand still


def test_without_save_best_every_epoch_is_kept(shared_drive, working_directory):
    run(shared_drive, "--epochs", "2", "--save-best", "False", "--output-dir", "out")
    names = sorted(path.name for path in Path("out").glob("*.pth"))
    assert names == ["best_model.pth", "last_model.pth", "model_0.pth", "model_1.pth"]


def test_no_older_weights_than_the_best_stay(shared_drive, working_directory):
    """They would be scored by `--test-only --resume auto`, and used by predict.py."""
    run(shared_drive, "--epochs", "1", "--lr", "0")
    run(shared_drive, "--epochs", "1", "--lr", "0", "--seed", "5", "--no-save-best", "--overwrite")
    assert load_checkpoint("save_weights/best_model.pth")["args"]["seed"] == 5
    run(shared_drive, "--epochs", "1", "--seed", "6", "--overwrite", "--train-on-all")
    assert load_checkpoint("save_weights/best_model.pth")["args"]["seed"] == 6
    assert not Path("save_weights/scores.json").exists()


def test_same_seed_same_numbers_whatever_the_workers(shared_drive, tmp_path, monkeypatch):
    weights = {}
    for name, seed, workers in (("a", "3", "0"), ("b", "3", "2"), ("c", "4", "0")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run(shared_drive, "--epochs", "1", "--seed", seed, "-j", workers)
        weights[name] = load_checkpoint("save_weights/last_model.pth")["model"]
    assert all(torch.equal(weights["a"][key], weights["b"][key]) for key in weights["a"])
    assert not torch.equal(weights["a"]["out_conv.0.weight"], weights["c"]["out_conv.0.weight"])


def evaluations(monkeypatch, *dice):
    """Let the next evaluations find these Dice."""
    original, values = fit.evaluate, iter(dice)
    monkeypatch.setattr(fit, "evaluate", lambda *args, **kwargs: (original(*args, **kwargs)[0], next(values)))


def test_best_dice_survives_a_resume(shared_drive, working_directory, monkeypatch):
    evaluations(monkeypatch, 0.8, 0.6)
    run(shared_drive, "--epochs", "1")
    run(shared_drive, "--epochs", "2", "--resume", "save_weights/last_model.pth")
    assert load_checkpoint("save_weights/best_model.pth")["epoch"] == 0
    assert load_checkpoint("save_weights/last_model.pth")["best_dice"] == 0.8


def test_resume_from_the_tutorial_measures_the_best_first(shared_drive, working_directory, monkeypatch, capsys):
    model = train.create_model(base_c=4)
    namespace = argparse.Namespace(epochs=200, batch_size=4, lr=0.01, amp=True)
    path = save_as_the_tutorial("tutorial.pth", model, args=namespace)
    evaluations(monkeypatch, 0.9, 0.5)  # the file itself, then the epoch after it
    run(shared_drive, "--epochs", "9", "--resume", str(path))
    last = load_checkpoint("save_weights/last_model.pth")
    assert (last["epoch"], last["best_dice"]) == (8, 0.9)
    assert not Path("save_weights/best_model.pth").exists()
    output = capsys.readouterr().out
    assert "after epoch 7" in output and "epochs 200 -> 9, lr 0.01 -> 0.05, amp True -> False" in output
    assert "None ->" not in output  # what the file does not tell, and nobody asked for


def test_resume_with_fewer_epochs_says_that_nothing_is_left(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", "2")
    before = Path("save_weights/last_model.pth").read_bytes()
    run(shared_drive, "--epochs", "1", "--resume", "auto")
    assert "nothing left to train: 2 epochs are done" in capsys.readouterr().out
    assert Path("save_weights/last_model.pth").read_bytes() == before


def test_a_nan_loss_saves_nothing(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", "1")
    before = {path: path.read_bytes() for path in Path("save_weights").glob("*.pth")}
    capsys.readouterr()
    flags = ("--data-path", str(shared_drive), "--epochs", "5", "--lr", "1e30", "--resume", "auto")
    message = fails(capsys, *flags)
    assert "became" in message and f"--resume {Path('save_weights/last_model.pth')}" in message
    assert {path: path.read_bytes() for path in Path("save_weights").glob("*.pth")} == before


def test_what_a_run_wrote_can_be_read_however_wild_its_flags(shared_drive, working_directory):
    """The first step has a finite loss at any learning rate."""
    run(shared_drive, "--epochs", "1", "--steps-per-epoch", "1", "--lr", "1e30", "--train-on-all")
    assert load_checkpoint("save_weights/last_model.pth")["history"][0]["lr"] > 1e20


def test_out_of_memory_says_which_flags_to_lower(shared_drive, working_directory, monkeypatch, capsys):
    run(shared_drive, "--epochs", "1")

    def out_of_memory(*args, **kwargs):
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(fit, "train_one_epoch", out_of_memory)
    line = fails(capsys, "--data-path", str(shared_drive), "--epochs", "2", "--resume", "auto")
    advice = "lower --batch-size 4 or --crop-size 48, or add --amp; the last whole state is in save_weights"
    assert advice in line and f"--resume {Path('save_weights/last_model.pth')}" in line
    monkeypatch.undo()
    monkeypatch.chdir(working_directory)
    monkeypatch.setitem(score_weights.__globals__, "measure", out_of_memory)
    flags = "--data-path", str(shared_drive), "--test-only", "--resume", "save_weights/last_model.pth"
    assert "name fewer or smaller photographs by --data-path" in fails(capsys, *flags)


@on_posix
def test_a_closed_terminal(shared_drive, tmp_path):
    command = [sys.executable, str(PROJECT / "train.py"), "--data-path", str(shared_drive), *SMALL_RUN, "--epochs", "1"]
    done = subprocess.run(f"{shlex.join(command)} 1>&-", shell=True, cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b"" and (tmp_path / "save_weights" / "scores.json").exists()


def test_weights_that_do_not_tell_what_they_know(drive, working_directory, capsys):
    """The tutorial trained on all training photographs; the official download has no labels of others."""
    save_as_the_tutorial("tutorial.pth", train.create_model(base_c=4))
    said = "tutorial.pth does not tell which photographs it was trained on"
    run(drive, "--test-only", "--resume", "tutorial.pth", "--output-dir", "scores")
    assert said not in capsys.readouterr().out  # the test photographs are scored
    run(drive, "--test-only", "--resume", "tutorial.pth", "--output-dir", "scores", "--fold", "1/3")
    assert said in capsys.readouterr().out
    shutil.rmtree(drive / "DRIVE" / "test" / "1st_manual")
    run(drive, "--epochs", "9", "--resume", "tutorial.pth", "--output-dir", "on")
    assert said in capsys.readouterr().out
    run(drive, "--init-weights", "tutorial.pth", "--epochs", "1", "--output-dir", "tuned")
    assert said in capsys.readouterr().out
    run(drive, "--test-only", "--resume", "tutorial.pth", "--output-dir", "scores", "--threshold", "auto")
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [8, 9])  # with 8 there is nothing left to train
def test_weights_of_the_tutorial_that_stay_the_best(epochs, shared_drive, working_directory, monkeypatch, capsys):
    save_as_the_tutorial("tutorial.pth", train.create_model(base_c=4))
    evaluations(monkeypatch, 0.9, 0.5)  # the file itself, then the epoch after it
    run(shared_drive, "--epochs", str(epochs), "--resume", "tutorial.pth", "--output-dir", "sw2")
    output = capsys.readouterr().out
    last = "; those of the last epoch are in sw2" if epochs == 9 else ""
    assert output.endswith(f"best Dice 0.900; the best weights are still those of tutorial.pth{last}\n")
    assert not Path("sw2/best_model.pth").exists() and "scores of tutorial.pth" in output


@pytest.mark.parametrize("dice", [0.0, 0.01])
def test_a_dice_of_nothing_is_said(dice, shared_drive, working_directory, monkeypatch, capsys):
    evaluations(monkeypatch, dice)
    run(shared_drive, "--epochs", "1")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: a Dice of 0: the model finds no vessels. See that the labels") == (dice == 0)
    assert ("try another --lr than 0.05 or more --epochs than 1" in last) == (dice == 0)


def test_best_weights_in_the_folder_of_an_earlier_run(shared_drive, working_directory, monkeypatch, capsys):
    evaluations(monkeypatch, 0.999, 0.5, 0.6)
    run(shared_drive, "--epochs", "2", "--output-dir", "earlier")
    run(shared_drive, "--epochs", "3", "--output-dir", "later", "--resume", "earlier/last_model.pth")
    output = capsys.readouterr().out
    assert f"{Path('later/best_model.pth')}: not written by this run\n" in output and "scores of later" not in output
    assert output.endswith(
        f"best Dice 0.999; the best weights are of an epoch before {Path('earlier/last_model.pth')}; those of the last "
        "epoch are in later\n"
    )


def test_weights_that_overflow_in_the_last_step_are_not_saved(shared_drive, working_directory, monkeypatch):
    original = fit.train_one_epoch

    def overflow(model, *args, **kwargs):
        result = original(model, *args, **kwargs)
        model.out_conv[0].bias.data.fill_(float("inf"))
        return result

    monkeypatch.setattr(fit, "train_one_epoch", overflow)
    with pytest.raises(NonFiniteLossError, match="the weights became NaN or infinite"):
        run(shared_drive, "--epochs", "1")
    assert not list(Path("save_weights").glob("*.pth"))


def test_training_folder_alone_holds_some_out(drive, working_directory, capsys):
    for label in (drive / "DRIVE" / "test" / "1st_manual").iterdir():
        label.unlink()
    run(drive, "--epochs", "1")
    output = capsys.readouterr().out
    assert "test has no labels (the official download of DRIVE has none): validating on the last 1 training" in output
    assert load_checkpoint("save_weights/last_model.pth")["args"]["val_split"] == 1


def test_two_training_photographs_alone(drive, working_directory, capsys):
    shutil.rmtree(drive / "DRIVE" / "test")
    for number in range(23, 27):
        (drive / "DRIVE" / "training" / "images" / f"{number}_training.tif").unlink()
    run(drive, "--epochs", "1")
    assert "validating on the last 1 training photographs" in capsys.readouterr().out


def test_val_split_trains_on_the_rest(shared_drive, working_directory, monkeypatch):
    loaders = []
    monkeypatch.setattr(train, "fit", lambda model, state, *others: loaders.extend(others[:2]) or 0.5)
    run(shared_drive, "--val-split", "2")
    training, validation = loaders
    assert [path.name[:2] for path in training.dataset.dataset.img_list] == ["21", "22", "23", "24"]
    assert [path.name[:2] for path in validation["DRIVE"].dataset.img_list] == ["25", "26"]


def test_amp_on_a_cpu_is_bfloat16_and_says_so(shared_drive, working_directory, monkeypatch, capsys):
    dtypes, original = [], fit.train_one_epoch

    def remember(model, *args, **kwargs):
        model.register_forward_hook(lambda module, inputs, output: dtypes.append(output["out"].dtype))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(fit, "train_one_epoch", remember)
    run(shared_drive, "--epochs", "1", "--amp")
    assert dtypes[0] == torch.bfloat16
    assert "--amp: bfloat16 on cpu; it pays only where" in capsys.readouterr().out
    checkpoint = load_checkpoint("save_weights/last_model.pth")
    assert checkpoint["args"]["amp_dtype"] == "bfloat16" and "scaler" not in checkpoint


def test_test_only(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", "1")
    text = next(Path().glob("results*.txt")).read_text()
    capsys.readouterr()
    run(shared_drive, "--test-only", "--resume", "save_weights/last_model.pth")
    output = capsys.readouterr().out
    assert all(line in output for line in text.splitlines()[3:8])


def test_wrong_data(drive, working_directory, capsys):
    assert "--data-path nowhere: no DRIVE data set" in fails(capsys, "--data-path", "nowhere")
    (drive / "DRIVE" / "training" / "1st_manual" / "24_manual1.gif").unlink()
    assert "24_manual1.gif is missing" in fails(capsys, "--data-path", str(drive))


@pytest.mark.parametrize(
    "wrong, named",
    [
        (["-b", "0"], "--batch-size: must be a whole number of at least 1, found '0'"),
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1, found '0'"),
        (["--epochs", "two"], "--epochs: must be a whole number of at least 1, found 'two'"),
        (["--lr", "nan"], "--lr: must be a number of at least 0, found 'nan'"),
        (["--amp", "perhaps"], "--amp: must be True or False, found 'perhaps'"),
        (["--print-freq", "0"], "--print-freq: must be"),
        (["--std", "0", "1", "1"], "--std: must be a number of at least 1e-06, found '0'"),
        (["--seed", "99999999999999999999"], "--seed: must be a whole number of at least 0 and below"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_flags(capsys, wrong, named):
    with pytest.raises(SystemExit) as stopped:
        flags(*wrong)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_wrong_files(shared_drive, working_directory, capsys):
    data = ("--data-path", str(shared_drive))
    assert "--device toaster: no such device" in fails(capsys, *data, "--device", "toaster")
    assert "gone.pth: no such file of weights" in fails(capsys, *data, "--resume", "gone.pth")
    Path("folder").mkdir()
    best = Path("folder/best_model.pth")
    best.touch()
    assert f"folder: is no file (a folder, a FIFO or a device); give {best}" in fails(
        capsys, *data, "--resume", "folder"
    )
    Path("text.pth").write_text("no weights")
    assert "text.pth: not a file of weights" in fails(capsys, *data, "--resume", "text.pth")
    torch.save(train.create_model(base_c=4).state_dict(), "bare.pth")
    assert "bare.pth: holds weights but no 'optimizer'" in fails(capsys, *data, "--resume", "bare.pth")
    save_as_the_tutorial("wide.pth", train.create_model(base_c=8))
    assert "--base-c" in fails(capsys, *data, "--resume", "wide.pth")
    assert f"--output-dir {Path('text.pth/out')}: cannot be written" in fails(
        capsys, *data, "--output-dir", "text.pth/out"
    )
    assert "--start-epoch 5: leaves nothing" in fails(capsys, *data, "--start-epoch", "5", "--epochs", "2")
    assert "--test-only" in fails(capsys, *data, "--test-only")
    assert not list(Path().glob("results*"))


def test_demo_changes_defaults_but_not_flags():
    assert flags("--demo").data_path == "./demo" and flags("--demo").base_c < 32
    assert flags("--demo", "--base-c", "5", "--epochs", "200").base_c == 5
    assert flags("--demo", "--base-c", "5", "--epochs", "200").epochs == 200


def test_demo_data_are_written_once(working_directory, monkeypatch):
    calls = []

    def write(root, **count):
        Path(root, "DRIVE", "training", "images").mkdir(parents=True)
        calls.append(root)

    monkeypatch.setattr(train, "write_synthetic_drive", write)
    for root in ("demo", "demo", "demo/DRIVE"):
        train.make_demo_data(root)
    assert calls == ["demo"]
    Path("other/DRIVE").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no DRIVE data set"):
        train.make_demo_data("other")


def test_the_demo_says_what_to_try_next(shared_drive, working_directory, capsys):
    own = Path("my data")
    for kind in ("images", "labels"):
        (own / kind).mkdir(parents=True)
    for path in sorted((shared_drive / "DRIVE" / "training" / "images").iterdir()):
        shutil.copy(path, own / "images")
        shutil.copy(shared_drive / "DRIVE" / "training" / "1st_manual" / f"{path.name[:2]}_manual1.gif", own / "labels")
    few = ["--demo", "--epochs", "1", "--steps-per-epoch", "1", "--output-dir", "out put"]
    run(own, *few, "--no-save-best")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("now try: "))
    predict.main(predict.parse_args([*command[2:], "--device", "cpu"]))
    run(own, *few, "--train-on-all", "--overwrite")
    assert "now try" not in capsys.readouterr().out


@on_posix
def test_ctrl_c_says_where_the_last_state_lies(shared_drive, working_directory):
    command = [sys.executable, PROJECT / "train.py", "--data-path", shared_drive, *SMALL_RUN, "--epochs", "10000"]
    # Where the tests run in the background of a shell, they and their children ignore SIGINT.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=heed, **pipes)
    for line in process.stdout:
        if line.startswith("Epoch: [2]"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = output.splitlines()[-1]
    assert last.startswith("interrupted in epoch ") and last.endswith("--resume save_weights/last_model.pth")
    assert "Traceback" not in errors
    assert load_checkpoint("save_weights/last_model.pth")["epoch"] >= 1


def test_flags_with_underscores(capsys):
    for flags in (["--data_path", "."], ["--data_path=."]):
        with pytest.raises(SystemExit):
            train.parse_args(flags)
        assert "unrecognized arguments: --data_path" in (error := capsys.readouterr().err)
        assert "; write --data-path (see --help)" in error


def test_an_empty_argument_is_reported_in_one_line(capsys):
    """As a shell passes an unset variable in quotes."""
    with pytest.raises(SystemExit):
        train.parse_args([""])
    assert "error: unrecognized arguments: ; a value follows" in capsys.readouterr().err


def test_what_a_parser_has_not_is_not_advised(capsys):
    with pytest.raises(SystemExit):
        compute_mean_std.get_parser().parse_args(["folder"])
    assert "as --data-path FOLDER (see" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse_args(["--sync-bn"])
    assert "error: unrecognized arguments: --sync-bn (see" in capsys.readouterr().err
    assert "--no-NAME" not in compute_mean_std.get_parser().format_help()
    assert "--no-NAME" in train.get_parser().format_help()


def test_a_file_of_any_name_brings_no_advice_on_dashes(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--init-weights", "as_expected.pth"])
    assert "as_expected.pth: no such file" in (error := capsys.readouterr().err) and "dash" not in error
