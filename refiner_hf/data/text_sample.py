"""A sample of texts without their labels."""

import random
from pathlib import Path

from datasets import Image, Value, load_dataset


Text = dict[str, str]  # `text`, and of a pair `text_pair`, as tokenizers name them

_LOOKED_AT = 1000  # texts of a dataset of the Hub from which a sample is taken


def has_texts(data: str) -> bool:
    """
    Whether this is a text file, or the Hub name of a dataset that has texts and no pictures. Where it isn't anything,
    there is an error when it is loaded as pictures.
    """
    if Path(data).exists() or data.startswith((".", "/", "~")):
        return Path(data).is_file()
    try:
        features = next(iter(load_dataset(data, streaming=True).values())).features or {}
    except Exception:
        return False
    kinds = list(features.values())
    return not any(isinstance(kind, Image) for kind in kinds) and any(kind == Value("string") for kind in kinds)


def load_texts(data: str, count: int, seed: int = 0) -> tuple[str, list[Text]]:
    """
    Args:
        data (`str`): a text file with an example in each line, or the Hub name of a dataset with one column of texts
            or two, of which little is read.
        count (`int`): at most so many, picked at random.
        seed (`int`, *optional*, defaults to 0): decides which.

    Returns:
        what to call the data, and the texts.

    Raises:
        `ValueError`, `OSError`: there is no such data, or no text in it.
    """
    if Path(data).is_file():
        lines = [line.strip() for line in Path(data).read_text(encoding="utf-8").splitlines()]
        texts = [{"text": line} for line in lines if line]
        if not texts:
            raise ValueError(f"{data} has no lines of text.")
        return Path(data).name, random.Random(seed).sample(texts, min(count, len(texts)))
    splits = load_dataset(data, streaming=True)
    split = "train" if "train" in splits else next(iter(splits))
    rows = list(splits[split].shuffle(seed=seed, buffer_size=_LOOKED_AT).take(count))
    columns = [name for name, kind in splits[split].features.items() if kind == Value("string")]
    if len(columns) > 2:
        raise ValueError(f"{data} has {len(columns)} columns of texts ({', '.join(columns)}), not one or a pair.")
    return f"{data} ({split})", [dict(zip(("text", "text_pair"), (row[name] for name in columns))) for row in rows]
