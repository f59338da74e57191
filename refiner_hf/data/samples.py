"""A sample of examples of any kind: pictures, or texts."""

from pathlib import Path
from typing import Any

from datasets import Image, Value, load_dataset

from .image_sample import decoded, load_images


_EXAMPLES = 256


def load_sample(data: str) -> list[dict[str, Any]]:
    """
    Args:
        data (`str`): a folder of pictures, a text file with an example in each line, or the Hub name of a dataset of
            pictures or texts, of which little is read.

    Returns:
        rows with a picture, or with texts, at most a few hundred.

    Raises:
        `ValueError`, `OSError`: there is no such data, or nothing in it.
    """
    path = Path(data)
    if path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        rows: list[dict[str, Any]] = [{"text": line} for line in lines if line]
        if not rows:
            raise ValueError(f"{data} has no lines of text.")
        step = max(1, len(rows) // _EXAMPLES)
        return rows[::step][:_EXAMPLES]
    if not path.exists() and _has_texts(data):
        splits = load_dataset(data, streaming=True)
        return list(splits["train" if "train" in splits else next(iter(splits))].take(_EXAMPLES))
    return [{"image": picture} for picture in decoded(load_images(data, _EXAMPLES)[1])]


def _has_texts(name: str) -> bool:
    """Whether a dataset of the Hub has texts and no pictures; its own errors come when it is loaded as pictures."""
    try:
        features = next(iter(load_dataset(name, streaming=True).values())).features or {}
    except Exception:
        return False
    kinds = list(features.values())
    return not any(isinstance(kind, Image) for kind in kinds) and any(kind == Value("string") for kind in kinds)
