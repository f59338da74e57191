"""JSON files, written whole or not at all, and folders that can be written."""

import json
import os
from pathlib import Path
from tempfile import TemporaryFile
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


def read_json(path: Path) -> dict[str, Any]:
    """
    The JSON object in a file.

    Raises:
        `ValueError`: the file is damaged, or holds something else.
        `OSError`: it can't be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object.")
    return content


def check_writable(folder: Path, name: str, advice: str) -> None:
    """
    Makes a folder where it isn't there, and a file in it for a moment.

    Args:
        folder (`Path`): to be written to.
        name (`str`): what an error calls the folder, such as "The output folder".
        advice (`str`): what to do about it, a sentence.

    Raises:
        `OSError`: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{name} {folder} can't be written: {error}. {advice}") from error
