"""Images that can't be read, found before a training and not in the middle of it."""

import os
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from ..utils.text import counted
from .columns import IMAGE_COLUMN
from .content_hashes import FEW
from .images import UnreadableImageError, decode_image


_MOST_NAMED = 20  # in an error's message


def find_unreadable(data: Dataset, what: str) -> tuple[Dataset, list[str]]:
    """
    Opens every image once, with a progress bar; `datasets` remembers the answer for the next time.

    Args:
        data (`datasets.Dataset`): encoded rows.
        what (`str`): what the images are, for the progress bar.

    Returns:
        the rows whose image can be read, and for each of the others what is wrong with it.
    """
    reasons = data.map(
        _what_is_wrong,
        input_columns=IMAGE_COLUMN,
        remove_columns=data.column_names,
        features=Features({"reason": Value("string")}),
        num_proc=os.cpu_count() if len(data) > FEW else None,
        desc=f"Opening the {what} images",
    )["reason"]
    reasons = np.asarray(reasons)
    unreadable = reasons != ""
    if not unreadable.any():
        return data, []
    return data.select(np.flatnonzero(~unreadable)), reasons[unreadable].tolist()


def raise_if_unreadable(reasons: list[str]) -> None:
    """
    Raises:
        `ValueError`: there are `reasons`; the message has the first ones.
    """
    if reasons:
        more = f"\nand {len(reasons) - _MOST_NAMED} more" if len(reasons) > _MOST_NAMED else ""
        raise ValueError(
            f"{counted(len(reasons), 'image')} can't be read. Repair or remove what is listed here, or leave it out "
            "with --unreadable_images skip:\n" + "\n".join(reasons[:_MOST_NAMED]) + more
        )


def _what_is_wrong(image: dict[str, Any]) -> dict[str, str]:
    try:
        decode_image(image)
    except UnreadableImageError as error:
        return {"reason": str(error)}
    return {"reason": ""}
