"""How fast this project is on this machine: a Markdown table. Run it by hand, where nothing else is running.

    python tests/benchmark.py [--device cpu] [--data-path FOLDER] [--repeats N] [other flags of train.py]
    python tests/benchmark.py --forward [...]         the forward pass alone, run in every way that there is
    python tests/benchmark.py --time-to-dice N --data-path FOLDER [...]        N seeds of --recipe quick, or of another
    python tests/benchmark.py --folder FOLDER [...]   a folder of photographs by predict.py (with its flags, such as
                                                      --weights), and its network alone

Of the first, three processes measure in turn, so that whatever else the machine does slows all of them alike:
- this project, as train.py (with these flags) and predict.py (in float32) run it;
- a naive variant of the same work: plain eager mode, each photograph decoded each time, loading processes started each
  epoch, Dice by a loop over images and classes with boolean indexing, a wait for the loss in each step, two forward
  passes a prediction;
- a large convolution and a large matrix product. The faster of them gives the limit: the time in which the device
  would do the convolutions of the model, if it had nothing else to do.
"""

import argparse
import contextlib
import copy
import functools
import io
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as transforms

sys.path.insert(0, str(Path(__file__).parents[1]))

import predict
import train
from my_dataset import DRIVE_FOV_DIAMETER, OUTSIDE, DriveDataset
from src import Segmenter, create_model
from src import segmenter as segmenter_module
from src.inference import for_inference
from src.masks import read_binary_mask
from src.roi_mask import roi_mask_path
from src.segment import normalise
from train_utils import create_lr_scheduler, load_checkpoint, train_and_eval
from train_utils.checkpoint import LAST_MODEL
from train_utils.command_line import Parser, UsageError, at_least, run_script, select_device
from train_utils.cuda_graphs import RecordedSteps
from train_utils.data_loading import make_loaders, open_datasets
from train_utils.memory import keep_freed_memory
from train_utils.mixed_precision import amp_dtype
from train_utils.settings import memory_format, model_arguments, settle
from train_utils.synthetic_drive import write_synthetic_drive
from train_utils.training_state import TrainingState, load_initial

CPU = torch.device("cpu")
VALIDATED = 3  # photographs, held out of the training ones

# Rows of the table. All are in seconds, but for the memory.
DATA = "a photograph through the training transforms"
FORWARD, LOSS, BACKWARD, OPTIMIZER = (f"training step: {part}" for part in ("forward", "loss", "backward", "optimizer"))
STEP = "training step, whole"
BUSY = "the same, beside a busy process"
GAP = "lost between two epochs by loading"
VALIDATION = "validation, a photograph"
INFERENCE = "forward pass of a photograph"
PREDICTION = "predict.py, a photograph"
MEMORY = "peak memory"
ROWS = (DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER, STEP, BUSY, GAP, VALIDATION, INFERENCE, PREDICTION, MEMORY)

MEASUREMENTS = ("data", "gap", "step", "busy", "validation", "inference", "prediction", "memory")  # of each variant

Measured = dict[str, float]  # by row; or FLOP per second by precision


class Clock:
    """Moments in the work of a device, marked without making the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks = defaultdict(list)

    def mark(self, name: str) -> None:
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks[name].append(moment)

    def between(self, first: str, last: str) -> float:
        """Median of the seconds from each mark of one name to that of the other."""
        pairs = zip(self.marks[first], self.marks[last], strict=True)
        if not self.on_gpu:
            return statistics.median(end - start for start, end in pairs)
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) / 1000 for start, end in pairs)

    def parts_of_step(self) -> Measured:
        return {
            FORWARD: self.between("start", "forward"),
            LOSS: self.between("forward", "loss"),
            BACKWARD: self.between("loss", "backward"),
            OPTIMIZER: self.between("backward", "optimizer"),
        }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The time that a call takes, and the device with what it started."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    function()
    return now() - started


def seconds_between_epochs(loaders: Sequence[DataLoader], device: torch.device) -> float:
    """From asking for an epoch to its first batch, and from its last batch to its end, summed over the loaders."""

    def start() -> None:
        nonlocal batches
        batches = iter(loader)
        next(batches)

    lost, batches = 0.0, iter(())
    for loader in loaders:
        lost += seconds(start, device)
        for _ in range(len(loader) - 1):
            next(batches)
        lost += seconds(lambda: next(batches, None), device)  # noqa: B023, it is called at once
    return lost


class Subject:
    """What is measured; each measurement returns some rows of the table.

    Args:
        args: train.py's, settled for `device`.
        device: to work on.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device

    def busy(self) -> Measured:
        """Only of the project: the naive variant would have to wait by spinning, in an environment of its own."""
        return {}

    def prediction(self) -> Measured:
        return {PREDICTION: seconds(self.predictor(), self.device)}

    def memory(self) -> Measured:
        """The most bytes so far, of the GPU or else of the whole process."""
        if self.device.type == "cuda":
            return {MEMORY: torch.cuda.max_memory_allocated()}
        try:
            import resource
        except ImportError:  # Windows
            return {}
        unit = 1 if sys.platform == "darwin" else 1024
        return {MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Project(Subject):
    """The functions of this project, put together as train.py and predict.py do."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        super().__init__(args, device)
        keep_freed_memory()
        train_data, val_data = open_datasets(args, device)
        self.path = val_data.img_list[0]  # of the photograph to predict
        self.loader, val_loaders = make_loaders(train_data, val_data, device, args, drop_last=False)
        (self.val_loader,) = val_loaders.values()
        torch.manual_seed(args.seed)
        self.model = create_model(**model_arguments(args)).to(device, memory_format=memory_format(args))
        self.batches = [next(iter(self.loader))] * _steps_at_once(device)
        self.state = TrainingState(self.model, device, len(self.batches), args)
        self.training_model = torch.compile(self.model) if args.compile else self.model
        self.recorded = RecordedSteps(self.model.parameters()) if args.cuda_graphs else None

    def data(self) -> Measured:
        samples = list(self.loader.sampler)
        augmented = seconds(lambda: [self.loader.dataset[sample] for sample in samples], self.device)
        return {DATA: augmented / len(samples)}

    def gap(self) -> Measured:
        return {GAP: seconds_between_epochs([self.loader, self.val_loader], self.device)}

    def step(self) -> Measured:
        clock, state = Clock(self.device), self.state
        criterion = train_and_eval.criterion

        def marking_criterion(*args: object, **kwargs: object) -> Tensor:
            loss = criterion(*args, **kwargs)
            clock.mark("loss")
            return loss

        def epoch(recorded: RecordedSteps | None = None) -> None:
            train_and_eval.train_one_epoch(
                self.training_model,
                state.optimizer,
                self.batches,
                self.device,
                0,
                self.args.num_classes + 1,
                state.lr_scheduler,
                scaler=state.scaler,
                amp_dtype=amp_dtype(self.args),
                vessel_weight=self.args.vessel_weight,
                foreground_dice=self.args.dice_loss == "foreground",
                averaged=state.averaged,
                recorded=recorded,
            )

        hooks = [
            self.training_model.register_forward_pre_hook(lambda *_: clock.mark("start")),
            self.training_model.register_forward_hook(lambda *_: clock.mark("forward")),
            state.optimizer.register_step_pre_hook(lambda *_: clock.mark("backward")),
            state.optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer")),
        ]
        train_and_eval.criterion = marking_criterion
        try:
            whole = seconds(epoch, self.device)
        finally:
            train_and_eval.criterion = criterion
            for hook in hooks:
                hook.remove()
        if self.recorded is not None:  # the parts of a recorded step cannot be told apart
            whole = seconds(lambda: epoch(self.recorded), self.device)
        return clock.parts_of_step() | {STEP: whole / len(self.batches)}

    def busy(self) -> Measured:
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            return {BUSY: self.step()[STEP]}
        finally:
            process.kill()
            process.wait()

    def validation(self) -> Measured:
        return {VALIDATION: seconds(self.evaluate, self.device) / len(self.val_loader.dataset)}

    def evaluate(self) -> float:
        """The Dice of the photographs to validate on."""
        num_classes, dtype = self.args.num_classes + 1, amp_dtype(self.args)
        return train_and_eval.evaluate(
            self.model, self.val_loader, self.device, num_classes, amp_dtype=dtype, per_photograph=True
        )[1]

    @torch.inference_mode()
    def inference(self) -> Measured:
        fast_model = for_inference(self.model)
        image = _image(self.path, self.args).to(self.device)
        return {INFERENCE: seconds(lambda: fast_model(image), self.device)}

    def predictor(self) -> Callable[[], np.ndarray]:
        """What predict.py does with a photograph once it has started; it returns the vessels, bool [H, W]."""
        args = predict.parse_args(["--device", self.args.device, "--image", str(self.path), "--scale", "1"])
        checkpoint = {name: getattr(self.args, name) for name in ("mean", "std", "normalization")}
        checkpoint |= {"fov_diameter": DRIVE_FOV_DIAMETER, "model_args": self.model.model_args}
        checkpoint["normalization_assumed"] = False
        predict.settle_by_checkpoint(args, checkpoint)
        segmenter = Segmenter(self.model, checkpoint)
        return lambda: predict.predict(self.path, segmenter, args).labels == 1


class Naive(Subject):
    """The same work as plainly as it can be written."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        super().__init__(args, device)
        self.photographs, self.val_photographs = (
            DecodedEachTime(dataset, args, augment)
            for dataset, augment in zip(open_datasets(args, CPU), (True, False), strict=True)
        )
        self.path = self.val_photographs.files[0][0]
        torch.manual_seed(args.seed)
        self.model = create_model(**model_arguments(args)).to(device)
        self.batches = [next(iter(self._loader(workers=0)))] * _steps_at_once(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.lr_scheduler = create_lr_scheduler(self.optimizer, len(self.batches), args.epochs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")

    def _loader(self, workers: int) -> DataLoader:
        collate = DriveDataset.collate_fn
        return DataLoader(self.photographs, self.args.batch_size, shuffle=True, num_workers=workers, collate_fn=collate)

    def data(self) -> Measured:
        indices = range(len(self.photographs))
        return {DATA: seconds(lambda: [self.photographs[index] for index in indices], self.device) / len(indices)}

    def gap(self) -> Measured:
        workers = min(os.cpu_count() or 1, self.args.batch_size, 8)
        loaders = self._loader(workers), DataLoader(self.val_photographs, num_workers=workers)
        return {GAP: seconds_between_epochs(loaders, self.device)}

    def step(self) -> Measured:
        clock = Clock(self.device)
        dtype = amp_dtype(self.args)
        weight = torch.tensor([1.0, 2.0], device=self.device) if self.args.num_classes == 1 else None
        self.model.train()

        def epoch() -> None:
            for image, target in self.batches:
                image, target = image.to(self.device), target.to(self.device)
                clock.mark("start")
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    logits = self.model(image)["out"]
                clock.mark("forward")
                loss = naive_criterion(logits.float(), target, weight)
                clock.mark("loss")
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                clock.mark("backward")
                self.scaler.step(self.optimizer)
                self.scaler.update()
                clock.mark("optimizer")
                self.lr_scheduler.step()
                loss.item()

        whole = seconds(epoch, self.device)
        return clock.parts_of_step() | {STEP: whole / len(self.batches)}

    def validation(self) -> Measured:
        return {VALIDATION: seconds(self.evaluate, self.device) / len(self.val_photographs)}

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        classes = self.args.num_classes + 1
        matrix = torch.zeros((classes, classes), dtype=torch.int64, device=self.device)
        dice = 0.0
        for image, target in DataLoader(self.val_photographs):
            target = target.to(self.device)
            prediction = self.model(image.to(self.device))["out"].argmax(1)
            inside = target < classes
            cells = classes * target[inside] + prediction[inside]
            matrix += torch.bincount(cells, minlength=classes**2).view(classes, classes)
            dice += naive_dice(F.one_hot(prediction, classes).movedim(-1, 1).float(), target, first=1).item()
        return dice / len(self.val_photographs)

    @torch.no_grad()
    def inference(self) -> Measured:
        self.model.eval()
        image = _image(self.path, self.args).to(self.device)
        return {INFERENCE: seconds(lambda: self.model(image), self.device)}

    def predictor(self) -> Callable[[], np.ndarray]:
        @torch.no_grad()
        def predict_one() -> np.ndarray:
            self.model.eval()
            image = _image(self.path, self.args).to(self.device)
            field_of_view = read_binary_mask(roi_mask_path(self.path, None))
            self.model(torch.zeros_like(image))
            vessels = self.model(image)["out"].argmax(1)[0] == 1
            return vessels.cpu().numpy() & field_of_view

        return predict_one


class DecodedEachTime(Dataset):
    """The photographs and labels of a `DriveDataset`, read from their files whenever they are asked for."""

    def __init__(self, dataset: DriveDataset, args: argparse.Namespace, augment: bool) -> None:
        self.files = [(item.photograph, item.label, item.roi_mask) for item in dataset.files]
        self.args, self.augment = args, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, *mask_paths = self.files[index]
        image = Image.open(image_path).convert("RGB")
        vessels, inside = (np.array(Image.open(path).convert("L")) > 0 for path in mask_paths)
        label = Image.fromarray(np.where(inside, vessels, OUTSIDE).astype(np.uint8))
        if self.augment:
            image, label = self._augmented(image, label)
        image = normalise(np.array(image), self.args.mean, self.args.std)
        return image, torch.from_numpy(np.array(label)).long()

    def _augmented(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        base, crop = self.args.base_size or min(image.size), self.args.crop_size
        size = [int(torch.randint(int(0.5 * base), int(1.2 * base) + 1, ()))]
        image = transforms.resize(image, size, transforms.InterpolationMode.BILINEAR)
        label = transforms.resize(label, size, transforms.InterpolationMode.NEAREST)
        for flip in (transforms.horizontal_flip, transforms.vertical_flip):
            if torch.rand(()) < 0.5:
                image, label = flip(image), flip(label)
        padding = [0, 0, max(crop - image.width, 0), max(crop - image.height, 0)]
        image, label = transforms.pad(image, padding), transforms.pad(label, padding, fill=OUTSIDE)
        top, left = (int(torch.randint(0, side - crop + 1, ())) for side in (image.height, image.width))
        return transforms.crop(image, top, left, crop, crop), transforms.crop(label, top, left, crop, crop)


def naive_criterion(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    loss = F.cross_entropy(logits, target, weight=weight, ignore_index=OUTSIDE)
    return loss + 1 - naive_dice(logits.softmax(dim=1), target)


def naive_dice(x: Tensor, target: Tensor, first: int = 0) -> Tensor:
    """Mean over images and the classes from `first` on; x [N, C, H, W], target [N, H, W]."""
    values = []
    for class_index in range(first, x.shape[1]):
        for image_x, image_target in zip(x, target, strict=True):
            inside = image_target != OUTSIDE
            pixels, truth = image_x[class_index][inside], (image_target[inside] == class_index).float()
            total = pixels.sum() + truth.sum()
            empty = total.item() == 0
            values.append(torch.ones_like(total) if empty else (2 * (pixels * truth).sum() + 1e-6) / (total + 1e-6))
    return torch.stack(values).mean()


class Limit(Subject):
    """The rates that the device reaches."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        super().__init__(args, device)
        keep_freed_memory()

    @torch.inference_mode()
    def rates(self) -> Measured:
        """FLOP per second in float32 and in the precision of training and validation."""
        return {str(dtype): self._rate(dtype) for dtype in {torch.float32, _step_dtype(self.args)}}

    def _rate(self, dtype: torch.dtype) -> float:
        options = {"dtype": dtype, "device": self.device}
        side = 8192 if self.device.type == "cuda" else 2048
        matrix = torch.randn(side, side, **options)
        size = self.args.crop_size // 2
        images = torch.randn(self.args.batch_size, 128, size, size, **options)
        convolution = nn.Conv2d(128, 128, kernel_size=3, padding=1, bias=False, **options)
        channels_last = images.to(memory_format=torch.channels_last)
        rates = []
        for operation in (lambda: matrix @ matrix, lambda: convolution(images), lambda: convolution(channels_last)):
            with FlopCounterMode(display=False) as counter:
                operation()
            rates.append(counter.get_total_flops() / seconds(operation, self.device))
        return max(rates)


def _steps_at_once(device: torch.device) -> int:
    return 10 if device.type == "cuda" else 1  # a single one on a GPU is mostly the wait for it to begin


def _step_dtype(args: argparse.Namespace) -> torch.dtype:
    return amp_dtype(args) or torch.float32


def _image(path: Path, args: argparse.Namespace) -> Tensor:
    """A photograph as the model takes it, [1, 3, H, W]."""
    return normalise(np.array(Image.open(path).convert("RGB")), args.mean, args.std)[None]


def limits(args: argparse.Namespace, photograph: Path, rates: Mapping[str, float]) -> Measured:
    """The least time that the convolutions of the model take at these rates, by row."""
    with torch.device("meta"):  # shapes alone
        model = create_model(**model_arguments(args))
        batch = torch.empty(args.batch_size, 3, args.crop_size, args.crop_size)
        image = torch.empty_like(_image(photograph, args), device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = model(batch)["out"]
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        model.eval()(image)
    step_rate, rate = rates[str(_step_dtype(args))], rates[str(torch.float32)]
    return {
        FORWARD: forward.get_total_flops() / step_rate,
        BACKWARD: backward.get_total_flops() / step_rate,
        STEP: (forward.get_total_flops() + backward.get_total_flops()) / step_rate,
        VALIDATION: inference.get_total_flops() / step_rate,
        **dict.fromkeys((INFERENCE, PREDICTION), inference.get_total_flops() / rate),
    }


# ---- the forward pass


@torch.inference_mode()
def forward_passes(args: argparse.Namespace, path: Path, repeats: int) -> str:
    """The forward pass of a photograph on the CPU, with random weights, run in several ways: a Markdown table.

    The last column is the largest difference of a logit from the plain pass, in standard deviations of the logits.
    """
    torch.manual_seed(args.seed)
    model = create_model(**model_arguments(args)).eval()
    image = _image(path, args)
    folded = for_inference(model)
    compiled = torch.compile(folded)
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: model(image)["out"],
        "BatchNorm folded, contiguous": functools.partial(_forward, _contiguous(folded), image),
        "BatchNorm folded, channels last (predict.py)": lambda: folded(image)["out"],
        "the same under torch.compile": lambda: compiled(image)["out"],
        "the same under autocast to bfloat16": functools.partial(_forward, folded, image, torch.bfloat16),
        "ONNX Runtime": _onnx_runtime(model, image),
    }
    expected = model(image)["out"]
    first = {name: way().float() for name, way in ways.items()}  # to warm up, too
    times = defaultdict(list)
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds(way, CPU))
    lines = ["| forward pass | | difference |", "|---|---|---|"]
    for name, logits in first.items():
        difference = ((logits - expected).abs().max() / expected.std()).item()
        lines.append(f"| {name} | {statistics.median(times[name]):.3f} s | {difference:.0e} |")
    return "\n".join(lines)


def _contiguous(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def _forward(model: nn.Module, image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return model(image)["out"]


def _onnx_runtime(model: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "model.onnx")
        torch.onnx.export(model, (image,), file, dynamo=True, input_names=["image"], output_names=["logits"])
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


# ---- the time to the tutorial's Dice


def times_to_dice(data_path: str, seeds: int, flags: Sequence[str]) -> str:
    """`train.py --recipe quick` (or that of the flags) with so many seeds, from the start of the process to its last
    weights: a table."""
    lines = ["| seed | written after | Dice, best epoch | last epoch |", "|---|---|---|---|"]
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--recipe", "quick"]
            command += ["--data-path", str(Path(data_path).resolve()), "--seed", str(seed), "--output-dir", "weights"]
            started = time.time()
            subprocess.run([*command, *flags], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            written = max(path.stat().st_mtime for path in Path(folder, "weights").glob("*.pth"))
            dices = [row["dice"] for row in load_checkpoint(Path(folder, "weights", LAST_MODEL))["history"]]
        lines.append(f"| {seed} | {written - started:.1f} s | {max(dices):.4f} | {dices[-1]:.4f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


# ---- taking turns


def folder_of_photographs(folder: str, repeats: int, flags: Sequence[str]) -> str:
    """Seconds of a photograph in a folder by predict.py once it has started, and those of the network alone."""
    keep_freed_memory()  # as predict.py does
    seen, segment = [], segmenter_module.segment

    def remember(*arguments: object, **keywords: object) -> Tensor:
        seen.append((arguments, keywords))
        return segment(*arguments, **keywords)

    def predict_all() -> None:
        with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
            predict.main(predict.parse_args(["--image", folder, "--output", output, "--device", "cpu", *flags]))

    segmenter_module.segment = remember
    predict_all()  # also to warm up
    segmenter_module.segment = segment
    times = defaultdict(list)
    for _ in range(repeats):
        times["network"].append(seconds(lambda: [segment(*each, **keywords) for each, keywords in seen], CPU))
        times["folder"].append(seconds(predict_all, CPU))
    whole, network = (statistics.median(times[name]) / len(seen) for name in ("folder", "network"))
    ratio = f"{whole / network:.2f} times the network's own time"
    return f"{len(seen)} photographs, {show('', whole)} each, of the network alone {show('', network)}: {ratio}"


class Measurer:
    """A process that measures what it is asked for."""

    def __init__(self, kind: type, flags: Sequence[str]) -> None:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_answer, args=(kind, flags, theirs))
        self.process.start()
        theirs.close()

    def __call__(self, measurement: str) -> Measured:
        self.connection.send(measurement)
        return self.connection.recv()

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def _answer(kind: type, flags: Sequence[str], connection: Connection) -> None:
    # This process took over how it was started itself; loading processes are to start as they do elsewhere.
    multiprocessing.set_start_method(None, force=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(EOFError):
        args, device = _settle(flags)
        subject = kind(args, device)
        while True:
            connection.send(getattr(subject, connection.recv())())


def _settle(flags: Sequence[str]) -> tuple[argparse.Namespace, torch.device]:
    args = train.parse_args(flags)
    device = select_device(args.device)
    settle(args, device, initial=load_initial(args))
    return args, device


def measure(flags: Sequence[str], repeats: int) -> tuple[Measured, Measured, Measured]:
    """Medians of this project and of the naive variant by row, and the best rates."""
    results = {kind: defaultdict(list) for kind in (Project, Naive, Limit)}
    measurers = {kind: Measurer(kind, flags) for kind in results}
    try:
        for repeat in range(repeats + 1):  # the first one is to warm up
            turns = [(kind, measurement) for measurement in MEASUREMENTS for kind in (Project, Naive)]
            for kind, measurement in [*turns, (Limit, "rates")]:
                for name, value in measurers[kind](measurement).items():
                    results[kind][name] += [value] if repeat else []
    finally:
        for measurer in measurers.values():
            measurer.close()
    project, naive = (
        {name: statistics.median(values) for name, values in results[kind].items()} for kind in (Project, Naive)
    )
    return project, naive, {name: max(values) for name, values in results[Limit].items()}


# ---- the table


def show(row: str, value: float) -> str:
    if row == MEMORY:
        return f"{value / 2**30:.2f} GiB"
    text = f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"
    return f"{text} ({1 / value:.3g} / s)" if row == DATA else text


def table(project: Measured, naive: Measured, limit: Measured) -> str:
    lines = ["| | this project | naive | project : naive | limit | project : limit |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        if row not in project:  # Windows does not tell of the memory
            continue
        cells = [row, show(row, project[row])]
        cells += [show(row, naive[row]), f"{project[row] / naive[row]:.2f}"] if row in naive else ["", ""]
        cells += [show(row, limit[row]), f"{project[row] / limit[row]:.2f}"] if row in limit else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads of {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    )
    return f"{name}, torch {torch.__version__}, {platform.system()}"


def main(args: argparse.Namespace) -> None:
    if args.time_to_dice:
        if not args.data_path:
            raise UsageError("--time-to-dice: needs photographs with labels; name their folder by --data-path")
        device = select_device(train.parse_args(args.other_flags).device)
        print(f"{describe(device)}\n\n{times_to_dice(args.data_path, args.time_to_dice, args.other_flags)}")
        return
    if args.folder:
        measured = folder_of_photographs(args.folder, args.repeats, args.other_flags)
        print(f"{describe(CPU)}: medians of {args.repeats}\n\n{measured}")
        return
    with tempfile.TemporaryDirectory() as folder:
        data_path = args.data_path or str(write_synthetic_drive(folder, training=12 + VALIDATED, test=1))
        flags = ["--data-path", data_path, "--val-split", str(VALIDATED), *args.other_flags]
        with contextlib.redirect_stdout(io.StringIO()):  # what train.py says of its photographs
            settled, device = _settle(flags)
            photograph = open_datasets(settled, CPU)[1].img_list[0]
        if args.forward:
            print(f"{describe(CPU)}: medians of {args.repeats}\n\n{forward_passes(settled, photograph, args.repeats)}")
            return
        project, naive, rates = measure(flags, args.repeats)
        limit = limits(settled, photograph, rates)
    print(f"{describe(device)}: medians of {args.repeats}; limit at {max(rates.values()) / 1e9:.0f} GFLOP/s\n")
    print(table(project, naive, limit))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; what is not known here is train.py's, or with --folder predict.py's."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", help="the folder that contains DRIVE (default: synthetic photographs)")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="measurements of each number")
    parser.add_argument("--forward", action="store_true", help="measure the forward pass in several ways, on the CPU")
    parser.add_argument(
        "--time-to-dice", type=at_least(1), metavar="N", help="train N seeds of --recipe quick (or another)"
    )
    parser.add_argument("--folder", help="measure predict.py over the photographs in this folder, on the CPU")
    args, args.other_flags = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
