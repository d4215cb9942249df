"""The table predictions.csv of predict.py: a row for each photograph, from which a later run goes on."""

import csv
import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from src.errors import UserError

from .command_line import UsageError
from .files import OutputError, sha256_of, write_csv
from .lock import FolderLock

TABLE = "predictions.csv"
# What is told of a photograph; and what a later run compares: the digests of the photograph and of all that its mask
# depends on besides.
FACTS = ("width", "height", "field_of_view_diameter", "scale", "vessel_share", "reliability", "warning", "seconds")
DIGESTS = ("photograph_digest", "settings_digest")
COLUMNS = ("file", "mask", *FACTS, "error", *DIGESTS)
WHOLE_ROW = re.compile(r",[0-9a-f]{16}\s*\Z")  # the end of a table, with or without that of its last line
SYNC_SECONDS = 1.0  # at most this much of the table is lost with the power

Row = Mapping[str, str]


class PredictionTable:
    """The rows of a folder of masks, which is held as long. Each is on the disk as soon as it is added.

    A run that is stopped leaves the rows that it wrote, and those of earlier runs. To be used in a `with` statement,
    whose end brings the rows into order.

    Args:
        path: of the table; None: there is none, and nothing is kept.

    Raises:
        UsageError: something else stands there, or another run holds the folder.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Row] = {}  # by the name of the mask; failures by that of the photograph
        self._adding = threading.Lock()
        if path is None:
            return
        self._lock = FolderLock(path.with_suffix(".lock"), "--output")
        self._lock.take()
        try:
            self.rows = {_key(row): row for row in _read(path)}
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        self._write_all()  # without the half of a line that a killed run may have left
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115  # closed by __exit__
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._synced = time.monotonic()

    def __enter__(self) -> "PredictionTable":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.path is not None:
            try:
                self._file.close()
                self._write_all()
            finally:
                self._lock.release()

    def former(self, mask: Path) -> Row | None:
        """The row of a mask in this folder."""
        return self.rows.get(("mask", escaped(Path(mask.name))))

    def add(self, row: Row) -> None:
        """Append a row; it replaces an earlier one of the same mask, and a failure of the same photograph.

        Raises:
            OutputError: it cannot be written.
        """
        with self._adding:
            for key in (_key(row), ("file", row["file"])):
                self.rows.pop(key, None)
            self.rows[_key(row)] = row
            if self.path is not None:
                self._append(row, sync=time.monotonic() - self._synced > SYNC_SECONDS)

    def give_up(self, former: Row) -> None:
        """Take the digests out of a former row, on the disk too, because its mask is about to be replaced.

        A run that is killed between the new mask and its row would leave one that seems to be of the former settings.

        Raises:
            OutputError: it cannot be written.
        """
        with self._adding:
            self.rows[_key(former)] = row = {**former, **dict.fromkeys(DIGESTS, "")}
            self._append(row, sync=True)

    def _append(self, row: Row, sync: bool) -> None:
        try:
            self._writer.writerow(row)
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def _write_all(self) -> None:
        write_csv(self.path, COLUMNS, self.rows.values())


def _key(row: Row) -> tuple[str, str]:
    return ("mask", row["mask"]) if row["mask"] else ("file", row["file"])


def whole_path(photograph: Path) -> str:
    """The path of a photograph in a table.

    By a relative path, or one of links, the same name would be another photograph elsewhere, or another the same.
    """
    return escaped(Path(os.path.realpath(photograph.parent), photograph.name))


def masks_in(path: Path) -> dict[str, str]:
    """The names of the masks in the table at a path, if there is one, by the `whole_path` of their photographs.

    Names of odd characters, which a table holds in another form, are left out.
    """
    try:
        files = {row["mask"]: row["file"] for row in _read(path)}
    except UserError:  # is told of when the table is opened
        return {}
    return {file: mask for mask, file in files.items() if mask and mask == Path(mask).name and "\\" not in mask}


def tells_of(path: Path, mask: Path) -> bool:
    """Whether the table at a path, if there is one, has a row for a mask of this name, with or without "_vessels".

    The pictures beside both have the same names.
    """
    names = {escaped(Path(f"{mask.stem.removesuffix('_vessels')}{ending}.png")) for ending in ("", "_vessels")}
    try:
        return any(row["mask"] in names for row in _read(path))
    except UserError:
        return False


def _read(path: Path) -> list[Row]:
    """The whole rows of a table; empty in columns that it lacks, as an earlier version wrote it."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")  # spreadsheets add a mark
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error}); choose another --output") from error
    if not WHOLE_ROW.search(text):  # a run that was killed may have left a part of one
        text = text[: text.rfind("\n") + 1]
    lines = text.splitlines()
    try:
        header = next(csv.reader(lines[:1]), [])
        rows = list(csv.DictReader(lines))
    except csv.Error as error:
        raise UsageError(f"--output {path.parent}: {path.name} there is damaged ({error}); move it away") from error
    if text and (header[:1] != ["file"] or not set(header) <= set(COLUMNS)):
        raise UsageError(f"--output {path.parent}: {path.name} there is not of predict.py; choose another folder")
    # An earlier version wrote paths as they were given, most often in this working directory.
    here = escaped(Path.cwd())
    return [
        dict.fromkeys(COLUMNS, "") | row | {"file": Path(os.path.normpath(os.path.join(here, row["file"]))).as_posix()}
        for row in rows
        if None not in row and None not in row.values()
    ]


def escaped(path: Path) -> str:
    r"""A path in one line of printable UTF-8. Its bytes can be had again: `\\` is a backslash, `\xff` a byte."""
    return printable(os.fsencode(path.as_posix()).replace(b"\\", b"\\\\").decode(errors="backslashreplace"))


def printable(text: str) -> str:
    r"""A text in one line of printable UTF-8: `\U0000000a` for a character that is none."""
    return "".join(character if character.isprintable() else rf"\U{ord(character):08x}" for character in text)


def digest_of(*parts: bytes | Path) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of some bytes, and of the contents of files.

    Raises:
        OSError: a file cannot be read.
    """
    each = (sha256_of(part) if isinstance(part, Path) else hashlib.sha256(part).hexdigest() for part in parts)
    return hashlib.sha256("".join(each).encode()).hexdigest()[:16]
