"""An endless stream of training images, from the Hub or from files, which continues where it stopped."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info
from transformers import default_data_collator
from transformers.utils import logging

from .images import UnreadableImageError
from .seeded_sampling import random_numbers_of, seed_of


logger = logging.get_logger(__name__)

CURSOR = "cursor"
BLOCK = 1000  # rows that are read and shuffled together


class StreamedImages(torch.utils.data.IterableDataset):
    """
    The rows of a stream, epoch after epoch without end. Each worker of each process reads files of its own where there
    are enough (else it passes over what the others take, without decoding it), in another order each epoch, and
    shuffles `BLOCK` rows at a time.

    Each row has a `cursor`: what is needed to continue after it. Everything else follows from the seed.

    Args:
        stream (`datasets.IterableDataset`): encoded rows.
        prepare: an encoded row to what the model takes; its random numbers are its own.
        seed (`int`): of the run.
        rank (`int`), world_size (`int`): this process, of how many.
        skip_unreadable (`bool`): pass over images that can't be read, with a warning that names them, instead of
            stopping.
        position (`dict`, *optional*): where to continue, from [`StreamPosition.load`].
    """

    def __init__(
        self,
        stream: IterableDataset,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        skip_unreadable: bool = False,
        position: dict[str, Any] | None = None,
    ):
        self.stream, self.prepare, self.seed, self.skip_unreadable = stream, prepare, seed, skip_unreadable
        self.rank, self.world_size = rank, world_size
        self.position = position or {"workers": None, "next": 0, "cursors": {}}
        if self.position.get("processes", world_size) != world_size:
            raise ValueError(
                f"The stream was read with another number of processes ({self.position['processes']}, now "
                f"{world_size}) and can't be continued."
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.position["workers"] not in (None, workers):
            raise ValueError(
                f"The stream was read with another number of workers ({self.position['workers']}, now {workers}): "
                "give --dataloader_num_workers as before."
            )
        # A loader takes batches from its workers in turn, beginning with the first. So the first worker must continue
        # as the worker whose turn it would have been.
        worker = (worker + self.position["next"]) % workers
        cursor = self.position["cursors"].get(str(worker), {"epoch": 0, "block": 0, "place": 0, "rows": None})
        part = split_dataset_by_node(
            self.stream,
            rank=self.rank * workers + worker,
            world_size=self.world_size * workers,
            strategy="shards" if self.stream.num_shards >= self.world_size * workers else "auto",
        )
        while True:
            yield from self._epoch(part, worker, cursor)
            cursor = {"epoch": cursor["epoch"] + 1, "block": 0, "place": 0, "rows": None}

    def _epoch(self, part: IterableDataset, worker: int, start: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is left of an epoch behind the cursor `start`."""
        epoch, place = start["epoch"], start["place"]
        part.set_epoch(seed_of(self.seed, epoch))  # another order of the files
        if start["rows"] is not None:
            part.load_state_dict(start["rows"])
        before, anything = start["rows"], False
        # Not `iter(part)`, which divides the files among a loader's workers in its own way.
        for number, block in enumerate(part.iter(batch_size=BLOCK), start["block"]):
            names, anything = list(block), True
            here = (self.seed, epoch, self.rank, worker, number)
            order = np.random.default_rng(seed_of(*here)).permutation(len(block[names[0]]))
            for i in range(place, len(order)):
                try:
                    with random_numbers_of(seed_of(*here, i)):
                        row = self.prepare({name: block[name][order[i]] for name in names})
                except UnreadableImageError as error:
                    if not self.skip_unreadable:
                        raise
                    logger.warning(f"Passed over: {error}")
                    continue
                row[CURSOR] = {"worker": worker, "epoch": epoch, "block": number, "place": i + 1, "rows": before}
                yield row
            before, place = part.state_dict(), 0
        if not anything and start["rows"] is None:
            raise ValueError("The stream has no images for each worker; give fewer --dataloader_num_workers.")


def collate_streamed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of a loader's worker, with the cursor behind its last row."""
    cursor = rows[-1].pop(CURSOR)
    for row in rows[:-1]:
        row.pop(CURSOR)
    return {**default_data_collator(rows), CURSOR: cursor}


class StreamPosition:
    """
    How far training has got in a stream, by what the batches that it took say.

    Args:
        workers (`int`): how many take turns.
        processes (`int`): how many train.
        position (`dict`, *optional*): where it went on.
    """

    def __init__(self, workers: int, processes: int = 1, position: dict[str, Any] | None = None):
        position = position or {"next": 0, "cursors": {}}
        self.workers, self.processes = max(workers, 1), processes
        self.next, self.cursors = position["next"], dict(position["cursors"])

    def take(self, batch: dict[str, Any]) -> None:
        """Notes the cursor of a batch, and takes it out."""
        cursor = batch.pop(CURSOR)
        worker = cursor.pop("worker")
        self.cursors[str(worker)] = cursor
        self.next = (worker + 1) % self.workers

    def save(self, folder: str | Path, rank: int) -> None:
        """Into a checkpoint."""
        content = {
            "processes": self.processes,
            "workers": self.workers,
            "next": self.next,
            "cursors": self.cursors,
        }
        _file(folder, rank).write_text(json.dumps(content), encoding="utf-8")

    @staticmethod
    def load(folder: str | Path, rank: int) -> dict[str, Any]:
        """
        Of a checkpoint.

        Raises:
            `ValueError`: it has no position for this process, or a damaged one.
        """
        file = _file(folder, rank)
        try:
            position = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{folder} doesn't say where process {rank} was in the stream: continue with as many processes as "
                "before."
            ) from error
        except ValueError as error:
            raise ValueError(f"{file.name} isn't JSON ({error})") from error
        if not _is_position(position):
            raise ValueError(f"{file.name} doesn't hold a position in a stream")
        return position


def _file(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"stream_position_{rank}.json"


def _is_position(content: Any) -> bool:
    """Whether it has the shape of what [`StreamPosition.save`] writes."""
    if not isinstance(content, dict) or not isinstance(content.get("cursors"), dict):
        return False
    numbers = [content.get(name) for name in ("processes", "workers", "next")]
    for cursor in content["cursors"].values():
        if not isinstance(cursor, dict) or not isinstance(cursor.get("rows", ""), dict | None):
            return False
        numbers += [cursor.get(name) for name in ("epoch", "block", "place")]
    return all(type(number) is int and number >= 0 for number in numbers) and content["next"] < content["workers"]
