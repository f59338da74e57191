"""A sample of examples of any kind: pictures, or texts."""

from typing import Any

from .image_sample import decoded, load_images
from .text_sample import has_texts, load_texts


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
    if has_texts(data):
        return list(load_texts(data, _EXAMPLES)[1])
    return [{"image": picture} for picture in decoded(load_images(data, _EXAMPLES)[1])]
