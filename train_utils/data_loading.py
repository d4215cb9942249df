"""Batches whose content depends on (seed, epoch, position in the epoch) alone.

Neither the number of workers, nor what was drawn before, nor an interruption changes what an epoch holds; that is
what makes a resumed run end in the same weights as an undisturbed one.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from my_dataset import DriveDataset
from src.colours import Normalization, prepare
from src.dataset_files import describe, root_names
from src.errors import DatasetError
from src.field_of_view import field_of_view_diameter
from src.photograph import is_turned
from src.segment import match_scale
from transforms import get_transform

from .command_line import UsageError, first_of
from .distributed_utils import gather_objects, get_rank, get_world_size, is_main_process
from .settings import evaluation_pixels, training_and_validation


def reading(normalization: Normalization, fov_diameter: float | None, num_classes: int) -> dict[str, Any]:
    """How `DriveDataset` reads photographs for a model of this normalization, working diameter (pixels) and classes."""
    return {
        "prepare": functools.partial(prepare, normalization=normalization),
        "fov_diameter": fov_diameter,
        "num_classes": num_classes,
    }


def open_datasets(args: argparse.Namespace, device: torch.device) -> tuple[DriveDataset, DriveDataset]:
    """The photographs to train and to validate on, in the memory of `device` with `args.device_data`.

    Raises:
        DatasetError: files are missing or unusable, or a class occurs in no label.
        UsageError: they do not fit into the device's memory.
    """
    normalization = Normalization(args.normalization, args.mean, args.std)
    datasets: list[DriveDataset] = []

    def seen_by_the_model(_photograph: np.ndarray, field_of_view: np.ndarray) -> float:
        return match_scale(field_of_view_diameter(field_of_view), args.fov_diameter, datasets[0].median_scale())

    for train, files in zip((True, False), training_and_validation(args), strict=True):
        transform = get_transform(train, args.mean, args.std, args.base_size, args.crop_size, args.augmentation)
        data = DriveDataset.of(
            files,
            transform,
            train=train,
            # A size of one's own has one size.
            detail=getattr(transform, "detail", None) if args.base_size is None else None,
            scale_of=None if train else seen_by_the_model,
            **reading(normalization, args.fov_diameter, args.num_classes),
        )
        require_classes(data, args.num_classes, to_learn=train)
        datasets.append(_on_device(data, device) if args.device_data else data)
    if is_main_process():
        trained, validated = datasets
        print(f"training on {len(trained)} photographs, validating on {len(validated)} ({describe(validated.files)})")
        warn_of_labels(datasets)
        tell_of_missing_roi_masks(datasets)
    return datasets[0], datasets[1]


def require_classes(data: DriveDataset, num_classes: int, *, to_learn: bool) -> None:
    """Raise where a class occurs in no label, so that it cannot be learned; where it cannot be validated, say so.

    Without any vessels, or with nothing else, there is nothing to validate either.

    Raises:
        DatasetError: there is such a class.
    """
    missing = data.missing_class(num_classes)
    if missing and (to_learn or num_classes == 1):
        raise DatasetError(f"--num-classes {num_classes}: {missing}; correct the labels, or the number of classes")
    if missing and is_main_process():
        print(f"warning: {missing}, so it is not validated (--val-split or --fold hold out other photographs)")


def _on_device(data: DriveDataset, device: torch.device) -> DriveDataset:
    moved = None
    with contextlib.suppress(torch.OutOfMemoryError):
        moved = data.to(device)
    if not all(gather_objects(moved is not None)):
        raise UsageError("--device-data: the photographs do not fit into the GPU's memory; leave it out")
    return moved


def tell_of_missing_roi_masks(datasets: Sequence[DriveDataset]) -> None:
    """Say how many photographs have no ROI mask, if any."""
    without = [item.photograph for data in datasets for item in data.files if item.roi_mask is None]
    if without:
        print(
            f"{len(without)} of {sum(map(len, datasets))} photographs have no ROI mask ({first_of(without)}): their "
            "fields of view are found in the photographs"
        )


def warn_of_labels(datasets: Iterable[DriveDataset]) -> None:
    """Say of each data set how many labels can hardly be right: without any vessel, or with hardly anything else.

    Say too where nearly all vessels lie outside the ROI mask, and where a photograph is turned by its EXIF orientation,
    and its label is not.
    """
    files = [item for data in datasets for item in data.files]
    turned = [item.photograph for item in files if is_turned(item.photograph) and not is_turned(item.label)]
    if turned:
        print(
            f"warning: the EXIF orientation turns {len(turned)} photographs and not their labels, which is right if "
            f"the labels were drawn on the turned ones ({first_of(turned)})"
        )
    outside = [share for data in datasets for share in data.shares_outside]
    inverted = [item.roi_mask for item, share in zip(files, outside, strict=True) if item.roi_mask and share > 0.9]
    if inverted:
        print(
            f"warning: nearly all vessels of {len(inverted)} labels lie outside the ROI mask, as if its black and "
            f"white were exchanged ({first_of(inverted)})"
        )
    shares = [share for data in datasets for share in data.vessel_shares()]
    for root, name in root_names(files).items():
        labels = {item.label: share for item, share in zip(files, shares, strict=True) if item.root == root}
        empty = [path for path, share in labels.items() if share == 0]
        full = [path for path, share in labels.items() if share > 0.5]
        if empty or full:
            print(
                f"warning: of the {len(labels)} labels of {name}, {len(empty)} have no vessels, and {len(full)} have "
                f"vessels in more than half of the field of view, as if black and white were exchanged "
                f"({first_of(full + empty)})"
            )


def make_loaders(
    train_data: DriveDataset, val_data: DriveDataset, device: torch.device, args: argparse.Namespace, *, drop_last: bool
) -> tuple[DataLoader, dict[str, DataLoader]]:
    """The loaders of both training scripts, for validation one for each data set by its name.

    `drop_last` leaves out the last batch of an epoch if it is not full.
    """
    workers = default_workers(device, args.batch_size) if args.workers is None else args.workers
    pin_memory = device.type == "cuda" and not args.device_data
    train_loader = training_loader(
        train_data,
        args.batch_size,
        workers,
        args.seed,
        drop_last=drop_last,
        pin_memory=pin_memory,
        steps=args.steps_per_epoch,
        equal=args.sampling == "equal",
    )
    val_loaders = {
        name: evaluation_loader(data, workers, pin_memory=pin_memory, batch_pixels=evaluation_pixels(args))
        for name, data in val_data.by_root().items()
    }
    return train_loader, val_loaders


def derive_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class SeededDataset(Dataset):
    """Items drawn under a seed of their own; indices are the `(index, seed)` pairs of `TrainingSampler`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.collate_fn = dataset.collate_fn

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Any:
        index, seed = index_and_seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class TrainingSampler(Sampler):
    """This process's share of an epoch: a permutation of the samples, with the seed of each one's augmentation.

    Where the processes do not divide the samples, the first of the permutation are used again (as PyTorch's
    DistributedSampler does), so that all processes take equally many steps. With `samples`, an epoch has so many in
    each process, out of as many permutations as that takes. Call `set_epoch` before each epoch.

    Args:
        groups: of each sample, the group that it belongs to. All groups are drawn equally often, whatever their size.
        seed: of the run.
        samples: an epoch's, in each process; None: as many as there are.
    """

    def __init__(self, groups: Sequence[Hashable], seed: int, samples: int | None = None) -> None:
        self.groups = [[i for i, group in enumerate(groups) if group == one] for one in dict.fromkeys(groups)]
        self.seed = seed
        self.epoch = 0
        self.rank, self.world_size = get_rank(), get_world_size()
        self.samples = samples or -(-len(groups) // self.world_size)
        self.repeats = samples is None and len(self.groups) == 1  # the first, where the processes do not divide them

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        total = len(self) * self.world_size
        if len(self.groups) == 1:
            drawn = self._permutations(self.groups[0], generator)
        else:
            turns = self._permutations(range(len(self.groups)), generator)
            streams = [self._permutations(group, generator) for group in self.groups]
            drawn = (next(streams[turn]) for turn in turns)
        order = list(itertools.islice(drawn, len(self.groups[0]) if self.repeats else total))
        for position in range(self.rank, total, self.world_size):
            yield order[position % len(order)], derive_seed(self.seed, self.epoch, position)

    @staticmethod
    def _permutations(items: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """The items in one random order after the other, without end."""
        while True:
            for index in torch.randperm(len(items), generator=generator).tolist():
                yield items[index]

    def __len__(self) -> int:
        return self.samples


def training_loader(
    dataset: DriveDataset,
    batch_size: int,
    workers: int,
    seed: int,
    *,
    drop_last: bool,
    pin_memory: bool,
    steps: int | None = None,
    equal: bool = True,
) -> DataLoader:
    """Shuffled, augmented batches of this process; its `sampler.set_epoch` chooses the epoch.

    An epoch has `steps` batches; without a number, as many samples as there are photographs. With `equal` each data set
    is drawn equally often; without it, each photograph.
    """
    groups = [item.root if equal else None for item in dataset.files]
    sampler = TrainingSampler(groups, seed, steps and steps * batch_size)
    return _loader(
        SeededDataset(dataset), workers, pin_memory, batch_size=batch_size, sampler=sampler, drop_last=drop_last
    )


def evaluation_loader(
    dataset: DriveDataset, workers: int, *, pin_memory: bool, batch_pixels: int | None = None
) -> DataLoader:
    """This process's share of the photographs, each in exactly one process; the share may be empty.

    There is one photograph a batch; with `batch_pixels`, as many of one size as have so many pixels.
    """
    share = range(get_rank(), len(dataset), get_world_size())
    if batch_pixels is None:
        return _loader(dataset, workers, pin_memory, batch_size=1, sampler=share)
    return _loader(dataset, workers, pin_memory, batch_sampler=_of_one_size(share, dataset, batch_pixels))


def _loader(dataset: Dataset, workers: int, pin_memory: bool, **batches: Any) -> DataLoader:
    return DataLoader(
        dataset,
        # More processes than cores only wait for each other (and PyTorch warns); what they load is the same anyway.
        num_workers=min(workers, os.cpu_count() or 1),
        collate_fn=dataset.collate_fn,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        **batches,
    )


def _of_one_size(share: Iterable[int], dataset: DriveDataset, batch_pixels: int) -> list[list[int]]:
    by_size = defaultdict(list)
    for index in share:
        by_size[dataset.labels[index].shape, dataset.images[index].shape].append(index)
    batches = []
    for ((height, width), _), indices in by_size.items():
        count = math.ceil(len(indices) / max(batch_pixels // (height * width), 1))
        batches += [indices[first::count] for first in range(count)]
    return batches


def default_workers(device: torch.device, batch_size: int) -> int:
    """The tutorial's number of loading processes for a GPU; none on a CPU, where they would take the model's cores."""
    return min(batch_size, 8) if device.type == "cuda" and batch_size > 1 else 0
