"""
The table of answers. It is written to a file beside its place, so that an interrupted run can continue: as CSV, row by
row, of which another kind may be made in the end.
"""

import csv
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import check_writable, read_json, write_json
from ..utils.resuming import check_same_facts


FEATURES = "features"  # a column, the last

_ROW_END = b"\r\n"  # as the csv module writes it


def partial_file(output: Path) -> Path:
    """Where the rows are until all are there."""
    return output.with_name(output.name + ".partial")


def part_of(output: Path, process: int) -> Path:
    """Where a process writes its part of a table; the first into the table itself."""
    return output if process == 0 else output.with_name(f"{output.name}.{process}")


def check_place(output: Path) -> None:
    """
    Makes the folder of `output`.

    Raises:
        `OSError`: there is a file already, or the folder can't be written.
    """
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists already and isn't overwritten. Give another --output_file.")
    check_writable(output.parent, "The folder", "Give another --output_file.")


class AnswerTable:
    """
    The rows that there are, and the file to which more can be added.

    Args:
        output (`Path`): where the finished table shall be.
        columns (`list[str]`): its first row.
        facts (`dict`): what the rows come from. A table is continued only if these are the same.

    Attributes:
        finished (`set[str]`): the first column's entries.
        labels (`Counter[str]`): the second column's.

    Raises:
        `ValueError`: there is an unfinished table that comes from something else.
        `OSError`: the file can't be written.
    """

    def __init__(self, output: Path, columns: list[str], facts: dict[str, Any]):
        self._output, self._partial, self._columns, self._facts = output, partial_file(output), columns, facts
        self._facts_file = self._partial.with_name(self._partial.name + ".json")
        self.finished: set[str] = set()
        self.labels: Counter[str] = Counter()
        if self._partial.exists():
            self._check_facts(facts)
            rows, length = whole_rows(self._partial)
            os.truncate(self._partial, length)
        else:
            write_json(self._facts_file, facts)  # first: there is never a table without what it comes from
            rows = []
        self._note(rows[1:])
        self._file = self._partial.open("a", encoding="utf-8", newline="")
        if not rows:
            self._write([columns])

    def __enter__(self) -> "AnswerTable":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        if not self.finished:  # as if it had never been begun
            self._partial.unlink(missing_ok=True)
            self._facts_file.unlink(missing_ok=True)

    def add(self, rows: list[list[str]]) -> None:
        """Writes rows; they are kept whatever happens next."""
        self._write(rows)
        self._note(rows)

    def take_parts(self) -> None:
        """
        Moves the rows that other processes have written, now or before they were interrupted, into this table.

        Raises:
            `ValueError`: they come from something else.
        """
        for part in sorted(self._output.parent.glob(f"{escape(self._output.name)}.*.partial")):
            number = part.name.removeprefix(f"{self._output.name}.").removesuffix(".partial")
            if number.isdigit():
                with AnswerTable(part_of(self._output, int(number)), self._columns, self._facts) as table:
                    self.add([row for row in whole_rows(part)[0][1:] if row[0] not in self.finished])
                    table.finished = set()  # they are in this table now

    def sort(self, files: list[str]) -> None:
        """Puts the rows into the order of the first column's entries in `files`."""
        places = {file: place for place, file in enumerate(files)}
        rows = sorted(whole_rows(self._partial)[0][1:], key=lambda row: places[row[0]])
        sorted_file = self._partial.with_name(self._partial.name + ".sorted")
        with sorted_file.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([self._columns, *rows])
        self._file.close()
        os.replace(sorted_file, self._partial)

    def finish(self, convert: Callable[[Path, Path], None] | None = None) -> None:
        """
        Puts the table into its place.

        Args:
            convert (*optional*): makes another kind of table of this file, which is CSV, and writes it into a second.

        Raises:
            `OSError`: a file has been put there in the meantime.
        """
        self._file.close()
        check_place(self._output)
        if convert is not None:
            finished = self._partial.with_name(self._partial.name + ".finished")
            convert(self._partial, finished)
            os.replace(finished, self._output)
            self._partial.unlink()
        else:
            os.replace(self._partial, self._output)
        self._facts_file.unlink()

    def _write(self, rows: list[list[str]]) -> None:
        csv.writer(self._file).writerows(rows)
        self._file.flush()

    def _note(self, rows: list[list[str]]) -> None:
        self.finished.update(row[0] for row in rows)
        self.labels.update(row[1] for row in rows)

    def _check_facts(self, facts: dict[str, Any]) -> None:
        try:
            begun = read_json(self._facts_file)
        except (FileNotFoundError, ValueError):
            begun = {}
        what = f"{self._partial} holds the answers of an interrupted run"
        check_same_facts(begun, facts, what, "Remove it, or give another --output_file.")


def as_text(features: np.ndarray) -> str:
    """Features of an image, (width,), as a table holds them until it is parquet."""
    return b64encode(features.astype("<f4").tobytes()).decode()


def whole_rows(file: Path) -> tuple[list[list[str]], int]:
    """The rows that were written to their end, and how many bytes they take."""
    content = file.read_bytes()
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line in content.splitlines(keepends=True):
            read += len(line)
            yield line.decode(errors="replace")  # the last letter may be cut

    rows, length = [], 0
    try:
        for row in csv.reader(lines(), strict=True):
            if not content.endswith(_ROW_END, 0, read):
                break
            rows.append(row)
            length = read
    except csv.Error:  # the last row ends inside quotes
        pass
    return rows, length
