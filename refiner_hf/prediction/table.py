"""The table of answers. It is written to a file beside its place, so that an interrupted run can continue."""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..utils.files import check_writable, read_json, write_json
from ..utils.resuming import check_same_facts


_ROW_END = b"\r\n"  # as the csv module writes it


def partial_file(output: Path) -> Path:
    """Where the rows are until all are there."""
    return output.with_name(output.name + ".partial")


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
        self._output, self._partial = output, partial_file(output)
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
            self._partial.unlink()
            self._facts_file.unlink()

    def add(self, rows: list[list[str]]) -> None:
        """Writes rows; they are kept whatever happens next."""
        self._write(rows)
        self._note(rows)

    def finish(self) -> None:
        """
        Puts the table into its place.

        Raises:
            `OSError`: a file has been put there in the meantime.
        """
        self._file.close()
        check_place(self._output)
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
