"""The JSON file with a benchmark's measurements. An interrupted run continues from it."""

from datetime import date
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_json
from ..utils.resuming import check_same_facts


def open_record(path: Path, facts: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """
    What was measured so far.

    Args:
        path: the JSON file; it needn't exist.
        facts: what must be the same for numbers to be comparable, by name.
        fresh: start again, and replace the file.

    Raises:
        `ValueError`: what is there was measured under other facts, or is no benchmark's file.
        `OSError`: `path` can't be written.
    """
    record: dict[str, Any] = {"facts": facts, "commands": [], "roofline": None, "results": {}}
    if path.exists() and not fresh:
        record = read_record(path)
        advice = "Start again with --fresh, or write to another file with --name."
        check_same_facts(record["facts"], facts, f"{path} holds a benchmark", advice)
    record["date"] = date.today().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def read_record(path: Path) -> dict[str, Any]:
    """A record as it was saved; a `ValueError` where the file is something else."""
    try:
        record = read_json(path)
        record["facts"], record["results"], record["commands"], record["date"], record["roofline"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} isn't a benchmark's file. Take another --name, or --fresh to replace it.") from error
    return record
