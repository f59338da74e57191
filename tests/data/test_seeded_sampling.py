"""The order of training images, and their random numbers."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch.utils.data import DataLoader
from transformers import default_data_collator

from refiner_hf.data.arguments import AugmentationArguments
from refiner_hf.data.augmentation import Augment
from refiner_hf.data.seeded_sampling import SeededImages, SeededSampler, random_numbers_of, seed_of
from refiner_hf.data.transforms import PrepareTraining
from refiner_hf.image_processing_refiner import RefinerImageProcessor

from .test_augmentation import encoded, photo


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
    assert data.__getitems__([(0, 6), (1, 5)]) == [data[(0, 6)], first]


def test_batches_of_jpegs_are_the_same_from_any_number_of_workers():
    """The whole way from files, with the augmentation of the paper; and the last batches are those of a new loader."""
    rows = [{"image": encoded(photo(60 + 30 * i, 50), "jpeg"), "labels": i} for i in range(6)]
    features = Features({"image": Image(decode=False), "labels": Value("int64")})
    augment = Augment(
        RefinerImageProcessor(size={"height": 32, "width": 32}),
        AugmentationArguments(crop_min_scale=0.08, auto_augment="rand-m9-mstd0.5-inc1"),
    )
    data = SeededImages(Dataset.from_list(rows, features=features), PrepareTraining(augment))

    def batches(workers, skipped=0):
        sampler = list(SeededSampler(data, 3))[2 * skipped :]
        return list(DataLoader(data, 2, sampler=sampler, collate_fn=default_data_collator, num_workers=workers))

    first = batches(0)
    assert len(first) == 3 and first[0]["pixel_values"].dtype == torch.uint8
    for others, start in ((batches(0), 0), (batches(2), 0), (batches(1, skipped=1), 1)):
        for batch, other in zip(first[start:], others, strict=True):
            assert torch.equal(batch["pixel_values"], other["pixel_values"])
            assert torch.equal(batch["labels"], other["labels"])


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
