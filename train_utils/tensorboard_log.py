"""The rows of the results files as TensorBoard events, for `--tensorboard`."""

from pathlib import Path

from .command_line import UsageError
from .logger import Row, flatten_row


class TensorBoardLog:
    """Writes a run's rows below `folder` as they come.

    A resumed run goes on with `first_epoch`; what an interrupted one wrote of that epoch or later ones is discarded.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, first_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard: the package tensorboard is missing; run: pip install tensorboard"
            ) from error
        self.writer = SummaryWriter(str(Path(folder, "tensorboard")), purge_step=first_epoch)

    def write(self, row: Row) -> None:
        for name, value in flatten_row(row).items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()  # so that an interrupted run leaves every finished epoch
