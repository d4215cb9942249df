"""The epochs of a run: train, evaluate, log, save."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from src import BackboneUNet
from src.weights import Checkpoint

from .checkpoint import LAST_MODEL, load_backbone_weights
from .command_line import UsageError
from .cuda_graphs import RecordedSteps
from .distributed_utils import broadcast_buffers, is_main_process, on_main_process
from .files import make_output_folder
from .memory import OutOfMemoryError, explain_out_of_memory
from .mixed_precision import amp_dtype
from .results import Row
from .saver import Saver
from .scoring.counts import ConfusionMatrix
from .tensorboard_log import TensorBoardLog
from .train_and_eval import NonFiniteLossError, evaluate, train_one_epoch
from .training_state import TrainingState


def fit(
    model: nn.Module,
    state: TrainingState,
    train_loader: DataLoader,
    val_loaders: Mapping[str, DataLoader],
    checkpoint: Checkpoint | None,
    initial: Checkpoint | None,
    record: Callable[[], None],
) -> float:
    """Train for the remaining epochs by the settled flags in `state.args`; return the best Dice, -1 without any.

    The main process writes the results files into the working directory. It writes the newest state and that of the
    best epoch (without `args.save_best`: and of every epoch) into `args.output_dir`.

    Args:
        model: `state.model`, or its wrapper for training in many processes.
        state: of a new run.
        train_loader: of this process.
        val_loaders: of this process, one for each data set by its name; none: nothing is validated.
        checkpoint: to continue from; None: a new run.
        initial: whose weights a new run starts from; None: random ones, or those of `args.backbone_weights`.
        record: called when nothing stands in the way of the first epoch.

    Raises:
        NonFiniteLossError: the loss or the weights became NaN or infinite; the files of earlier epochs are kept.
        OutOfMemoryError: memory is short; the files of earlier epochs are kept.
        UsageError, CheckpointError, BackboneWeightsError: `checkpoint`, `args.start_epoch` or
            `args.backbone_weights` cannot be used.
        OutputError: a file cannot be written.
    """
    args = state.args
    if args.compile:
        model = torch.compile(model)  # checkpoints and evaluation are of state.model
    on_main_process(make_output_folder, ".", "the working directory (for the results files)")
    _resume_or_pretrain(state, val_loaders, checkpoint, initial)
    tensorboard = TensorBoardLog(args.output_dir, first_epoch=state.epoch) if args.tensorboard else None
    record()
    recorded = RecordedSteps(state.model.parameters()) if args.cuda_graphs else None
    saver = Saver(state)
    on_main_process(state.results.write, state.results.rows)
    if state.other_photographs and val_loaders:  # the best epoch so far is the one that the run goes on from
        on_main_process(saver.save, True)

    try:
        while state.epoch < args.epochs:
            with explain_out_of_memory(_advice_on_memory(args)):
                row, confusion_matrix = _run_epoch(state, model, train_loader, val_loaders, recorded)
            improved = state.finish_epoch(row)
            if is_main_process() and confusion_matrix is not None:
                print(
                    f"{confusion_matrix}\ndice coefficient: {row['dice']:.3f}{_best_and_time_left(state)}", flush=True
                )
            if tensorboard is not None:
                tensorboard.write(row)
            on_main_process(saver.save, improved)
            state.saved_in = str(Path(args.output_dir, LAST_MODEL))
        on_main_process(saver.wait)
    except KeyboardInterrupt:
        saver.wait()
        if is_main_process():
            print(f"interrupted in epoch {state.epoch}; {_where_to_resume(state)}")
        raise SystemExit(130) from None
    except (NonFiniteLossError, OutOfMemoryError) as error:
        saver.wait()
        raise type(error)(f"{error}; {_where_to_resume(state)}") from error
    except Exception:
        saver.wait()
        raise
    return state.best_dice


def _run_epoch(
    state: TrainingState,
    model: nn.Module,
    train_loader: DataLoader,
    val_loaders: Mapping[str, DataLoader],
    recorded: RecordedSteps | None,
) -> tuple[Row, ConfusionMatrix | None]:
    """Train for one epoch, and evaluate where photographs are held out; `model` is `state.model` or its wrapper."""
    args, num_classes = state.args, state.args.num_classes + 1
    started = time.time()
    train_loader.sampler.set_epoch(state.epoch)
    mean_loss, lr = train_one_epoch(
        model,
        state.optimizer,
        train_loader,
        state.device,
        state.epoch,
        num_classes,
        state.lr_scheduler,
        print_freq=args.print_freq,
        scaler=state.scaler,
        amp_dtype=amp_dtype(args),
        vessel_weight=args.vessel_weight,
        foreground_dice=args.dice_loss == "foreground",
        averaged=state.averaged,
        one_line=not args.progress_lines,
        recorded=recorded,
    )
    broadcast_buffers(state.model)
    if state.averaged is not None:
        broadcast_buffers(state.averaged.module)
    _require_finite_weights(state.model, state.epoch)
    row: Row = {"epoch": state.epoch, "train_loss": mean_loss, "lr": lr}
    confusion_matrix = None
    if val_loaders:
        confusion_matrix, dice = _validate(state, val_loaders)
        row |= _scores(dice, confusion_matrix)
    return row | {"seconds": time.time() - started}, confusion_matrix


def _validate(state: TrainingState, val_loaders: Mapping[str, DataLoader]) -> tuple[ConfusionMatrix, float]:
    """Evaluate on all photographs; return their pixels, and the mean of their Dice.

    Of several data sets, the Dice of each is printed too.
    """
    num_classes, dtype = state.args.num_classes + 1, amp_dtype(state.args)
    total, dices = ConfusionMatrix(num_classes), {}
    for name, loader in val_loaders.items():
        confusion_matrix, dices[name] = evaluate(
            state.evaluated_model, loader, state.device, num_classes, amp_dtype=dtype, per_photograph=True
        )
        total.mat = total.mat.to(confusion_matrix.mat.device) + confusion_matrix.mat
    if len(dices) == 1:
        return total, next(iter(dices.values()))
    if is_main_process():
        print("dice coefficient by data set: " + ", ".join(f"{name} {dice:.3f}" for name, dice in dices.items()))
    counts = {name: len(loader.dataset) for name, loader in val_loaders.items()}
    return total, sum(counts[name] * dice for name, dice in dices.items()) / sum(counts.values())


def _resume_or_pretrain(
    state: TrainingState,
    val_loaders: Mapping[str, DataLoader],
    checkpoint: Checkpoint | None,
    initial: Checkpoint | None,
) -> None:
    args = state.args
    if checkpoint is not None:
        state.restore(checkpoint)
        if state.epoch >= args.epochs and state.other_photographs and val_loaders:
            raise UsageError(
                f"--resume {checkpoint['path']}: its {state.epoch} epochs are done, and the photographs that are held "
                "out, or their labels, are others now; raise --epochs to go on, or score its weights by --test-only"
            )
        if state.epoch >= args.epochs and is_main_process():
            print(f"nothing left to train: {state.epoch} epochs are done; raise --epochs {args.epochs} for more")
        if state.best_dice is None:
            # The tutorial's files store no Dice, and a Dice on other photographs cannot be compared. Without this
            # evaluation a worse epoch could replace a better one.
            with explain_out_of_memory(_advice_on_memory(args)):
                state.best_dice = _validate(state, val_loaders)[1] if val_loaders else -1.0
    elif state.epoch >= args.epochs:
        raise UsageError(f"--start-epoch {args.start_epoch}: leaves nothing of --epochs {args.epochs}; lower it")
    elif initial is not None:
        state.start_from(initial)
    elif args.backbone_weights:
        _pretrain_backbone(state.model, args.backbone_weights)


def _pretrain_backbone(model: BackboneUNet, weights: str) -> None:
    if weights == "imagenet":
        model.download_backbone()
    else:
        load_backbone_weights(model, weights)


def _require_finite_weights(model: nn.Module, epoch: int) -> None:
    # Combined on the device: reading one result per tensor would wait for a GPU a hundred times. One value that is not
    # finite makes the sum so.
    sums = [value.sum() for value in model.state_dict().values() if value.is_floating_point()]
    if not torch.stack(sums).isfinite().all():
        raise NonFiniteLossError(f"the weights became NaN or infinite at the end of epoch {epoch}; lower --lr")


def _best_and_time_left(state: TrainingState) -> str:
    epochs = state.args.epochs - state.epoch
    if not epochs:
        return ""
    seconds = statistics.median(row["seconds"] for row in state.results.rows if "seconds" in row)
    left = f"{epochs} epoch{'s' if epochs > 1 else ''}, about {timedelta(seconds=round(epochs * seconds))} left"
    return f" (best {state.best_dice:.3f}; {left})"


def _advice_on_memory(args: argparse.Namespace) -> str:
    amp = "" if args.amp else ", or add --amp"
    graphs = ", or --no-cuda-graphs" if args.cuda_graphs else ""
    return f"lower --batch-size {args.batch_size} or --crop-size {args.crop_size}{amp}{graphs}"


def _where_to_resume(state: TrainingState) -> str:
    if state.saved_in is None:
        return "no epoch was saved yet"
    return f"the last whole state is in {state.saved_in}: --resume {state.saved_in}"


def _scores(dice: float, confusion_matrix: ConfusionMatrix) -> Row:
    accuracy, recall, iou = confusion_matrix.compute()
    return {
        "dice": dice,
        "global_accuracy": accuracy.item(),
        "recall": recall.tolist(),
        "iou": iou.tolist(),
        "mean_iou": iou.mean().item(),
    }
