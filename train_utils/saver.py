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

    Args:
        state: of the run.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._may_rest = state.device.type == "cuda" and state.args.save_best
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[float] | None = None  # gives the time until which to rest
        self._newest: Checkpoint | None = None  # to be written
        self._best: Checkpoint | None = None  # likewise

    def save(self, improved: bool) -> None:
        """Write the state after an epoch, or keep it for a later `save` or `wait`.

        Raises:
            OutputError: an earlier state could not be written.
        """
        self._newest = self._state.checkpoint()
        if improved:
            self._best = self._newest
        has_rested = self._writing is None or (self._writing.done() and time.perf_counter() >= self._writing.result())
        if has_rested or not self._may_rest:
            self._write()

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            OutputError: a file could not be written.
        """
        if self._newest is not None:
            self._write()
        if self._writing is not None:
            self._writing.result()

    def _write(self) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(_write, self._state, self._newest, self._best)
        self._newest = self._best = None


def _write(state: TrainingState, newest: Checkpoint, best: Checkpoint | None) -> float:
    """Write the files; return until when to rest, by `time.perf_counter`."""
    began, folder = time.perf_counter(), Path(state.args.output_dir)
    if not state.args.save_best:
        save_checkpoint(newest, folder / f"model_{newest['epoch']}.pth")
    if best is not None:
        save_checkpoint(best, folder / BEST_MODEL)
    save_checkpoint(newest, folder / LAST_MODEL)
    state.results.write(newest["history"])
    ended = time.perf_counter()
    return ended + REST * (ended - began)
