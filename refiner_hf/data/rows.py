"""
Images with labels, stored on this machine or streamed, behind one interface.

Which of the two they are is decided once, where they are opened; everything that differs between them is here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from ..utils.text import counted
from .columns import IMAGE_COLUMN
from .content_hashes import content_digests
from .seeded_sampling import SeededImages
from .streams import StreamedImages, StreamPosition
from .unreadable import find_unreadable
from .validation_split import hold_out


Prepare = Callable[[dict[str, Any]], dict[str, Any]]

_SHUFFLE_BUFFER = 1000  # images of a stream among which the next one is drawn


class TrainingOrder(NamedTuple):
    """
    In which order rows are trained on: how often each comes in an epoch (`repeats`, not for a stream), and what a
    stream needs to know (stored rows get theirs from the sampler): `seed`, `rank`, `world_size` and `skip_unreadable`
    as in [`~refiner_hf.data.streams.StreamedImages`], and the `checkpoint` where it continues.
    """

    repeats: int
    seed: int
    rank: int
    world_size: int
    skip_unreadable: bool
    checkpoint: str | None


class Rows(ABC):
    """
    Rows with an encoded image each, and perhaps a label.

    Attributes:
        data: what `datasets` has opened.
        streamed (`bool`): whether the rows come one after the other, in files' order, from an unknown number.
    """

    data: Any
    streamed: bool

    def __init__(self, data: Any):
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.data)

    @property
    def features(self) -> Features | None:
        """What the columns hold, where that is known."""
        return self.data.features

    @property
    @abstractmethod
    def count(self) -> int | None:
        """How many rows there are, where that is known."""

    def changed(self, change: Callable[[Any], Any]) -> Self:
        """The same rows after a change that `datasets` makes alike to both kinds."""
        return type(self)(change(self.data))

    @abstractmethod
    def with_class_labels(self, column: str) -> Self:
        """
        The rows with names for the labels in a column that has none.

        Raises:
            `ValueError`: there can't be any.
        """

    @abstractmethod
    def check_labels(self, column: str, count: int) -> None:
        """
        Raises:
            `ValueError`: there are labels outside 0..count - 1. A stream's are looked at when they come.
        """

    @abstractmethod
    def labels(self, column: str) -> list[int]:
        """
        All labels, in order.

        Raises:
            `ValueError`: a stream's come one by one.
        """

    @abstractmethod
    def at_most(self, number: int | None, seed: int) -> Self:
        """`number` rows at random, the same ones for a seed; of a stream the first ones; all where it is `None`."""

    @abstractmethod
    def sample(self, number: int, seed: int) -> Self:
        """At most `number` rows at random, the same ones for a seed; a stream draws each among a thousand."""

    @abstractmethod
    def read(self) -> Dataset | list[dict[str, Any]]:
        """The rows themselves; a stream is read here, once and for all."""

    @abstractmethod
    def spread(self, number: int) -> list[dict[str, Any]]:
        """At most `number` rows, spread evenly over all; the first ones of a stream."""

    @abstractmethod
    def divided(self, part: tuple[float, float], seed: int, *, need_train: bool) -> tuple[Self, Self]:
        """What is left and what is held out, see [`~refiner_hf.data.validation_split.hold_out`]."""

    @abstractmethod
    def readable(self, what: str) -> tuple[Self, list[str]]:
        """
        The rows whose image can be opened, and what is wrong with each of the others. A stream's images are opened
        when they come. `what` the images are is for the progress bar.
        """

    @abstractmethod
    def facts(self, what: str, digest: bool) -> dict[str, Any]:
        """What can be compared later to know whether these are the same rows; `digest` reads the images for it."""

    @abstractmethod
    def prepared(self, transform: Callable) -> Dataset | IterableDataset:
        """For a Trainer: `transform` is applied as rows are read."""

    @abstractmethod
    def for_training(self, prepare: Prepare, order: TrainingOrder) -> torch.utils.data.Dataset:
        """
        Rows in an order that follows from the seed, each prepared with random numbers of its own.

        Args:
            prepare: an encoded row to what the model takes.
            order ([`TrainingOrder`]): in which they come.
        """


class StoredRows(Rows):
    """Rows of a `datasets.Dataset`: their number is known, and any of them can be read at any time."""

    data: Dataset
    streamed = False

    def __len__(self) -> int:
        return len(self.data)

    @property
    def count(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | slice | str) -> Any:
        return self.data[key]

    def with_class_labels(self, column: str) -> Self:
        feature = self.data.features[column]
        if not isinstance(feature, Value):
            raise ValueError(f"The labels in column {column!r} must be integers or names, not {feature}.")
        if not feature.dtype.startswith(("int", "uint")):
            return self.changed(lambda data: data.class_encode_column(column))
        values = self.data.unique(column)
        if None in values or min(values) < 0:
            some = sorted(map(str, values))[:5]
            raise ValueError(f"The labels in column {column!r} must be numbers from 0, got {some}.")
        if max(values) >= 10 * max(len(values), 10):
            raise ValueError(
                f"The labels in column {column!r} are {len(values)} different numbers up to {max(values)}: number "
                "them from 0 on, or give them as names."
            )
        names = ClassLabel(names=[str(i) for i in range(max(values) + 1)])
        return self.changed(lambda data: data.cast_column(column, names))

    def check_labels(self, column: str, count: int) -> None:
        if len(self) == 0:
            return
        labels = self.data.with_format("pandas")[column]
        wrong = labels[~labels.between(0, count - 1)]  # missing ones too
        if len(wrong):
            some = sorted({str(label) for label in wrong})[:5]
            raise ValueError(
                f"There are labels outside 0..{count - 1} in {counted(len(wrong), 'image')} (-1 is how unlabelled "
                f"test sets say so): {', '.join(some)}. The first is row {wrong.index[0]}."
            )

    def labels(self, column: str) -> list[int]:
        return list(self.data[column])

    def at_most(self, number: int | None, seed: int) -> Self:
        return self if number is None else self.sample(number, seed)

    def sample(self, number: int, seed: int) -> Self:
        return self.changed(lambda data: data.shuffle(seed=seed).select(range(min(number, len(data)))))

    def read(self) -> Dataset:
        return self.data

    def spread(self, number: int) -> list[dict[str, Any]]:
        number = min(number, len(self))
        return [self.data[i * len(self) // number] for i in range(number)]

    def divided(self, part: tuple[float, float], seed: int, *, need_train: bool) -> tuple[Self, Self]:
        left, held = hold_out(self.data, part, seed, need_train=need_train)
        return type(self)(left), type(self)(held)

    def readable(self, what: str) -> tuple[Self, list[str]]:
        good, reasons = find_unreadable(self.data, what)
        return type(self)(good), reasons

    def facts(self, what: str, digest: bool) -> dict[str, Any]:
        return {"images": len(self), **(content_digests(self.data, what) if digest else {})}

    def prepared(self, transform: Callable) -> Dataset:
        return self.data.with_transform(transform)

    def for_training(self, prepare: Prepare, order: TrainingOrder) -> SeededImages:
        return SeededImages(self.data, prepare, order.repeats)


class StreamedRows(Rows):
    """Rows of a `datasets.IterableDataset`."""

    data: IterableDataset
    streamed = True

    @property
    def count(self) -> None:
        return None

    def with_class_labels(self, column: str) -> Self:
        raise ValueError(
            f"The labels in column {column!r} have no list of names, which a stream needs: "
            f"{self.data.features[column]}."
        )

    def check_labels(self, column: str, count: int) -> None:
        pass

    def labels(self, column: str) -> list[int]:
        raise ValueError("The labels of a stream come one by one, so they can't be counted first.")

    def at_most(self, number: int | None, seed: int) -> Self:
        return self if number is None else self.changed(lambda data: data.take(number))

    def sample(self, number: int, seed: int) -> Self:
        return self.changed(lambda data: data.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(number))

    def read(self) -> list[dict[str, Any]]:
        return list(self.data)

    def spread(self, number: int) -> list[dict[str, Any]]:
        return list(self.data.take(number))

    def divided(self, part: tuple[float, float], seed: int, *, need_train: bool) -> tuple[Self, Self]:
        raise ValueError("A stream without a validation split can't be divided; name a dataset that has one.")

    def readable(self, what: str) -> tuple[Self, list[str]]:
        return self, []

    def facts(self, what: str, digest: bool) -> dict[str, Any]:
        """The number of files, and of images where the stream says it."""
        split = (self.data.info.splits or {}).get(str(self.data.split))
        return {"files": self.data.num_shards, "images": split.num_examples if split else None}

    def prepared(self, transform: Callable) -> IterableDataset:
        return self.data.map(transform, batched=True, batch_size=32, remove_columns=[IMAGE_COLUMN])

    def for_training(self, prepare: Prepare, order: TrainingOrder) -> StreamedImages:
        return StreamedImages(
            self.data,
            prepare,
            order.seed,
            rank=order.rank,
            world_size=order.world_size,
            skip_unreadable=order.skip_unreadable,
            position=StreamPosition.load(order.checkpoint, order.rank) if order.checkpoint else None,
        )
