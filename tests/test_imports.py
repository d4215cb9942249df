"""Which room may import which: README, "Where things are"; and when torch and torchvision are imported."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_utils

PROJECT = Path(__file__).parents[1]
SCRIPTS = {"train", "train_multi_GPU", "predict", "compute_mean_std"}
ROOMS = {  # where no file may import these
    "src": {"train_utils", "my_dataset", "transforms", *SCRIPTS},
    "my_dataset.py": {"train_utils", *SCRIPTS},
    "transforms.py": {"train_utils", *SCRIPTS},
    "train_utils": {"tests", *SCRIPTS},
}


def files_of(room):
    path = PROJECT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """The modules, and names in modules, that a file imports, at its top or in a function, by their full names."""
    package = list(path.relative_to(PROJECT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_directions(room):
    files = files_of(room)
    assert files
    for path in files:
        wrong = [name for name in imports_of(path) if name.split(".")[0] in ROOMS[room]]
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("room", ["src", "train_utils"])
def test_no_circles(room):
    modules = {name_of(path): path for path in files_of(room)}
    graph = {}
    for module, path in modules.items():
        # A package's name stands for its __init__; `from .package import module` is of the module alone.
        found = {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)}
        # To import a module of another package imports that package's __init__ first.
        found |= {
            name.rpartition(".")[0] for name in found if not f"{module}.".startswith(name.rpartition(".")[0] + ".")
        }
        graph[module] = found & modules.keys() - {module}
    assert sum(map(len, graph.values())) > 5
    while leaves := {module for module, needed in graph.items() if not needed & graph.keys()}:
        graph = {module: needed for module, needed in graph.items() if module not in leaves}
    assert not graph, f"import each other: {sorted(graph)}"


LOOK = """
import os, sys
class Look:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("waits", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Look)
import {script}
print("imported", *sorted({{name.split(".")[0] for name in sys.modules}} & {{"torchvision", "my_dataset"}}))
"""


@functools.cache
def importing(script, **environment):
    """What is seen while a script is imported: how threads wait when torch is, and which slow modules are."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", LOOK.format(script=script)]
    done = subprocess.run(command, cwd=PROJECT, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


SLOW = [pytest.param(script, marks=pytest.mark.slow) for script in ("compute_mean_std", "train_multi_GPU")]


@pytest.mark.parametrize("script", ["predict", "train", *SLOW])
def test_how_threads_wait_is_set_before_torch_is_imported(script):
    assert importing(script)[0] == "waits PASSIVE 1000"


def test_how_threads_wait_stays_as_the_user_set_it():
    assert importing("predict", OMP_WAIT_POLICY="ACTIVE")[0] == "waits ACTIVE None"
    assert importing("predict", GOMP_SPINCOUNT="5")[0] == "waits None 5"


def test_predict_starts_without_torchvision():
    assert importing("predict")[-1] == "imported"


def test_every_name_of_train_utils_is_there():
    assert all(getattr(train_utils, name) is not None for name in train_utils.__all__)
    assert set(train_utils.__all__) <= set(dir(train_utils))
    with pytest.raises(ImportError):
        from train_utils import no_such_name  # noqa: F401


def test_metrics_are_found_where_the_tutorial_has_them():
    from train_utils import distributed_utils
    from train_utils.distributed_utils import ConfusionMatrix, DiceCoefficient, MetricLogger, SmoothedValue

    assert ConfusionMatrix is train_utils.ConfusionMatrix and DiceCoefficient is train_utils.DiceCoefficient
    assert MetricLogger is train_utils.MetricLogger and SmoothedValue is train_utils.SmoothedValue
    assert not hasattr(distributed_utils, "MetricLoggers")
