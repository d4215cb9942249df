"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class OutputError(OSError):
    """A file or folder cannot be written; the message names it."""


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def replace_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing; it takes the name `path` once it is complete and on the disk.

    Whatever goes wrong in between, a file that stood at `path` before stays as it was.

    Raises:
        OutputError: the file cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); what stood there before is intact") from error
    finally:
        if partial.exists():
            partial.unlink()


def create_new(path: str | Path) -> bool:
    """Create an empty file; return False where there is one already.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        with open(path, "x"):
            return True
    except FileExistsError:
        return False
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)})") from error


def make_output_folder(path: str | Path, flag: str) -> Path:
    """Make a folder, and make sure now, not after an hour of training, that files can be written in it.

    Raises:
        OutputError: it cannot be made or written; the message names `flag`.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"{flag} {path}: cannot be written ({_reason(error)}); choose another folder") from error
    return path
