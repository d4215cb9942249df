import os
import re

import numpy as np
import pytest
import torch

import tests.processes  # noqa: F401, the processes of the benchmark fork off one that has imported everything
from tests import benchmark
from tests.conftest import SMALL_RUN
from tests.reference import loop_criterion
from train_utils import criterion


@pytest.fixture
def flags(shared_drive):
    return ["--data-path", str(shared_drive), "--val-split", "3", *SMALL_RUN]


def numbers_of(table):
    """Its cells by row; all that must be there is there and positive."""
    rows = {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in table[2:])}
    assert list(rows) == [row for row in benchmark.ROWS if row != benchmark.MEMORY or os.name != "nt"]
    for row, (*amounts, limit, project_to_limit) in rows.items():
        given = amounts[:1] if row == benchmark.BUSY else amounts  # of this project alone
        assert all(float(re.match(r"[\d.e+-]+", cell)[0]) > 0 for cell in given), row
        assert bool(limit) == bool(project_to_limit)
    return rows


@pytest.mark.slow
def test_the_whole_benchmark(shared_drive, capsys):
    benchmark.main(benchmark.parse_args(["--data-path", str(shared_drive), "--repeats", "1", *SMALL_RUN]))
    title, _, *table = capsys.readouterr().out.splitlines()
    assert "medians of 1" in title
    numbers_of(table)


@pytest.mark.slow
def test_the_forward_pass_in_several_ways(shared_drive, capsys):
    pytest.importorskip("onnxruntime")
    benchmark.main(benchmark.parse_args(["--forward", "--data-path", str(shared_drive), "--repeats", "1", *SMALL_RUN]))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if " s |" in line]
    assert len(rows) == 6
    for name, seconds, difference in rows:
        assert float(seconds.removesuffix(" s ")) > 0
        assert float(difference) < (0.1 if "bfloat16" in name else 1e-4), name


@pytest.mark.slow
def test_the_time_to_the_tutorials_dice(shared_drive, working_directory, capsys):
    flags = [*SMALL_RUN, "--crop-size", "48", "--epochs", "2", "--steps-per-epoch", "2"]
    benchmark.main(benchmark.parse_args(["--time-to-dice", "2", "--data-path", str(shared_drive), *flags]))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if " s |" in line]
    assert [row[0].strip() for row in rows] == ["0", "1"]
    for _, seconds, best, last in rows:
        assert float(seconds.removesuffix(" s ")) > 0.5 and 0 <= float(last) <= float(best) <= 1


@pytest.mark.slow
def test_a_folder_and_its_network(shared_drive, capsys):
    folder = str(shared_drive / "DRIVE" / "test" / "images")
    benchmark.main(benchmark.parse_args(["--folder", folder, "--repeats", "1", "--no-tta"]))
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.search(r"4 photographs, (\S+) m?s .* alone (\S+) m?s: (\S+) times", line)
    assert found and float(found[3]) > 0.9


def test_every_row_is_measured(flags):
    args, device = benchmark._settle(flags)
    project, naive = {}, {}
    for kind, rows in ((benchmark.Project, project), (benchmark.Naive, naive)):
        subject = kind(args, device)
        for measurement in benchmark.MEASUREMENTS:
            rows |= getattr(subject, measurement)()
    limit = benchmark.limits(args, subject.path, {"torch.float32": 1e11})
    rows = numbers_of(benchmark.table(project, naive, limit).splitlines())
    assert [row for row, cells in rows.items() if cells[3]] == [row for row in benchmark.ROWS if row in limit]


def test_both_do_the_same_work(flags):
    args, device = benchmark._settle(flags)
    project, naive = benchmark.Project(args, device), benchmark.Naive(args, device)
    assert project.path == naive.path
    with torch.no_grad():  # so that both classes occur
        logits = naive.model.eval()(benchmark._image(naive.path, args))["out"][0]
        for model in (project.model, naive.model):
            model.out_conv[0].bias[0] += (logits[1] - logits[0]).median()
    assert naive.evaluate() == pytest.approx(project.evaluate(), abs=1e-3)
    vessels, naive_vessels = project.predictor()(), naive.predictor()()
    assert 0.1 < vessels.mean() < 0.9
    assert np.mean(vessels != naive_vessels) < 1e-3
    for (image, target), (naive_image, naive_target) in zip(project.batches, naive.batches, strict=True):
        assert image.shape == naive_image.shape and target.shape == naive_target.shape
        assert image.dtype == naive_image.dtype and target.dtype == naive_target.dtype


def test_the_naive_loss_is_the_loss():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 5, 6), torch.randint(0, 2, (2, 5, 6))
    target[0, :2] = 255
    weight = torch.tensor([1.0, 2.0])
    naive = benchmark.naive_criterion(logits, target, weight)
    assert naive == pytest.approx(loop_criterion(logits, target, [1, 2], 255), abs=1e-6)
    assert naive == pytest.approx(criterion({"out": logits}, target, weight, ignore_index=255).item(), abs=1e-6)


def test_limit_counts_the_convolutions_of_the_specification(shared_drive):
    args = benchmark.train.parse_args(["--data-path", str(shared_drive)])
    photograph = next((shared_drive / "DRIVE" / "test" / "images").iterdir())
    limit = benchmark.limits(args, photograph, {"torch.float32": 1e12})
    # The specification counts the gradient of the photographs, too, which nothing needs.
    assert limit[benchmark.STEP] == pytest.approx(0.846 - 2 * 9 * 3 * 32 * 4 * 480**2 / 1e12, abs=1e-3)
    assert limit[benchmark.FORWARD] == pytest.approx(limit[benchmark.STEP] / 3, rel=0.01)
