"""The JSON file in which a benchmark keeps what it has measured, so that a run that was cut off goes on."""

import json
from datetime import date
from pathlib import Path
from typing import Any

from ..utils.files import write_json


def open_record(path: Path, facts: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """
    What was measured so far.

    Args:
        path: the JSON file; it needn't exist.
        facts: what must be the same for numbers to be comparable, by name.
        fresh: begin anew, whatever is there.

    Raises:
        `ValueError`: what is there was measured under other facts, or is no benchmark's file.
        `OSError`: `path` can't be written.
    """
    record = {"facts": facts, "commands": [], "roofline": None, "results": {}}
    if path.exists() and not fresh:
        record = read_record(path)
        differing = [name for name in facts if facts[name] != record["facts"].get(name)]
        if differing:
            changes = "; ".join(f"{name} was {record['facts'].get(name)!r}, is {facts[name]!r}" for name in differing)
            raise ValueError(
                f"{path} was measured under other conditions: {changes}. Start over with --fresh, or write to another "
                "file with --name."
            )
    record["date"] = date.today().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def read_record(path: Path) -> dict[str, Any]:
    """A record as it was saved; a `ValueError` where the file is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["facts"], record["results"], record["commands"], record["date"], record["roofline"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} isn't a benchmark's file. Take another --name, or --fresh to replace it.") from error
    return record
