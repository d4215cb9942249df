"""The rows of the results files as TensorBoard events, for `--tensorboard`."""

from pathlib import Path

from .distributed_utils import on_main_process
from .results import Row, flatten_row


class TensorBoardLog:
    """The main process writes each row of a run below `folder`; an error that it meets is raised in all processes.

    A resumed run starts at `first_epoch` and discards the rows that the earlier run wrote from that epoch on.
    """

    def __init__(self, folder: str | Path, first_epoch: int) -> None:
        on_main_process(self._open, folder, first_epoch)

    def _open(self, folder: str | Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(folder, "tensorboard")), purge_step=first_epoch)

    def write(self, row: Row) -> None:
        on_main_process(self._write, row)

    def _write(self, row: Row) -> None:
        for name, value in flatten_row(row).items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()  # so that an interrupted run keeps every finished epoch
