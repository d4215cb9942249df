import json
import statistics
from pathlib import Path

import pytest

from train_utils.command_line import run_script
from train_utils.scoring import compare


def write(path, label="", **dices):
    rows = [
        {"photograph": name, "digest": name, "label_digest": label}
        | {"dice": dice, "sensitivity": dice / 2, "specificity": None, "cl_dice": dice}
        for name, dice in dices.items()
    ]
    path.write_text(json.dumps({"each_photograph": rows}))
    return str(path)


def run(capsys, *flags):
    compare.main(compare.get_parser().parse_args(list(flags)))
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def files(tmp_path):
    """Two folds in two seeds, and another method's."""
    first = [
        write(tmp_path / "a.json", p=0.8, q=0.7),
        write(tmp_path / "b.json", r=0.9),
        write(tmp_path / "c.json", p=0.82, q=0.68),
        write(tmp_path / "d.json", r=0.92),
    ]
    return first, [write(tmp_path / "e.json", p=0.80, q=0.70, r=0.90)]


def test_mean_over_folds_and_seeds(files, capsys):
    title, dice, *others = run(capsys, *files[0])
    assert title == "4 files, 3 photographs, 6 scores; mean ± standard deviation"
    means = [0.81, 0.69, 0.91]
    every = [0.8, 0.7, 0.9, 0.82, 0.68, 0.92]
    spreads = [f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" for values in (means, every)]
    assert dice.split(maxsplit=1) == ["Dice", f"over photographs {spreads[0]}, over all scores {spreads[1]}"]
    assert len(others) == 3


def test_paired_differences(files, capsys):
    dice = run(capsys, *files[0], "--against", *files[1])[1]
    # 0.01, -0.01 and 0.01: the mean is 1/300, the standard deviation 0.011547, the standard error a root of 3 less.
    assert "paired difference +0.0033, standard error 0.0067, higher in 2 of 3" in dice


def test_sets_that_overlap_in_part(files, tmp_path, capsys):
    other = write(tmp_path / "other.json", p=0.8, x=0.5)
    dice = run(capsys, *files[0], "--against", other)[1]
    both = "(of the 1 in both 0.8100)   against 0.8000   paired difference +0.0100, standard error -, higher in 1 of 1"
    assert dice.endswith(both) and f"over photographs {statistics.fmean([0.81, 0.69, 0.91]):.4f} ± " in dice


def test_undefined_scores_are_left_out(files, capsys):
    assert run(capsys, *files[0], "--against", *files[1])[3].endswith("over all scores -")
    assert run(capsys, *files[0])[3].split(maxsplit=1) == ["specificity", "over photographs -, over all scores -"]


@pytest.mark.parametrize(
    "content, said", [("{}", "holds no scores"), ("broken", "holds no scores"), (None, "cannot be read")]
)
def test_wrong_files(tmp_path, capsys, content, said):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        run_script(compare.main, compare.get_parser().parse_args([str(path)]))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and str(path) in error and said in error and error.count("\n") == 1


def test_sets_without_a_photograph_in_common(files, tmp_path):
    other = write(tmp_path / "other.json", x=0.5)
    with pytest.raises(compare.ScoresError, match="scores none of the photographs"):
        compare.report(files[0], [other])
    relabelled = write(tmp_path / "relabelled.json", label="another observer's", p=0.8, q=0.7, r=0.9)
    with pytest.raises(compare.ScoresError, match="by other labels"):
        compare.report(files[0], [relabelled])


def test_a_file_without_a_photograph_in_common_is_said(files, tmp_path):
    other = write(tmp_path / "other.json", x=0.5)
    lines = compare.report(files[0], [*files[1], other]).splitlines()
    alone = compare.report(files[0], files[1]).splitlines()
    assert lines == [alone[0], f"left out: {other} scores none of these photographs, or by other labels", *alone[1:]]


def test_patterns_that_no_shell_has_replaced(files, tmp_path, capsys):
    assert run(capsys, str(tmp_path / "[a-d].json")) == run(capsys, *files[0])
    named = tmp_path / "[a].json"
    named.write_text(Path(files[1][0]).read_text())
    assert run(capsys, str(named)) == run(capsys, *files[1])  # and not a.json
    with pytest.raises(compare.ScoresError, match=r"x\*\.json: cannot be read \((No such file|Invalid argument)"):
        run(capsys, str(tmp_path / "x*.json"))
