import argparse
import os
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

import train
import train_multi_GPU
from my_dataset import DriveDataset
from tests.conftest import SMALL_RUN
from tests.processes import PROJECT, in_processes, torchrun
from train_utils import distributed_utils, fit, load_checkpoint, save_checkpoint, settings
from train_utils.command_line import UsageError, run_script, select_device
from train_utils.data_loading import evaluation_loader, open_datasets
from train_utils.distributed_utils import DistributedError, init_distributed_mode
from train_utils.files import OutputError
from train_utils.scoring.score import score_weights
from train_utils.settings import settle
from train_utils.training_state import TrainingState

SCRIPT = PROJECT / "train_multi_GPU.py"
SMALL = [*SMALL_RUN, "-j", "0"]


def parse(data, *flags):
    return train_multi_GPU.parse_args(["--data-path", str(data), *SMALL, *flags])


def assert_same_state(first, second):
    """Two checkpoints hold bit-identical weights, optimizer state, best Dice and results (but for the seconds)."""
    for weights in {"model", "training_model"} & (first.keys() | second.keys()):
        for key in first[weights]:
            assert torch.equal(first[weights][key], second[weights][key]), (weights, key)
    states = [checkpoint["optimizer"]["state"] for checkpoint in (first, second)]
    assert states[0].keys() == states[1].keys()
    for index in states[0]:
        assert states[0][index].keys() == states[1][index].keys()
        for name in states[0][index]:
            assert torch.equal(states[0][index][name], states[1][index][name]), name
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    assert (first["epoch"], first["best_dice"]) == (second["epoch"], second["best_dice"])
    rows = [[{**row, "seconds": 0} for row in checkpoint["history"]] for checkpoint in (first, second)]
    assert rows[0] == rows[1]


def test_defaults_and_both_spellings():
    args = train_multi_GPU.parse_args([])
    assert (args.workers, args.output_dir, args.sync_bn, args.test_only) == (4, "./multi_train", False, False)
    assert (args.world_size, args.dist_url, args.batch_size, args.epochs) == (1, "env://", 4, 200)
    assert train_multi_GPU.parse_args(["--sync_bn", "False"]).sync_bn is False
    for flag in ("--sync_bn", "--sync-bn"):
        assert train_multi_GPU.parse_args([flag]).sync_bn is True
        assert train_multi_GPU.parse_args([flag, "True"]).sync_bn is True
    assert train_multi_GPU.parse_args(["--no-sync-bn"]).sync_bn is False
    for flag in ("--start_epoch", "--start-epoch"):
        assert train_multi_GPU.parse_args([flag, "3"]).start_epoch == 3


def test_started_plainly_it_does_what_train_does(shared_drive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--data-path", str(shared_drive), *SMALL, "--epochs", "2", "-b", "2"]
    train_multi_GPU.main(train_multi_GPU.parse_args(args))
    train.main(train.parse_args(args))
    assert_same_state(load_checkpoint("multi_train/last_model.pth"), load_checkpoint("save_weights/last_model.pth"))


def test_a_batch_that_is_not_full_is_left_out(shared_drive, working_directory):
    train_multi_GPU.main(parse(shared_drive, "--epochs", "2", "-b", "4"))  # of 6 photographs
    assert load_checkpoint("multi_train/last_model.pth")["lr_scheduler"]["last_epoch"] == 2


def test_wrong_device_and_folder(shared_drive, working_directory, capsys):
    Path("file").touch()
    for flag, value, named in (
        ("--device", "toaster", "--device toaster: no"),
        ("--output-dir", "file/a", f"{Path('file/a')}: "),
    ):
        with pytest.raises(SystemExit):
            run_script(train_multi_GPU.main, parse(shared_drive, flag, value))
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


def fail_on_the_main_process(meeting_point, data):
    Path("file").touch()
    run_script(train_multi_GPU.main, parse(data, "--dist-url", meeting_point, "--output-dir", "file/folder"))


def test_an_error_of_the_main_process_alone_is_one_line_in_all(shared_drive, tmp_path):
    printed = in_processes(fail_on_the_main_process, 2, tmp_path, f"file://{tmp_path}/meet", shared_drive)
    last = printed[0].splitlines()[-1]
    assert f"--output-dir {Path('file/folder')}: cannot be written (" in last and last.endswith(
        "; choose another folder"
    )
    assert "Traceback" not in "".join(printed)


def outcome(function, *arguments):
    """The function's result; of an error its kind and its first line."""
    try:
        return repr(function(*arguments))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def decide_together(meeting_point, data):
    """In each process, what it decides: rank 0 alone lacks tensorboard, rank 1 alone lacks memory and a compiler."""
    args = parse(data, "--dist-url", meeting_point, "--threshold", "auto")
    init_distributed_mode(args)
    cpu, last = torch.device("cpu"), args.rank == 1
    settings._photographs_fit = lambda *arguments: not last
    settings._channels_last_is_faster = lambda *arguments: last
    settings._why_not_to_compile = lambda device: "no compiler" if last else None
    settle(args, argparse.Namespace(type="cuda"))
    print(args.device_data, args.workers, args.channels_last)
    args.compile = True
    print(outcome(settle, args, cpu))

    def out_of_memory(self, device):
        raise torch.OutOfMemoryError

    args.device_data, to = True, DriveDataset.to
    DriveDataset.to = out_of_memory if last else to
    print(outcome(open_datasets, args, cpu))

    if not last:
        sys.modules["torch.utils.tensorboard"] = None  # importing it now fails
    args.tensorboard = True
    print(outcome(settle, args, cpu))

    args.compile = args.device_data = args.tensorboard = False
    torch.manual_seed(0)
    train_data, _ = open_datasets(args, cpu)
    state = TrainingState(train.create_model(base_c=4), cpu, 1, args, train_data.files)
    if not last:
        save_checkpoint(state.checkpoint() | {"validated_on": [], "epoch": 0}, "weights.pth")
    args.output_dir = "missing/folder"
    print(outcome(score_weights, "weights.pth", cpu, args))  # adds the threshold, then cannot write the scores
    if not last:
        print("threshold" in load_checkpoint("weights.pth"))

        def full_disk(*arguments, **kwargs):
            raise OutputError("weights.pth: cannot be written (No space left on device)")

        sys.modules[score_weights.__module__].add_to_checkpoint = full_disk
    print(outcome(score_weights, "weights.pth", cpu, args))


def test_what_one_process_finds_all_know(shared_drive, tmp_path):
    printed = in_processes(decide_together, 2, tmp_path, f"file://{tmp_path}/meet", shared_drive)
    expected = [
        "False 0 False",
        "UsageError: --compile: torch.compile does not work here (no compiler); train without it",
        "UsageError: --device-data: the photographs do not fit into the GPU's memory; leave it out",
        "UsageError: --tensorboard: the package tensorboard is missing; run: pip install tensorboard",
        "OutputError: missing/folder/scores.json: cannot be written",
        "OutputError: missing/folder/scores.json: cannot be written",
    ]
    for rank, lines in enumerate(text.splitlines() for text in printed):
        found = [line for line in lines if line.startswith(("False", "UsageError", "OutputError"))]
        assert len(found) == len(expected), printed[rank]
        for line, begin in zip(found, expected, strict=True):
            assert line.startswith(begin), rank
    assert "True" in printed[0].splitlines()
    warning = "warning: the threshold is not stored: weights.pth: cannot be written (No space left on device)"
    assert warning in printed[0].splitlines() and warning not in printed[1]


def test_sync_bn_without_a_gpu(shared_drive, working_directory):
    with pytest.raises(UsageError, match="--sync-bn: .*GPUs alone"):
        train_multi_GPU.main(parse(shared_drive, "--sync-bn"))


def test_too_many_processes_say_which_flag_to_change():
    args = argparse.Namespace(world_size=8, batch_size=4, steps_per_epoch=None)
    with pytest.raises(UsageError, match="--batch-size 4: 20 .* 8 processes are 3 for each.*--batch-size 3 or less"):
        train_multi_GPU.require_a_step(20, args)
    train_multi_GPU.require_a_step(20, argparse.Namespace(world_size=5, batch_size=4, steps_per_epoch=None))


@pytest.fixture
def joined(monkeypatch, tmp_path):
    """What init_distributed_mode would have joined."""
    calls = []
    monkeypatch.setattr(
        distributed_utils.dist,
        "init_process_group",
        lambda backend, store, rank, world_size: calls.append((backend, rank, world_size)),
    )
    monkeypatch.setattr(
        distributed_utils,
        "rendezvous",
        lambda url, rank, world_size: iter([(FileStore(str(tmp_path / "store")), rank, world_size)]),
    )
    monkeypatch.setattr(distributed_utils, "_agree_on_attempt", lambda store, rank, world_size: "attempt")
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") or name.startswith("SLURM"):
            monkeypatch.delenv(name)
    return calls


def distributed_args(**more):
    return argparse.Namespace(**{"device": "cpu", "world_size": 1, "dist_url": "env://"} | more)


def test_started_plainly_there_is_no_group(joined):
    args = distributed_args()
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, joined) == (False, 0, 1, [])
    with pytest.raises(DistributedError, match="--world-size 4: .*torchrun --nproc_per_node=4"):
        init_distributed_mode(distributed_args(world_size=4))


def test_variables_of_torchrun(joined, monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    args = distributed_args()
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, args.gpu) == (True, 5, 8, 1)
    assert joined == [("gloo", 5, 8)]


def test_variables_of_slurm(joined, monkeypatch):
    for name, value in {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    args = distributed_args()
    init_distributed_mode(args)
    assert (args.rank, args.world_size, args.gpu) == (3, 4, 1)
    assert joined == [("gloo", 3, 4)]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(DistributedError, match="MASTER_ADDR is not set; .*export MASTER_ADDR"):
        init_distributed_mode(distributed_args())


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are GPUs: set their number in `count`; `current` holds what became the current one."""
    pretended = argparse.Namespace(count=1, current=[])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pretended.count)
    monkeypatch.setattr(torch.cuda, "set_device", pretended.current.append)
    return pretended


def test_slurm_with_one_visible_gpu_for_each_task(joined, gpus, monkeypatch):
    for name, value in {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    args = distributed_args(device="cuda")
    init_distributed_mode(args)
    backend = "nccl" if torch.distributed.is_nccl_available() else "gloo"  # as on Windows
    assert (args.rank, args.gpu, args.dist_backend, gpus.current) == (3, 0, backend, [0])
    gpus.count = 4
    init_distributed_mode(args)
    assert (args.rank, args.gpu, gpus.current) == (3, 1, [0, 1])


@pytest.mark.parametrize(
    "variables, flag",
    [
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}, "--ntasks-per-node"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}, "--nproc_per_node"),
    ],
)
def test_fewer_gpus_than_processes(variables, flag, joined, gpus, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    gpus.count = 2
    with pytest.raises(SystemExit):
        run_script(init_distributed_mode, distributed_args(device="cuda"))
    # Local process 0 has a GPU and raises nothing: the first process without one must tell it.
    assert f"{flag}: local process 2 has no GPU, there are 2; start as many" in capsys.readouterr().err


def test_one_gpu_for_all_processes(joined, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="--device cuda:0: is one GPU for all .* use --device cuda"):
        init_distributed_mode(distributed_args(device="cuda:0"))
    assert not joined


def test_the_named_gpu_is_the_current_one(gpus, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))
    for name, index, expected in (("cuda:1", 0, 1), ("cuda", 2, 2)):
        device = select_device(name, index)
        assert device == gpus.current[-1] == torch.device("cuda", expected)


def test_a_device_that_computes_nothing():
    with pytest.raises(UsageError, match="--device meta: no such device here"):
        select_device("meta")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is there")
def test_a_device_that_is_not_there_is_told_in_one_sentence():
    with pytest.raises(UsageError, match="--device mps: no such device here .*; use cuda, cuda:0 or cpu") as error:
        select_device("mps")
    assert len(str(error.value)) < 250


def test_processes_that_cannot_meet(monkeypatch, joined):
    monkeypatch.undo()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DistributedError, match="process 0 of 2 cannot join .*MASTER_ADDR"):
        init_distributed_mode(distributed_args())


def test_attempts_never_share_their_keys(tmp_path):
    """Three starts at one store: each meets under a name of its own, whatever the ones before left behind."""
    store, names = FileStore(str(tmp_path / "store")), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as processes:
            joined = list(processes.map(lambda rank: distributed_utils._agree_on_attempt(store, rank, 3), range(3)))
        assert len(set(joined)) == 1
        names.append(joined[0])
    assert len(set(names)) == 3


def evaluate_and_train(meeting_point, data):
    """In each process: evaluate a fresh model, then train it; keep what this process ends up with."""
    args = parse(data, "--epochs", "2", "-b", "1", "--dist-url", meeting_point)
    wrap, evaluate, seen = train_multi_GPU.wrap, fit.evaluate, {}

    def remember(model, args):
        seen["model"] = wrap(model, args)
        return seen["model"]

    def remember_scores(*arguments, **kwargs):
        confusion_matrix, dice = evaluate(*arguments, **kwargs)
        seen.setdefault("scores", []).append((confusion_matrix.mat.tolist(), dice))
        return confusion_matrix, dice

    train_multi_GPU.wrap, fit.evaluate = remember, remember_scores
    train_multi_GPU.main(args)
    state = {name.removeprefix("module."): value for name, value in seen["model"].state_dict().items()}
    torch.save({"model": state, "scores": seen["scores"]}, f"rank{args.rank}.pth")


@pytest.mark.parametrize("world_size", [2, 5])  # 5: the last has no photograph to validate
def test_ranks_agree_and_validation_is_exact(shared_drive, tmp_path, world_size):
    in_processes(evaluate_and_train, world_size, tmp_path, f"file://{tmp_path}/meet", shared_drive)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(world_size)]
    for other in ranks[1:]:
        assert other["scores"] == ranks[0]["scores"]
        for name, value in ranks[0]["model"].items():
            assert torch.equal(value, other["model"][name]), name
    # The same weights in this one process: each of the 4 photographs counted once, whatever the shards.
    args = parse(shared_drive)
    settle(args, torch.device("cpu"))
    _, data = open_datasets(args, torch.device("cpu"))
    model = train.create_model(base_c=4)
    model.load_state_dict(ranks[0]["model"])
    loader = evaluation_loader(data, 0, pin_memory=False)
    confusion_matrix, dice = fit.evaluate(model, loader, torch.device("cpu"), 2)
    matrix, distributed_dice = ranks[0]["scores"][-1]
    assert matrix == confusion_matrix.mat.tolist()
    assert distributed_dice == pytest.approx(dice, abs=1e-6)


def train_by_a_recipe(meeting_point, data):
    """In each process: keep the averaged weights that are evaluated last."""
    args = parse(data, "--recipe", "quick", "--epochs", "2", "--steps-per-epoch", "2", "--dist-url", meeting_point)
    evaluate = fit.evaluate

    def remember(model, *arguments, **kwargs):
        torch.save(model.state_dict(), f"rank{args.rank}.pth")
        return evaluate(model, *arguments, **kwargs)

    fit.evaluate = remember
    train_multi_GPU.main(args)


def test_averaged_weights_are_the_same_in_all_processes(shared_drive, tmp_path):
    in_processes(train_by_a_recipe, 2, tmp_path, f"file://{tmp_path}/meet", shared_drive)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    saved = load_checkpoint(tmp_path / "multi_train/last_model.pth")
    for name, value in saved["model"].items():
        assert torch.equal(value, ranks[0][name]) and torch.equal(value, ranks[1][name]), name
    assert saved["lr_scheduler"]["last_epoch"] == 4


def train_with_a_nan_on_rank_1(meeting_point, data):
    args = parse(data, "--epochs", "50", "-b", "1", "--print-freq", "2", "--dist-url", meeting_point)
    original = train_multi_GPU.make_loaders

    def poisoned(*arguments, **kwargs):
        loader, val_loaders = original(*arguments, **kwargs)
        if args.rank == 1:
            collate = loader.collate_fn
            loader.collate_fn = lambda batch: (collate(batch)[0] * float("nan"), collate(batch)[1])
        return loader, val_loaders

    train_multi_GPU.make_loaders = poisoned
    try:
        run_script(train_multi_GPU.main, args)
    finally:
        Path(f"stopped{args.rank}").touch()


def test_a_nan_on_one_rank_stops_all(shared_drive, tmp_path):
    printed = in_processes(train_with_a_nan_on_rank_1, 2, tmp_path, f"file://{tmp_path}/meet", shared_drive)
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()
    assert "".join(printed).count("the training loss became nan") == 1
    assert not list(tmp_path.glob("multi_train/*.pth"))


def children(pid):
    """The processes that this one started, oldest first."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return sorted(found)


def run_torchrun(data, folder, *flags, kill_in=(), workers=0):
    """Train with 2 processes; SIGKILL one of them when a progress line of the given epochs appears."""
    folder.mkdir()
    flags = ["--data-path", data, *SMALL, "-b", 1, "-j", workers, "--resume", "auto", *flags]
    process = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3", SCRIPT, *flags, cwd=folder)
    output, waiting = [], list(kill_in)
    watchdog = threading.Timer(180, process.kill)  # so that a hang of ours does not become one of the tests
    watchdog.start()
    for line in process.stdout:
        output.append(line)
        if waiting and line.startswith(f"Epoch: [{waiting[0]}]  [1/"):
            os.kill(children(process.pid)[len(waiting) % 2], signal.SIGKILL)
            waiting.pop(0)
    watchdog.cancel()
    process.wait(timeout=60)
    assert process.returncode == 0 and not waiting, "".join(output)
    return load_checkpoint(folder / "multi_train" / "last_model.pth"), "".join(output)


@pytest.mark.slow
def test_a_killed_rank_restarts_and_ends_in_the_same_weights(shared_drive, tmp_path):
    flags = "--epochs", 6, "--steps-per-epoch", 9
    undisturbed, _ = run_torchrun(shared_drive, tmp_path / "undisturbed", *flags)
    killed, output = run_torchrun(shared_drive, tmp_path / "killed", *flags, kill_in=[2], workers=2)
    assert re.search("after epoch [01]", output)  # that of epoch 1 may still have been on its way to the disk
    assert_same_state(undisturbed, killed)
    (table,) = (tmp_path / "killed").glob("results*.csv")
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["epoch", *"012345"]


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("localhost", 0))
        return chosen.getsockname()[1]


@pytest.mark.slow
def test_two_machines(shared_drive, tmp_path):
    """The README's --nnodes line, with both agents on this machine."""
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    agents = []
    for node in range(2):
        folder = tmp_path / str(node)
        folder.mkdir()
        flags = ["--data-path", shared_drive, *SMALL, "--epochs", 2, "-b", 1]
        agents.append(torchrun(*meeting, SCRIPT, *flags, cwd=folder))
    for agent in agents:
        output, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, output
    written = [path for node in range(2) for path in (tmp_path / str(node)).rglob("*.pth")]
    assert len({path.parts[-3] for path in written}) == 1  # only the main process writes
    assert load_checkpoint(written[0])["args"]["world_size"] == 2


def test_test_only_prints_the_scores(shared_drive, working_directory, capsys):
    train_multi_GPU.main(parse(shared_drive, "--epochs", "1"))
    text = next(Path().glob("results*.txt")).read_text()
    capsys.readouterr()
    train_multi_GPU.main(parse(shared_drive, "--test-only", "--resume", "multi_train/last_model.pth"))
    output = capsys.readouterr().out
    assert all(line in output for line in text.splitlines()[3:8])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_and_amp_in_one_process(shared_drive, tmp_path):
    flags = ["--data-path", shared_drive, *SMALL_RUN, "--device", "cuda", "--epochs", 3, "--amp", "--sync-bn"]
    process = torchrun("--standalone", "--nproc_per_node=1", SCRIPT, *flags, cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    checkpoint = load_checkpoint(tmp_path / "multi_train" / "last_model.pth")
    assert checkpoint["args"]["dist_backend"] == "nccl" and checkpoint["scaler"]
