"""Starting the scripts in several processes."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch.multiprocessing

PROJECT = Path(__file__).parents[1]

# Processes fork off one that has imported all this, which takes seconds, and has done nothing else.
multiprocessing.set_forkserver_preload(["train_multi_GPU"])

# The variables that torchrun or SLURM would set; a test must not inherit them.
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def clean_environment() -> dict[str, str]:
    names = [name for name in os.environ if name in GROUP_VARIABLES or name.startswith(("TORCHELASTIC", "SLURM"))]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}


def torchrun(*arguments: Any, **options: Any) -> subprocess.Popen:
    """Start `torchrun` with these arguments; its output is a pipe, errors included."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=clean_environment(), **pipes, **options)


def _as_rank(rank: int, function: Callable, world_size: int, folder: str, arguments: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(f"rank{rank}.txt", "w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        function(*arguments)


def in_processes(function: Callable, world_size: int, folder: Path, *arguments: Any) -> list[str]:
    """Call a function in processes of ranks 0 .. world_size - 1, working in `folder`; return what each printed.

    A process that exits with another status than 0 does not fail the call: look for what it printed.
    """
    if os.name == "nt":
        pytest.skip("groups of processes were not tried on Windows")
    processes = torch.multiprocessing.start_processes(
        _as_rank, (function, world_size, str(folder), arguments), world_size, join=False, start_method="forkserver"
    ).processes
    for process in processes:
        process.join(timeout=90)
        assert process.exitcode is not None, "a process hangs"
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(world_size)]


def _errors() -> TextIO:
    return open("stderr.txt", "w", buffering=1, errors="backslashreplace")  # as Python opens stderr


def _as_script(folder: str, script: str, flags: Sequence[str], address_space: int) -> None:
    os.environ |= {name: value for name, value in clean_environment().items() if name == "OMP_NUM_THREADS"}
    os.chdir(folder)
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *flags]
    status = 0
    with open("stdout.txt", "w", buffering=1) as sys.stdout, _errors() as sys.stderr:
        try:
            runpy.run_path(str(PROJECT / f"{script}.py"), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code or 0
        except BaseException:
            traceback.print_exc()
            raise
    used = resource.getrusage(resource.RUSAGE_SELF)
    ended = {"status": status, "peak": used.ru_maxrss * 1024, "seconds": used.ru_utime + used.ru_stime}
    Path("ended.json").write_text(json.dumps(ended))


def start_script(
    script: str, flags: Sequence[Any], folder: Path, address_space: int = 2**44
) -> multiprocessing.process.BaseProcess:
    """Start `python script.py flags` in a folder, without the seconds that imports take.

    In the folder, `stdout.txt` and `stderr.txt` hold what it prints, and at its end `ended.json` its exit status, its
    peak memory in bytes and the seconds of the processor.

    Args:
        script: "train", "predict" or "compute_mean_std".
        flags: of the command line.
        folder: to work in.
        address_space: limit of the process, bytes, so that a fault takes it and not the machine.
    """
    for name in ("stdout.txt", "stderr.txt", "ended.json"):
        (folder / name).unlink(missing_ok=True)
    arguments = str(folder), script, [*map(str, flags)], address_space
    process = multiprocessing.get_context("forkserver").Process(target=_as_script, args=arguments)
    process.start()
    return process
