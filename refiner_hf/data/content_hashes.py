"""A number for each image that depends only on the content of its file, not on its place or name."""

import os
from hashlib import blake2b
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from .columns import CONTENT_COLUMN, IMAGE_COLUMN, LABEL_COLUMN
from .label_maps import key_of


FEW = 2000  # images that one process reads about as fast as several


def content_hashes(data: Dataset, what: str) -> np.ndarray:
    """
    A number for each image's content, int64, the same for copies of one file. Each file is read once, with a progress
    bar; `datasets` remembers the answer for the next time.

    Args:
        data (`datasets.Dataset`): encoded rows.
        what (`str`): what the images are, for the progress bar.
    """
    if len(data) == 0:
        return np.empty(0, np.int64)
    if CONTENT_COLUMN not in data.column_names:
        data = data.map(
            _content_of,
            input_columns=IMAGE_COLUMN,
            remove_columns=data.column_names,
            features=Features({CONTENT_COLUMN: Value("int64")}),
            num_proc=os.cpu_count() if len(data) > FEW else None,
            desc=f"Reading the {what} images",
        )
    return numbers_in(data, CONTENT_COLUMN)


def with_content_hashes(data: Dataset, what: str) -> Dataset:
    """The rows with these numbers in a column of their own, so that they stay with a row that is picked later."""
    return data.add_column(CONTENT_COLUMN, content_hashes(data, what))


def content_digests(data: Dataset, what: str) -> dict[str, str]:
    """
    `contents`: a digest of the images, whatever their order; `rows`: one of the images with their labels as they come.
    """
    contents = content_hashes(data, what)
    rows = np.stack((contents, _label_numbers(data)))
    return {"contents": _digest(np.sort(contents)), "rows": _digest(rows)}


def numbers_in(data: Dataset, column: str) -> np.ndarray:
    """A column of integers, int64, without reading the images."""
    return np.asarray(data.select_columns([column]).with_format("numpy")[:][column], np.int64)


def _label_numbers(data: Dataset) -> np.ndarray:
    """A number for each row's label, or for its list of labels, int64; of a number with a point its bits."""
    feature = data.features[LABEL_COLUMN]
    if isinstance(feature, List):
        digests = [blake2b(repr(sorted(each)).encode(), digest_size=8).digest() for each in data[LABEL_COLUMN]]
        return np.array([int.from_bytes(each, "big", signed=True) for each in digests], np.int64)
    if getattr(feature, "dtype", "") == "float32":
        return np.array(data.with_format("pandas")[LABEL_COLUMN], np.float32).view(np.int32).astype(np.int64)
    return numbers_in(data, LABEL_COLUMN)


def _digest(numbers: np.ndarray) -> str:
    return blake2b(numbers.astype("<i8").tobytes(), digest_size=16).hexdigest()


def _content_of(image: dict[str, Any]) -> dict[str, int]:
    try:
        return {CONTENT_COLUMN: key_of(image)}
    except OSError:  # an error will name it when all images are opened
        return {CONTENT_COLUMN: key_of({"bytes": str(image.get("path")).encode("utf-8")})}
