"""Batches whose content depends on (seed, epoch, sample) alone.

Neither the number of workers, nor what was drawn before, nor an interruption changes what an epoch holds; that is
what makes a resumed run end in the same weights as an undisturbed one.
"""

import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from my_dataset import DriveDataset
from src.photograph import prepare

from .distributed_utils import get_rank, get_world_size


def photograph_preparation(normalization: Mapping[str, Any]) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """What `DriveDataset` is to do to each photograph, by `normalization`, `mean` and `std` of a run or checkpoint."""
    if normalization.get("normalization", "dataset") == "dataset":
        return None
    return functools.partial(prepare, checkpoint=normalization)


def derive_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class SeededDataset(Dataset):
    """Items drawn under a seed of their own; indices are the `(index, seed)` pairs of `TrainingSampler`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

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
    """

    def __init__(self, length: int, seed: int, samples: int | None = None) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.rank, self.world_size = get_rank(), get_world_size()
        self.samples = samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        total = len(self) * self.world_size
        order = torch.randperm(self.length, generator=generator).tolist()
        while self.samples and len(order) < total:
            order += torch.randperm(self.length, generator=generator).tolist()
        for position in range(self.rank, total, self.world_size):
            yield order[position % len(order)], derive_seed(self.seed, self.epoch, position)

    def __len__(self) -> int:
        return self.samples or -(-self.length // self.world_size)


def training_loader(
    dataset: DriveDataset,
    batch_size: int,
    workers: int,
    seed: int,
    *,
    drop_last: bool,
    pin_memory: bool,
    steps: int | None = None,
) -> DataLoader:
    """Shuffled, augmented batches of this process; its `sampler.set_epoch` chooses the epoch.

    An epoch has `steps` batches; without a number, as many as it takes to see each photograph once.
    """
    return DataLoader(
        SeededDataset(dataset),
        batch_size=batch_size,
        sampler=TrainingSampler(len(dataset), seed, steps and steps * batch_size),
        num_workers=_useful(workers),
        collate_fn=dataset.collate_fn,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def evaluation_loader(
    dataset: DriveDataset, workers: int, *, pin_memory: bool, batch_pixels: int | None = None
) -> DataLoader:
    """This process's share of the photographs, each in exactly one process; the share may be empty.

    There is one photograph a batch; with `batch_pixels`, as many of one size as have so many pixels.
    """
    share = range(get_rank(), len(dataset), get_world_size())
    if batch_pixels is None:
        batches = {"batch_size": 1, "sampler": share}
    else:
        batches = {"batch_sampler": _of_one_size(share, dataset, batch_pixels)}
    return DataLoader(
        dataset,
        **batches,
        num_workers=_useful(workers),
        collate_fn=dataset.collate_fn,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def _of_one_size(share: Iterable[int], dataset: DriveDataset, batch_pixels: int) -> list[list[int]]:
    by_size = defaultdict(list)
    for index in share:
        by_size[dataset.labels[index].shape].append(index)
    batches = []
    for (height, width), indices in by_size.items():
        count = math.ceil(len(indices) / max(batch_pixels // (height * width), 1))
        batches += [indices[first::count] for first in range(count)]
    return batches


def _useful(workers: int) -> int:
    # More processes than cores only wait for each other (and PyTorch warns); what they load is the same anyway.
    return min(workers, os.cpu_count() or 1)


def default_workers(device: torch.device, batch_size: int) -> int:
    """The tutorial's number of loading processes for a GPU; none on a CPU, where they would take the model's cores."""
    return min(os.cpu_count() or 1, batch_size if batch_size > 1 else 0, 8) if device.type == "cuda" else 0
