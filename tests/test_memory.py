import platform
import subprocess
import sys

import pytest
import torch

from train_utils.command_line import run_script
from train_utils.memory import OutOfMemoryError, explain_out_of_memory

PAGE_FAULTS_OF_TEN_TENSORS = """
import resource
import torch
from train_utils.command_line import run_script

def main(args):
    for _ in range(10):
        torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

run_script(main, None) if {as_script} else main(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc alone")
def test_the_scripts_use_freed_memory_again() -> None:
    faults = {
        as_script: int(
            subprocess.run(
                [sys.executable, "-c", PAGE_FAULTS_OF_TEN_TENSORS.format(as_script=as_script)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for as_script in (True, False)
    }
    # Where the heap begins is random, and aligned blocks do not always fit where others were: it grows at first.
    assert faults[True] < faults[False] / 5


def fill_the_memory():
    torch.empty(2**50, dtype=torch.uint8)


def fail_with(error):
    raise error


@pytest.mark.parametrize(
    "function, found",
    [
        (fill_the_memory, r" \(no 1125899906842624 bytes more\)"),
        (lambda: fail_with(MemoryError()), ""),
        (
            lambda: fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has")),
            r" \(no 20.50 GiB more\)",
        ),
        (lambda: fail_with(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")), ""),
        (lambda: fail_with(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), ""),
    ],
)
def test_memory_that_is_short_is_explained(function, found):
    with (
        pytest.raises(OutOfMemoryError, match=rf"^out of memory{found}: lower --it$"),
        explain_out_of_memory("lower --it"),
    ):
        function()


def test_other_errors_are_not():
    with pytest.raises(RuntimeError, match="^shapes differ$"), explain_out_of_memory("lower --it"):
        raise RuntimeError("shapes differ")


def test_a_process_that_is_alone_short_of_memory_says_so(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run_script(lambda args: fail_with(OutOfMemoryError("out of memory")), None)
    assert capsys.readouterr().err.endswith("error: out of memory\n")
