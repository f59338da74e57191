"""JSON files that will be published."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`, readably."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_paths(content: Any) -> Any:
    """The same with every path of this machine cut down to its last name: the folder will be published."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and Path(content).name != content and Path(content).exists():
        return Path(content).resolve().name
    return content
