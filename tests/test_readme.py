"""What the README shows works as it is written there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
import train
import train_multi_GPU
from train_utils.synthetic_drive import synthetic_photograph, write_synthetic_drive

PROJECT = Path(__file__).parents[1]
README, CARD = (
    re.sub(r" \\\n +", " ", (PROJECT / page).read_text())  # a command of two lines is one
    for page in ("README.md", "pretrained/README.md")
)

# What a test does not do: install, run itself, wait for a second machine.
NOT_RUN = ("python3 -m venv", ". .venv", "pip install", "python -m pytest", "torchrun --nnodes=2")
SHORT = "--device cpu --epochs 1 --steps-per-epoch 1 --batch-size 2 --base-c 4 --crop-size 64"
OVERWRITE = {"--resume", "--demo", "--test-only"}  # with these a run may use a folder again


def test_notebook_lines(working_directory):
    photograph, _, inside = synthetic_photograph(90, 80, np.random.default_rng(0))
    Image.fromarray(photograph).save("photograph.jpg", quality=95)
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(lines, names)
    vessels, field_of_view = names["vessels"], names["segmentation"].field_of_view
    assert vessels.shape == (80, 90) and vessels.dtype == bool
    assert (field_of_view & inside).sum() / (field_of_view | inside).sum() > 0.9
    assert not vessels[~field_of_view].any()


def test_flags_of_every_command_exist():
    scripts = {"train.py": train, "train_multi_GPU.py": train_multi_GPU, "predict.py": predict}
    script_and_flags = r"(train\.py|train_multi_GPU\.py|predict\.py)"
    commands = re.findall(rf"^(?:.*&& )?(?:python|torchrun\b.*?) {script_and_flags}(.*)$", README, re.MULTILINE)
    commands += re.findall(rf"`python {script_and_flags}([^`]*)`", README)
    assert len(commands) >= 8
    for script, flags in commands:
        flags = shlex.split(flags, comments=True)
        if "--help" not in flags:
            scripts[script].parse_args(flags)


def commands_of(page):
    """The lines of a page's code blocks that are commands, in order, each without those parts that are not run."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        for line in [] if language else block.splitlines():
            parts = [part for part in line.split(" && ") if not part.startswith(NOT_RUN)]
            if parts and parts[0].startswith(("python", "torchrun", "for ")):
                yield " && ".join(parts)


def runnable(command):
    """A command of a page for this interpreter and this project, with so little training that it takes seconds."""
    command = re.sub(r"\s+# .*", "", command)
    training = re.search(r"(?<!test_)\b(train|train_multi_GPU)\.py\b", command)
    if training and "--test-only" not in command:
        short = SHORT if OVERWRITE & set(command.split()) else f"{SHORT} --overwrite"
        if "--init-weights" in command:
            short = re.sub(r" --base-c \d+", "", short)
        end = command.index("; done") if "; done" in command else len(command)
        command = f"{command[:end]} {short}{command[end:]}"
    command = command.replace("--nproc_per_node=4", "--nproc_per_node=2")
    python, torchrun = shlex.quote(sys.executable), f"{shlex.quote(sys.executable)} -m torch.distributed.run"
    command = re.sub(r"\btorchrun\b", torchrun, re.sub(r"\bpython(?= )", python, command))
    return re.sub(r"(?<= )(\w+\.py)\b", rf"{shlex.quote(str(PROJECT))}/\1", command)


@pytest.fixture
def everything(working_directory):
    """A working directory with all the files and folders that the pages name."""
    for seed, folder in enumerate(("FOLDER_WITH_DRIVE", "source", "other")):
        write_synthetic_drive(folder, training=5, test=2, width=96, height=90, seed=seed)
    os.symlink("FOLDER_WITH_DRIVE/DRIVE", "DRIVE")
    os.symlink(PROJECT / "pretrained", "pretrained")
    source = Path("source/DRIVE/training")
    for folder, root in (("MY_DATA", "source"), ("HRF", "other")):
        Path(folder).mkdir()
        shutil.copytree(f"{root}/DRIVE/training/images", f"{folder}/images")
        shutil.copytree(f"{root}/DRIVE/training/1st_manual", f"{folder}/labels")
    for folder in ("my_photographs", "left"):
        shutil.copytree(source / "images", folder)
    photographs = sorted(Path("source/DRIVE/test/images").iterdir())
    for path in (Path("photograph.jpg"), Path("left/a.jpg"), Path("right.png")):
        Image.open(photographs[0]).save(path)
    Path("MASKS").mkdir()
    for path in (source / "mask").iterdir():
        shutil.copy(path, "MASKS")
    Path("FOLDER").mkdir()
    for path in photographs:
        Image.new("L", Image.open(path).size, 255).save(f"FOLDER/{path.stem}_vessels.png")
    return working_directory


@pytest.mark.slow
def test_every_command_works(everything):
    commands = [
        *commands_of(README),
        *(line.replace("pretrained/unet_fundus.pth", "x.pth") for line in commands_of(CARD)),
    ]
    assert len(commands) >= 24
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}  # of `python -m`
    for command in commands:
        line = ["bash", "-c", runnable(command)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{runnable(command)}\n{done.stdout}\n{done.stderr}"
