"""The order of training images, and their random numbers."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from refiner_hf.data.seeded_sampling import SeededImages, SeededSampler, random_numbers_of, seed_of


def draws(length=10, seed=0, epoch=0, repeats=1):
    images = SeededImages(range(length), prepare=None, repeats=repeats)
    images.set_epoch(epoch)
    return list(SeededSampler(images, seed))


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    first = draws()
    assert sorted(row for row, _ in first) == list(range(10)) and len({seed for _, seed in first}) == 10
    assert draws() == first
    for other in (draws(epoch=1), draws(seed=1)):
        assert [row for row, _ in other] != [row for row, _ in first]
        assert not {seed for _, seed in other} & {seed for _, seed in first}


def test_repeats_share_the_row_and_not_the_seed():
    rows, seeds = zip(*draws(9, repeats=3))
    assert len(rows) == 9 and len(set(rows)) == 3 and len(set(seeds)) == 9
    assert list(rows) == sorted(rows, key=rows.index), "one after the other"
    assert len({row for epoch in range(20) for row, _ in draws(9, epoch=epoch, repeats=3)}) == 9


def all_kinds():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_numbers_follow_the_draw_alone():
    data = SeededImages(Dataset.from_dict({"x": [1, 2, 3]}), lambda row: (row["x"], all_kinds()))
    torch.manual_seed(0)
    first = data[(1, 5)]
    all_kinds()
    assert data[(1, 5)] == first and data[(2, 5)][1] == first[1] and data[(1, 6)][1] != first[1]


def test_outside_random_numbers_go_on_as_they_were():
    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = [all_kinds(), all_kinds()]
    seed()
    seen = [all_kinds()]
    with pytest.raises(KeyError), random_numbers_of(7):
        all_kinds()
        raise KeyError
    assert [*seen, all_kinds()] == expected


def test_seeds_of_neighbours_differ():
    assert len({seed_of(a, b, c) for a in range(6) for b in range(6) for c in range(6)}) == 216
