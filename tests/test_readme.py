"""What the README shows works as it is written there."""

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

import predict
import train
import train_multi_GPU
from train_utils.synthetic_drive import synthetic_photograph

README = (Path(__file__).parents[1] / "README.md").read_text()


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
