"""What the choice of a training's options needs to know of its images."""

from dataclasses import dataclass

import numpy as np

from ..data.columns import IMAGE_COLUMN, LABEL_COLUMN
from ..data.images import EncodedImage, UnreadableImageError
from ..data.labels import count_labels
from ..data.rows import Rows


_LOOKED_AT = 200  # images, spread over all, whose size and colours are looked at
_THUMBNAIL = 32  # pixels on a side, enough to see colours


@dataclass(frozen=True)
class Facts:
    """
    Of the training images: how many `images` and `labels` there are; how many images the label with the fewest and
    the one with the most has (`fewest`, `most`); the median `height` and `width` in pixels; whether they are `grey`.
    And how many images each evaluation goes through: those that are `evaluated`, and the training images
    `for_statistics` of the norms.
    """

    images: int
    labels: int
    fewest: int
    most: int
    height: int
    width: int
    grey: bool
    evaluated: int
    for_statistics: int


def look(train: Rows, labels: list[str], *, evaluated: int, for_statistics: int) -> Facts:
    """
    Looks at training images.

    Args:
        train: encoded images, stored on this machine.
        labels (`list[str]`): names of all labels.
        evaluated (`int`), for_statistics (`int`): numbers of images, as in [`Facts`].

    Raises:
        `ValueError`: no image can be read.
    """
    given = train.labels(LABEL_COLUMN)
    images, counts = len(given), _counts(given)
    sizes, grey = [], True
    for row in train.spread(_LOOKED_AT):
        try:
            image = EncodedImage(row[IMAGE_COLUMN])
            thumbnail = np.asarray(image.decode(at_least=(_THUMBNAIL, _THUMBNAIL)).resize((_THUMBNAIL, _THUMBNAIL)))
        except UnreadableImageError:
            continue  # the training lists all of them
        sizes.append(image.size)
        grey &= bool((thumbnail == thumbnail[..., :1]).all())
    if not sizes:
        raise ValueError(f"None of {_LOOKED_AT} images that were looked at can be read.")
    width, height = np.median(sizes, 0)
    return Facts(
        images=images,
        labels=len(labels),
        fewest=min(counts),
        most=max(counts),
        height=round(height),
        width=round(width),
        grey=grey,
        evaluated=evaluated,
        for_statistics=min(for_statistics, images),
    )


def _counts(labels: list) -> list[int]:
    """How many images each label has; of numbers, all."""
    if isinstance(labels[0], float):
        return [len(labels)]
    return list(count_labels(labels).values())
