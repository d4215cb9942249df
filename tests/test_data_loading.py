import argparse
import os

import pytest
import torch
from torch.utils.data import Dataset

from my_dataset import DriveDataset
from train_utils import data_loading
from train_utils.data_loading import TrainingSampler, derive_seed, evaluation_loader, training_loader
from transforms import get_transform


def dataset(shared_drive, train=True):
    return DriveDataset(shared_drive, train, get_transform(train, (0.5,) * 3, (0.2,) * 3, base_size=80, crop_size=48))


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [(image.clone(), label.clone()) for image, label in loader]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def loader_of(data, workers=0, seed=0, batch_size=2):
    return training_loader(data, batch_size, workers, seed, drop_last=False, pin_memory=False)


def test_batches_are_a_function_of_seed_and_epoch_alone(shared_drive):
    data = dataset(shared_drive)
    loader = loader_of(data)
    epochs = [epoch_of(loader, epoch) for epoch in range(3)]
    torch.manual_seed(123)
    torch.rand(7)
    assert same(epoch_of(loader_of(data), 2), epochs[2])  # without epochs 0 and 1 before it
    assert same(epoch_of(loader_of(data, workers=2), 1), epochs[1])
    assert not same(epochs[0], epochs[1])
    assert not same(epoch_of(loader_of(data, seed=1), 0), epochs[0])


def test_loading_leaves_the_global_generator_alone_between_samples(shared_drive):
    data = data_loading.SeededDataset(dataset(shared_drive))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    data[(0, 99)]
    assert torch.equal(torch.rand(3), expected)


class WhoLoads(Dataset):
    files = [argparse.Namespace(root="everywhere")] * 4

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return os.getpid()

    collate_fn = staticmethod(list)


def test_workers_live_on_from_epoch_to_epoch():
    loader = loader_of(WhoLoads(), workers=2)
    epochs = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        epochs.append({pid for batch in loader for pid in batch})
    assert epochs[0] == epochs[1] == epochs[2] and os.getpid() not in epochs[0]


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(data_loading, "get_rank", lambda: rank)
    monkeypatch.setattr(data_loading, "get_world_size", lambda: world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_training_shards(monkeypatch, world_size):
    shards = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        sampler = TrainingSampler([None] * 7, seed=3)
        sampler.set_epoch(1)
        shards.append(list(sampler))
        assert len(shards[-1]) == len(sampler) == -(-7 // world_size)
    drawn = [sample for together in zip(*shards, strict=True) for sample in together]
    assert {index for index, _ in drawn} == set(range(7))
    assert len({seed for _, seed in drawn}) == len(drawn)
    assert sorted(index for index, _ in drawn[:7]) == list(range(7))


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_shards_of_a_given_number_of_samples(monkeypatch, world_size):
    shards = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        sampler = TrainingSampler([None] * 7, seed=3, samples=10)
        shards.append(list(sampler))
        assert len(shards[-1]) == len(sampler) == 10
    drawn = [sample for together in zip(*shards, strict=True) for sample in together]
    assert len({seed for _, seed in drawn}) == len(drawn) == 10 * world_size
    for start in range(0, len(drawn) - 6, 7):
        assert sorted(index for index, _ in drawn[start : start + 7]) == list(range(7))
    assert [index for index, _ in drawn[:7]] != [index for index, _ in drawn[7:14]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_photograph_is_evaluated_exactly_once(shared_drive, monkeypatch, world_size):
    data = dataset(shared_drive, train=False)
    seen = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        loader = evaluation_loader(data, workers=0, pin_memory=False)
        assert len(list(loader)) == len(loader)
        seen += list(loader.sampler)
    assert sorted(seen) == [0, 1, 2, 3]


def test_derive_seed_tells_numbers_apart():
    seeds = {derive_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(20)}
    assert len(seeds) == 500 and all(0 <= seed < 2**64 for seed in seeds)
