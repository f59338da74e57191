"""A sample of texts without their labels."""

import random
from pathlib import Path

from datasets import Image, Value, load_dataset


Text = dict[str, str]  # `text`, and of a pair `text_pair`, as tokenizers name them

_LOOKED_AT = 1000  # texts of a dataset of the Hub from which a sample is taken
# What columns of texts, and of the second of a pair, are usually named. Others may hold names or numbers of rows.
_FIRST = ("text", "sentence", "sentence1", "premise", "question", "question1", "content", "tweet", "review", "title")
_SECOND = ("text_pair", "sentence2", "hypothesis", "question2", "context", "passage")


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
        data (`str`): a .txt file with an example in each line, or the Hub name of a dataset with a column of texts,
            or two for pairs, of which little is read.
        count (`int`): at most so many, picked at random.
        seed (`int`, *optional*, defaults to 0): decides which.

    Returns:
        what to call the data (with the columns), and the texts, none of them empty.

    Raises:
        `ValueError`, `OSError`: there is no such data, or no text in it; or it isn't clear which column has the texts.
    """
    if Path(data).is_file():
        texts = [{"text": line} for line in _lines(Path(data))]
        return Path(data).name, random.Random(seed).sample(texts, min(count, len(texts)))
    splits = load_dataset(data, streaming=True)
    split = "train" if "train" in splits else next(iter(splits))
    columns = _columns(data, [name for name, kind in splits[split].features.items() if kind == Value("string")])
    rows = splits[split].filter(lambda row: all((row[column] or "").strip() for column in columns.values()))
    rows = list(rows.shuffle(seed=seed, buffer_size=_LOOKED_AT).take(count))
    if not rows:
        raise ValueError(f"{data} has no rows with texts in {' and '.join(columns.values())}.")
    name = f"{data} ({split}, {' and '.join(columns.values())})"
    return name, [{name: row[column] for name, column in columns.items()} for row in rows]


def _lines(file: Path) -> list[str]:
    if file.suffix != ".txt":
        raise ValueError(f"{file} isn't a .txt file, with a text in each line.")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't text in UTF-8: {error}.") from error
    if not any(lines):
        raise ValueError(f"{file} has no lines of text.")
    return [line for line in lines if line]


def _columns(data: str, strings: list[str]) -> dict[str, str]:
    """The column of the text, and that of a pair's second, by how tokenizers name them."""
    known = {
        name: next((column for column in usual if column in strings), None)
        for name, usual in (("text", _FIRST), ("text_pair", _SECOND))
    }
    found = {name: column for name, column in known.items() if column is not None}
    if "text" in found:
        return found
    if len(strings) != 1:
        raise ValueError(
            f"Which column of {data} has the texts? Of {', '.join(strings)} none has a usual name, such as text or "
            "sentence. Write the texts into a .txt file, one in each line."
        )
    return {"text": strings[0]}
