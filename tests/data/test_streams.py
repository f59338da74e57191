"""Streams: each image once an epoch, shared among processes and workers, taken up again where they stopped."""

import copy
import json

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from refiner_hf.data import streams
from refiner_hf.data.images import UnreadableImageError
from refiner_hf.data.streams import StreamedImages, StreamPosition, collate_streamed

from .test_seeded_sampling import all_kinds


ROWS, BATCH = 60, 4


def prepare(row):
    return {"labels": row["x"], "random": all_kinds()[0]}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 7)


def stream(shards=4):
    return Dataset.from_dict({"x": list(range(ROWS))}).to_iterable_dataset(num_shards=shards)


def batches(count, workers, *, shards=4, seed=0, rank=0, world_size=1, position=None):
    """The first batches, as (labels, random numbers), and the position behind each."""
    images = StreamedImages(stream(shards), prepare, seed, rank=rank, world_size=world_size, position=position)
    loader = iter(DataLoader(images, BATCH, collate_fn=collate_streamed, num_workers=workers))
    where, seen, positions = StreamPosition(workers, world_size, position), [], []
    for _ in range(count):
        batch = next(loader)
        where.take(batch)
        assert set(batch) == {"labels", "random"}
        seen.append((batch["labels"].tolist(), batch["random"].tolist()))
        positions.append({"workers": max(workers, 1), "next": where.next, "cursors": copy.deepcopy(where.cursors)})
    return seen, positions


def labels_of(seen):
    return [label for labels, _ in seen for label in labels]


@pytest.mark.parametrize("shards", [1, 4])
def test_each_epoch_has_each_row_once_in_another_order(shards):
    seen = labels_of(batches(2 * ROWS // BATCH, 0, shards=shards)[0])
    first, second = seen[:ROWS], seen[ROWS:]
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second and first != list(range(ROWS))
    assert labels_of(batches(3, 0, shards=shards)[0]) == first[:12]
    assert labels_of(batches(3, 0, shards=shards, seed=1)[0]) != first[:12]


@pytest.mark.parametrize(
    "shards, world_size, workers", [(4, 2, 0), (4, 1, 2), (8, 2, 2), (5, 2, 2), (1, 2, 0), (1, 1, 2)]
)
def test_processes_and_workers_share_an_epoch(shards, world_size, workers):
    """Whatever the shares: each row once, and none twice."""
    seen = []
    for rank in range(world_size):
        images = StreamedImages(stream(shards), lambda row: row, 0, rank=rank, world_size=world_size)
        loader = iter(DataLoader(images, batch_size=None, num_workers=workers))
        done = set()
        while len(done) < max(workers, 1):
            row = next(loader)
            if row["cursor"]["epoch"] == 0:
                seen.append(row["x"])
            else:
                done.add(row["cursor"]["worker"])
    assert sorted(seen) == list(range(ROWS))


def test_processes_and_workers_draw_random_numbers_of_their_own():
    by_process = [batches(3, 0, rank=rank, world_size=2)[0] for rank in range(2)]
    by_worker = [[batch] for batch in batches(2, 2)[0]]  # they take turns
    for seen in (by_process, by_worker):
        one, other = ({number for _, numbers in batches for number in numbers} for batches in seen)
        assert one and not one & other


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("taken", [1, 4, 17])
def test_goes_on_as_if_it_had_not_stopped(workers, taken, tmp_path):
    unbroken, positions = batches(taken + 12, workers)
    where = StreamPosition(workers)
    where.next, where.cursors = positions[taken - 1]["next"], positions[taken - 1]["cursors"]
    where.save(tmp_path, rank=0)
    position = StreamPosition.load(tmp_path, rank=0)
    again, _ = batches(12, workers, position=position)
    assert again == unbroken[taken:], "rows and their random numbers"


def test_goes_on_from_where_it_went_on():
    unbroken, positions = batches(20, 2)
    second, later = batches(5, 2, position=positions[2])
    third, _ = batches(5, 2, position=json.loads(json.dumps(later[-1])))
    assert second + third == unbroken[3:13]


def test_not_with_another_number_of_workers_or_processes(tmp_path):
    _, positions = batches(3, 2)
    with pytest.raises(ValueError, match="of workers .2, now 1.: give --dataloader_num_workers"):
        batches(1, 0, position=positions[-1])
    with pytest.raises(ValueError, match="of processes .1, now 2. and can't"):
        batches(1, 2, position={**positions[-1], "processes": 1}, world_size=2)
    with pytest.raises(ValueError, match="doesn't say where process 1 was"):
        StreamPosition.load(tmp_path, rank=1)


@pytest.mark.parametrize("skip", [True, False])
def test_unreadable_images(skip):
    def fail_for_some(row):
        if row["x"] % 10 == 3:
            raise UnreadableImageError(f"The image {row['x']} can't be read.")
        return {"labels": row["x"]}

    rows = iter(StreamedImages(stream(), fail_for_some, 0, skip_unreadable=skip))
    if skip:
        assert sorted(next(rows)["labels"] for _ in range(54)) == [x for x in range(ROWS) if x % 10 != 3]
    else:
        with pytest.raises(UnreadableImageError, match="can't be read"):
            [next(rows) for _ in range(54)]


def test_a_stream_without_images():
    one = Dataset.from_dict({"x": [1]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no images"):
        next(iter(StreamedImages(one, prepare, 0, rank=1, world_size=2)))
