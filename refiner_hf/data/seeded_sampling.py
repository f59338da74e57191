"""
The order of training images, and the random numbers of each.

Both follow only from the run's seed, the epoch and the position in it. So a run that continues in the middle of an
epoch, with any number of worker processes, gets the same images with the same augmentation.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler


Sample = tuple[int, int]  # number of a row, seed of its random numbers


class SeededSampler(Sampler[Sample]):
    """
    The rows of an epoch in random order, each with a seed of its own.

    Every process deals the whole epoch; accelerate gives each its share.

    Args:
        images ([`SeededImages`]): whose rows; they know the epoch.
        seed (`int`): of the run.
    """

    def __init__(self, images: "SeededImages", seed: int):
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Sample]:
        epoch, length = self.images.epoch, len(self.images)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(self.seed, epoch)))
        rows = order.repeat_interleave(self.images.repeats)[:length].tolist()
        return ((row, seed_of(self.seed, epoch, place)) for place, row in enumerate(rows))


class SeededImages(torch.utils.data.Dataset):
    """
    Training rows by [`Sample`].

    Args:
        data (`datasets.Dataset`): encoded rows.
        prepare: an encoded row to what the model takes; its random numbers are those of the draw.
        repeats (`int`, *optional*, defaults to 1): how often a row comes in an epoch, one time after the other and
            augmented differently, while the others wait for another epoch (repeated augmentation, Hoffer et al. 2020,
            arXiv 1901.09335).
    """

    def __init__(self, data: Dataset, prepare: Callable[[dict[str, Any]], dict[str, Any]], repeats: int = 1):
        self.data, self.prepare, self.repeats, self.epoch = data, prepare, repeats, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is dealt next; the Trainer's data loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Sample) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Sample]) -> list[dict[str, Any]]:
        """A whole batch, as loaders ask for it."""
        prepared = []
        with _random_numbers_kept():  # once for all: it takes much longer than to seed them
            for row, seed in draws:
                _seed_random_numbers(seed)
                prepared.append(self.prepare(self.data[row]))
        return prepared


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, such that seeds of neighbouring numbers have nothing to do with each other."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def random_numbers_of(seed: int) -> Iterator[None]:
    """Within, `random`, `numpy` and torch use `seed`; afterwards they continue as if nothing had happened."""
    with _random_numbers_kept():
        _seed_random_numbers(seed)
        yield


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_random_numbers(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
