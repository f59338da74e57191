"""A table of answers as parquet. It needs pyarrow, which the base installation hasn't."""

import csv
from base64 import b64decode
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from .table import FEATURES


_AT_A_TIME = 5000  # rows


def write_parquet(rows_file: Path, file: Path) -> None:
    """A finished table in CSV as parquet: scores as numbers, features as lists of numbers, all else as text."""
    with rows_file.open(encoding="utf-8", newline="") as opened:
        rows = csv.reader(opened)
        columns = next(rows)
        part = pyarrow.table(_columns(columns, list(islice(rows, _AT_A_TIME))))
        with parquet.ParquetWriter(file, part.schema) as writer:
            while part.num_rows:
                writer.write_table(part)
                part = pyarrow.table(_columns(columns, list(islice(rows, _AT_A_TIME))), schema=part.schema)


def _columns(names: list[str], rows: Sequence[list[str]]) -> dict[str, pyarrow.Array]:
    return {name: _column(name, [row[i] for row in rows]) for i, name in enumerate(names)}


def _column(name: str, values: list[str]) -> pyarrow.Array:
    if name == FEATURES:
        features = [np.frombuffer(b64decode(value), "<f4") for value in values]
        return pyarrow.array(features, pyarrow.list_(pyarrow.float32()))
    if name.startswith("score"):
        return pyarrow.array(map(float, values), pyarrow.float32())
    return pyarrow.array(values, pyarrow.string())
