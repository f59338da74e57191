"""What is published says nothing of the paths of this machine."""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def without_paths(content: Any) -> Any:
    """The same with every absolute path, and every path of a file that is here, cut down to its last name."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and _is_path(content):
        return PureWindowsPath(content).name or Path(content).resolve().name
    return content


def _is_path(text: str) -> bool:
    # Windows' rules hold for a Posix path's separators too, the other way round they don't.
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive:
        return True
    try:
        return PureWindowsPath(text).name != text and Path(text).exists()
    except OSError:  # too long for a path
        return False
