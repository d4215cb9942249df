"""Put several scores.json together: of folds, of seeds, or of two methods.

    python -m train_utils.scoring.compare a/*/scores.json                       # mean and deviation of each score
    python -m train_utils.scoring.compare a/*/scores.json --against b/*/scores.json   # and the paired differences

A photograph that several files score by the same label (other seeds, other runs) counts once, with the mean of its
scores.
"""

import argparse
import glob
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from src.errors import UserError

from ..command_line import Parser, run_script

COMPARED = {"dice": "Dice", "sensitivity": "sensitivity", "specificity": "specificity", "cl_dice": "clDice"}

# A score by the digests of the photograph and of its label, one value of each file.
Scores = dict[tuple[str, str], list[float]]


class ScoresError(UserError):
    """A file is no scores.json, or two sets of files cannot be compared; the message names it."""


def read_scores(paths: Iterable[str | Path], score: str) -> Scores:
    """One score of each photograph, inside the field of view, out of files that `train.py` wrote as scores.json.

    Raises:
        ScoresError: a file cannot be read, or holds no scores of photographs.
    """
    values: Scores = {}
    for path in paths:
        try:
            rows = json.loads(Path(path).read_text())["each_photograph"]
            for row in rows:
                if row[score] is not None:
                    values.setdefault((row["digest"], row["label_digest"]), []).append(float(row[score]))
        except OSError as error:
            raise ScoresError(f"{path}: cannot be read ({error.strerror or error}); give files scores.json") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScoresError(
                f"{path}: holds no scores of photographs and labels; let train.py --test-only write it anew"
            ) from error
    return values


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation of the sample (n - 1); a dash where there is no value."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def _means(scores: Scores) -> list[float]:
    return [statistics.fmean(values) for values in scores.values()]


def report(files: Sequence[str], against: Sequence[str]) -> str:
    """The table, a line for each score.

    Raises:
        ScoresError: a file cannot be used, or no photograph is in both sets.
    """
    lines = []
    for score, heading in COMPARED.items():
        scores = read_scores(files, score)
        if not lines:
            count = sum(map(len, scores.values()))
            lines.append(f"{len(files)} files, {len(scores)} photographs, {count} scores; mean ± standard deviation")
        every = [value for values in scores.values() for value in values]
        line = f"{heading:12}over photographs {spread(_means(scores))}, over all scores {spread(every)}"
        if against and scores:
            others = read_scores(against, score)
            both = {key: values for key, values in scores.items() if key in others}
            # Of each photograph, the mean of the first scores less the mean of the second ones.
            differences = [statistics.fmean(values) - statistics.fmean(others[key]) for key, values in both.items()]
            if not differences and score == "dice":  # the others may be undefined
                raise ScoresError(
                    f"--against {against[0]}: scores none of the photographs of {files[0]}, or by other labels"
                )
            if score == "dice":
                unlike = [name for name in against if not read_scores([name], score).keys() & both.keys()]
                lines += [f"left out: {name} scores none of these photographs, or by other labels" for name in unlike]
            if not differences:
                lines.append(f"{line}   against -")
                continue
            count = len(differences)
            error = f"{statistics.stdev(differences) / math.sqrt(count):.4f}" if count > 1 else "-"
            better = sum(difference > 0 for difference in differences)
            of_both = f" (of the {count} in both {spread(_means(both))})" if count < len(scores) else ""
            line += (
                f"{of_both}   against {spread(_means({key: others[key] for key in both}))}   paired difference "
                f"{statistics.fmean(differences):+.4f}, standard error {error}, higher in {better} of {count}"
            )
        lines.append(line)
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    print(report(_matches(args.scores), _matches(args.against)))


def _matches(names: Sequence[str]) -> list[str]:
    """The files that patterns stand for, where the shell has not put them in their place (on Windows)."""
    return [match for name in names for match in ([] if os.path.exists(name) else sorted(glob.glob(name))) or [name]]


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", nargs="+", metavar="scores.json", help="files of one method: folds, seeds")
    parser.add_argument("--against", nargs="+", default=[], metavar="scores.json", help="files of another one")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser().parse_args())
