"""The files of an epoch, written while the next one trains."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from src.weights import Checkpoint

from .checkpoint import BEST_MODEL, LAST_MODEL, save_checkpoint
from .training_state import TrainingState

REST = 4.0  # times as long as the last writing took


class Saver:
    """Writes an epoch's files in a separate thread, because on a GPU writing takes longer than an epoch.

    There it also rests, since the thread takes the host's time from the training: of the epochs that end meanwhile, the
    newest and the best are kept, and written in their turn. Elsewhere each epoch is written, and so it is if every
    epoch has a file of its own (without `args.save_best`).
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[float] | None = None  # gives the time until which to rest
        self._state: TrainingState | None = None
        self._newest: Checkpoint | None = None  # to be written
        self._best: Checkpoint | None = None  # likewise

    def save(self, state: TrainingState, improved: bool) -> None:
        """Write the state after an epoch, or keep it for a later `save` or `wait`.

        Raises:
            OutputError: an earlier state could not be written.
        """
        self._state, self._newest = state, state.checkpoint()
        if improved:
            self._best = self._newest
        may_rest = state.device.type == "cuda" and state.args.save_best
        if not may_rest or self._writing is None or (self._writing.done() and time.monotonic() >= self._finished()):
            self._begin()

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            OutputError: a file could not be written.
        """
        if self._newest is not None:
            self._begin()
        self._finished()

    def _begin(self) -> None:
        self._finished()
        self._writing = self._thread.submit(_write, self._state, self._newest, self._best)
        self._newest = self._best = None

    def _finished(self) -> float:
        return 0.0 if self._writing is None else self._writing.result()


def _write(state: TrainingState, newest: Checkpoint, best: Checkpoint | None) -> float:
    began, folder = time.monotonic(), Path(state.args.output_dir)
    if not state.args.save_best:
        save_checkpoint(newest, folder / f"model_{newest['epoch']}.pth")
    if best is not None:
        save_checkpoint(best, folder / BEST_MODEL)
    save_checkpoint(newest, folder / LAST_MODEL)
    state.results.write(newest["history"])
    ended = time.monotonic()
    return ended + REST * (ended - began)
