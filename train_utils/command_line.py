"""The parts that all command lines share: flag types, the device, files in messages, errors as one line."""

import argparse
import errno
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from src.errors import UserError

from .files import WINDOWS
from .memory import keep_freed_memory

NOT_READ = (errno.EPIPE, errno.EINVAL) if WINDOWS else (errno.EPIPE,)  # of a pipe whose other end is closed
Flags = argparse._ActionsContainer  # a parser, or a group of its flags


class UsageError(UserError):
    """A flag has a value that cannot work; the message names the flag."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults except those that the help text explains, or that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == ""
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults in its help and reports a wrong flag in one line.

    Args:
        description: what the script does.
        example: of a command, to show below it.
    """

    def __init__(self, description: str | None, example: str | None = None) -> None:
        about = f"{description} Example: {example}" if example else description
        super().__init__(
            usage="%(prog)s [flags]",
            description=about,
            formatter_class=_HelpFormatter,
        )
        self._groups: dict[str, Flags] = {}

    def group(self, title: str) -> Flags:
        """The group of flags with this title in the help."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def format_help(self) -> str:
        has_switches = any(name.startswith("--no-") for name in self._option_string_actions)
        self.epilog = "A switch that is on can be turned off by --no-NAME." if has_switches else None
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        hint = ""
        if ": expected " in message:
            hint = "; give a value that begins with a dash as --flag=-value"
        elif message.startswith("unrecognized arguments"):
            unknown = message.split(": ", 1)[1].partition(" ")[0].split("=")[0]
            if (known := unknown.replace("_", "-")) != unknown and known in self._option_string_actions:
                hint = f"; write {known}"
            elif not unknown.startswith("-"):
                example = "--image photograph.jpg" if "--image" in self._option_string_actions else "--data-path FOLDER"
                hint = f"; a value follows the name of its flag, as {example}"
        self.exit(2, f"{self.prog}: error: {message}{hint} (see --help)\n")


def at_least(low: float, kind: type = int, below: float | None = None) -> Callable[[str], int | float]:
    """A flag's type: a finite number of `kind` of at least `low`, and below `below` (whole numbers: of 63 bits)."""

    def parse(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        high = below or (2**63 if kind is int else float("inf"))
        if number is None or not low <= number < high:
            noun = "a whole number" if kind is int else "a number"
            limit = f" and below {high}" if number is not None and number >= high else ""
            raise argparse.ArgumentTypeError(f"must be {noun} of at least {low}{limit}, found {text!r}")
        return number

    return parse


def probability_or_auto(text: str) -> float | str:
    """A flag's type: a number between 0 and 1, or "auto"."""
    if text == "auto":
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, or auto, found {text!r}")
    return number


def fold_of_folds(text: str) -> str:
    """A flag's type: "K/N", the K-th of N folds."""
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    number, folds = map(int, found.groups()) if found else (0, 0)
    if not (1 <= number <= folds and folds >= 2):
        raise argparse.ArgumentTypeError(f"must be K/N, the K-th of N folds, such as 1/5, found {text!r}")
    return f"{number}/{folds}"


def boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True or False, found {text!r}")
    return values[text.lower()]


def add_switch(flags: Flags, *names: str, default: bool | None, help: str) -> None:
    """Add a switch with the forms `--name`, `--no-name`, `--name True` and `--name False`."""
    action = flags.add_argument(*names, nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)
    negations = [f"--no-{name.removeprefix('--')}" for name in names]
    flags.add_argument(
        *negations, dest=action.dest, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def first_of(files: Sequence[Path]) -> str:
    """The first of some files in a message, with a sign that there are more."""
    return f"{files[0]}, ..." if len(files) > 1 else str(files[0])


def select_device(name: str, index: int = 0) -> torch.device:
    """The device that `--device` names; for cuda without a GPU, the CPU. A GPU becomes the current one of torch.cuda.

    Args:
        name: as `torch.device` takes it.
        index: the GPU to use where the name has no number.

    Raises:
        UsageError: there is no such device.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return torch.device("cpu")
            device = torch.device("cuda", index if device.index is None else device.index)
            torch.cuda.set_device(device)  # pinned memory, and `max mem`, are those of the current GPU
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, UnicodeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UsageError(f"--device {name}: no such device here ({reason}); use cuda, cuda:0 or cpu") from error
    return device


def _lines_are_read() -> bool:
    """False where whoever read the lines, such as `head`, has ended."""
    try:
        print(flush=True)
    except OSError as error:
        return error.errno not in NOT_READ
    return True


def run_script(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a script's `main`; a UserError ends in one line on stderr and exit status 1.

    So does a path that no system can follow. Names of files that the terminal cannot show are printed escaped.
    """
    keep_freed_memory()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # where it was closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno in NOT_READ and not _lines_are_read():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)  # 128 and the number of the signal, as shells say it
            if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
                raise
            error = UserError(f"{error.filename}: no such file or folder ({error.strerror}); correct the path")
        if error.alone or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # threads that are at work end first
        print("interrupted", file=sys.stderr)
        sys.exit(130)
