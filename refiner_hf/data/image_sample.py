"""A sample of images without their labels, for analyses."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

from ..utils.image_files import images_in
from .columns import IMAGE_COLUMN
from .images import decode_image
from .rows import Rows, StoredRows, StreamedRows
from .sources import EVALUATION_SPLITS, check_cache, has_tables, read_files


def load_images(data: str | None, count: int, seed: int = 0) -> tuple[str, Dataset | list[dict[str, Any]]]:
    """
    Some images, still encoded.

    Args:
        data (`str`, *optional*): a folder of images, in subfolders or not, or of parquet files; the Hub name of a
            dataset, of which little more than a thousand images are read. Default: scikit-learn's test digits.
        count (`int`): at most so many, picked at random.
        seed (`int`, *optional*, defaults to 0): decides which.

    Returns:
        what to call the data, and rows with the one column `image`.

    Raises:
        `ValueError`, `OSError`: there is no such data, or no column of images in it.
    """
    rows: Rows
    if data is None:
        from .digits import NAME, digits_splits

        name, rows = NAME, StoredRows(digits_splits()[1])
    elif Path(data).is_dir():
        name, rows = Path(data).resolve().name, StoredRows(_load_folder(Path(data)))
    elif Path(data).exists() or data.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {data}.")
    else:
        check_cache()
        splits = load_dataset(data, streaming=True)
        split = next((split for split in EVALUATION_SPLITS if split in splits), next(iter(splits)))
        name, rows = f"{os.path.basename(data)} ({split})", StreamedRows(splits[split])
    if rows.features is None:
        raise ValueError(f"{name} doesn't say what its columns hold.")
    columns = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if len(columns) != 1:
        raise ValueError(
            f"{name} must have one column of images; it has {columns or 'none'} among {sorted(rows.features)}."
        )
    column = columns[0]
    rows = rows.changed(lambda data: data.cast_column(column, Image(decode=False)).select_columns([column]))
    if column != IMAGE_COLUMN:
        rows = rows.changed(lambda data: data.rename_column(column, IMAGE_COLUMN))
    return name, rows.sample(count, seed).read()


def decoded(rows: Iterable[dict[str, Any]]) -> Iterator[PILImage.Image]:
    """
    The images, upright and RGB, one after the other.

    Raises:
        [`~refiner_hf.data.images.UnreadableImageError`]: one is damaged; the message names it.
    """
    for row in rows:
        yield decode_image(row[IMAGE_COLUMN])


def _load_folder(folder: Path) -> Dataset:
    if not has_tables(folder) and next(images_in(folder), None) is None:
        raise ValueError(f"There are no images in {folder}.")
    return read_files(folder, drop_labels=True)
