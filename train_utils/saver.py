"""The files of an epoch, written while the next one trains."""

import argparse
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from src.weights import Checkpoint

from .checkpoint import BEST_MODEL, LAST_MODEL, save_checkpoint
from .results import ResultsFiles
from .training_state import TrainingState


class Saver:
    """Writes an epoch's files in a separate thread, because on a GPU writing takes longer than an epoch."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future | None = None

    def save(self, state: TrainingState, improved: bool) -> None:
        self.wait()
        self._pending = self._thread.submit(_write, state.checkpoint(), improved, state.args, state.results)

    def wait(self) -> None:
        """Return when everything is written.

        Raises:
            OutputError: a file could not be written.
        """
        if self._pending is not None:
            self._pending.result()


def _write(checkpoint: Checkpoint, improved: bool, args: argparse.Namespace, results: ResultsFiles) -> None:
    folder = Path(args.output_dir)
    if not args.save_best:
        save_checkpoint(checkpoint, folder / f"model_{checkpoint['epoch']}.pth")
    if improved:
        save_checkpoint(checkpoint, folder / BEST_MODEL)
    save_checkpoint(checkpoint, folder / LAST_MODEL)
    results.write(checkpoint["history"])
