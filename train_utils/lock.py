"""A lock that keeps a second run out of an output folder, or from a single output file.

A file in the folder says which process of which host the owner is. What keeps others out is the system's lock on that
open file. The system lifts it whenever and however the owner ends, so that no stale one is left, and lock daemons carry
it to other hosts of a network file system. It is a lock of POSIX (`lockf`), which forked loading processes do not
inherit: those of a killed run may outlive it.
"""

import contextlib
import os
import socket
from pathlib import Path
from typing import BinaryIO

from .command_line import UsageError
from .files import OutputError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

ATTEMPTS = 10  # to lock a file that others remove


class FolderLock:
    """A file that one process holds; where the file system knows no locks, a line says so and nothing is held.

    Args:
        path: of the file, in the folder that is written to.
        flag: that names the output.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self.path, self.flag = path, flag
        self.file: BinaryIO | None = None

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *error: object) -> None:
        self.release()

    def take(self) -> None:
        """Hold the file.

        Raises:
            UsageError: another process holds it.
            OutputError: it cannot be written.
        """
        try:
            self._take()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from error

    def _take(self) -> None:
        for _ in range(ATTEMPTS):
            file = open(self.path, "a+b")  # noqa: SIM115
            try:
                _lock(file)
            except (BlockingIOError, PermissionError) as error:
                with file:
                    file.seek(0)
                    owner = file.read(1000).decode(errors="replace").strip()
                raise UsageError(
                    f"{self.flag} {self.path.parent}: another run is writing there ({owner or 'starting'}); wait for "
                    f"its end, or give another {self.flag}"
                ) from error
            except OSError as error:
                print(f"{self.path}: cannot be locked ({error.strerror}); see that no other run writes there")
            # The owner before may have removed the file after it was opened here.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    break
            file.close()
        else:
            raise OutputError(f"{self.path}: cannot be locked; choose another {self.flag}")
        self.file = file
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self.file.flush()

    def release(self) -> None:
        if self.file is not None:
            if fcntl is None:  # Windows removes no open file
                self.file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.file.close()


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        file.seek(2**20)  # a byte beyond the text, which others may read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
