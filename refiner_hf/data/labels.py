"""What is said of an image: one label, several, or a number; and what a network takes for it."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, List, Value

from ..choices_refiner import MULTI_LABEL, REGRESSION, SINGLE_LABEL


SEPARATOR = ";"  # between the labels of an image in a text


class LabelValues:
    """
    What a network takes for a row's label: its number; zeros and ones for several; a number as it is.

    Args:
        problem_type (`str`): as in a configuration.
        num_labels (`int`): how many labels the network has.
        label_ids (`list[int]`, *optional*): its number of each of the data's labels, where they differ.
    """

    def __init__(self, problem_type: str = SINGLE_LABEL, num_labels: int = 0, label_ids: list[int] | None = None):
        self.problem_type, self.num_labels, self.label_ids = problem_type, num_labels, label_ids

    def __call__(self, label: Any) -> Any:
        """
        Raises:
            `ValueError`: it is none of the data's labels, such as the -1 of unlabelled test sets.
        """
        if self.problem_type == REGRESSION:
            return np.float32(label)
        if self.problem_type == MULTI_LABEL:
            values = np.zeros(self.num_labels, np.float32)
            values[[self._number(each) for each in label]] = 1
            return values
        return self._number(label)

    def _number(self, label: int) -> int:
        return label if self.label_ids is None else pick_label(self.label_ids, label)


def count_labels(labels: list) -> Counter[int]:
    """How many images each label has, of one label an image or of lists."""
    return Counter(label for each in labels for label in (each if isinstance(each, list) else [each]))


def pick_label(choices: list[int], label: int | None) -> int:
    """`choices[label]`; raises a `ValueError` for a label that isn't one, such as the -1 of unlabelled test sets."""
    if label is None or not 0 <= label < len(choices):
        raise ValueError(f"An image has the label {label}; labels must lie in 0..{len(choices) - 1}.")
    return choices[label]


def as_label_lists(data: Dataset, column: str) -> tuple[Dataset, list[str]]:
    """
    A column with several labels an image, as lists of numbers.

    Args:
        data: rows whose images aren't decoded.
        column (`str`): lists of labels' names or numbers; or texts with names between semicolons, as a `metadata.csv`
            has them. An image may have no label.

    Returns:
        the rows, and the labels' names.

    Raises:
        `ValueError`: it is something else.
    """
    feature = data.features[column]
    inner = getattr(feature, "feature", None)  # of a list
    if isinstance(inner, ClassLabel):
        return data, inner.names
    if inner is None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"The column {column!r} must hold several labels an image: a list, or a text with {SEPARATOR!r} between "
            f"them. It holds {feature}."
        )
    lists = [_labels_of(value) for value in data[column]]
    names = sorted({name for each in lists for name in each})
    if not names:
        raise ValueError(f"No image has a label in the column {column!r}.")
    number = {name: i for i, name in enumerate(names)}
    features = data.features.copy()
    features[column] = List(ClassLabel(names=names))
    encode = partial(_encode, column=column, number=number)
    return data.map(encode, input_columns=[column], features=features), names


def _encode(value: str | list | None, column: str, number: dict[str, int]) -> dict[str, list[int]]:
    return {column: [number[name] for name in _labels_of(value)]}


def _labels_of(value: str | list | None) -> list[str]:
    """The names in a cell, each once."""
    parts = value.split(SEPARATOR) if isinstance(value, str) else value or []
    return list(dict.fromkeys(name for part in parts if (name := str(part).strip())))


def as_numbers(data: Dataset, column: str) -> Dataset:
    """
    A column of numbers, as float32.

    Raises:
        `ValueError`: it holds something else; or a number is missing, infinite or NaN.
    """
    feature = data.features[column]
    if not isinstance(feature, Value) or not feature.dtype.startswith(("int", "uint", "float", "double")):
        raise ValueError(f"The column {column!r} must hold a number for each image, not {feature}.")
    data = data.cast_column(column, Value("float32"))
    numbers = np.array(data.with_format("pandas")[column], dtype=float)
    if len(wrong := np.flatnonzero(~np.isfinite(numbers))):
        raise ValueError(
            f"{len(wrong):,} images have no finite number in the column {column!r}, first row {wrong[0]}."
        )
    return data
