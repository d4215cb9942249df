"""Files that are written whole or not at all."""

import contextlib
import csv
import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from src.errors import UserError

WINDOWS = os.name == "nt"
SECONDS_IN_USE = 5.0  # that a file may be read by a virus scanner, or a copy to a cloud


class OutputError(UserError):
    """A file or folder cannot be written; the message names it."""


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextlib.contextmanager
def replace_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it replaces `path` once it is complete and on the disk.

    If anything fails before that, an earlier file at `path` stays unchanged.

    Raises:
        OutputError: the file cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"{path}: cannot be written (it is a folder or a device); choose another name")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); what stood there before is intact") from error
    finally:
        if os.path.exists(partial):
            partial.unlink()


def _replace(partial: Path, path: Path) -> None:
    """`os.replace`; on Windows again and again for SECONDS_IN_USE, as long as another program has the file open."""
    last = time.monotonic() + SECONDS_IN_USE
    while True:
        try:
            os.replace(partial, path)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > last:
                raise
            time.sleep(0.1)


def write_csv(path: str | Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table with a header, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    with replace_whole(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))  # a file name need not be UTF-8


def write_picture(path: str | Path, picture: Image.Image, format: str = "PNG", **options: Any) -> None:
    """Write a picture, whole or not at all, by `picture.save` with these options.

    Raises:
        OutputError: it cannot be written.
    """
    with replace_whole(path) as file:
        if format == "PNG":
            picture.save(file, format=format, **options)
        else:  # Pillow writes by other means, and does not tell of a full disk
            content = io.BytesIO()
            picture.save(content, format=format, **options)
            file.write(content.getbuffer())


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        OutputError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed ({_reason(error)})") from error


def create_new(path: str | Path) -> bool:
    """Create an empty file; return False if it exists.

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


def require_no_input(outputs: Iterable[str | Path], inputs: Iterable[str | Path], flag: str) -> None:
    """Check that no file to write is one that is read, by whatever name or link.

    Raises:
        OutputError: one is; the message names `flag`.
    """
    taken = {identity for path in inputs for identity in _identities(path)}
    for path in outputs:
        if taken & _identities(path):
            raise OutputError(f"{flag}: would overwrite the input {path}; choose another place")


def _identities(path: str | Path) -> set[Any]:
    """The absolute path without links, and where the file exists what its hard links share."""
    found: set[Any] = {os.path.realpath(path)}
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_ino:  # some network drives number no files
            found.add((status.st_dev, status.st_ino))
    return found


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            content.update(part)
    return content.hexdigest()


def make_output_folder(path: str | Path, flag: str) -> Path:
    """Make a folder and check that files can be written in it, before hours of training depend on it.

    Raises:
        OutputError: it cannot be made or written; the message names `flag`.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # On Windows, `tempfile` would try names without end where it may not write.
        probe = path / f".{os.getpid()}.partial"
        with open(probe, "wb"):
            pass
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{flag} {path}: cannot be written ({_reason(error)}); choose another folder") from error
    return path
