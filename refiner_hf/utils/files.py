"""JSON files, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`, readably, and whole or not at all."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(to_json(content), encoding="utf-8")
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def to_json(content: dict[str, Any]) -> str:
    """`content` as readable JSON."""
    return json.dumps(content, indent=2) + "\n"
