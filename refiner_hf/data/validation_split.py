"""
Images held out of the training set, to evaluate on, where there is no validation set.

Each picture is decided by itself, from what is in its file and the run's seed: whatever is added or taken away, none
that was trained on is ever evaluated on, and copies of a picture are on one side.
"""

from hashlib import blake2b

import numpy as np
from datasets import Dataset, List, Value
from transformers.utils import logging

from ..utils.text import name_some
from .columns import CONTENT_COLUMN, LABEL_COLUMN
from .content_hashes import content_hashes, numbers_in, with_content_hashes


logger = logging.get_logger(__name__)


def hold_out(
    train: Dataset, part: tuple[float, float], seed: int, *, need_train: bool = True
) -> tuple[Dataset, Dataset]:
    """
    Args:
        train: encoded rows with checked labels.
        part (`tuple[float, float]`): which of them are held out: those whose place in [0, 1), which follows from their
            content, is in it. Parts that don't overlap have no images in common.
        seed (`int`): another one holds out others.
        need_train (`bool`, *optional*, defaults to `True`): whether what is left must do for a training.

    Returns:
        what is left, and what is held out.

    Raises:
        `ValueError`: nothing is held out; or nothing is left, of all images or of a label's.
    """
    if CONTENT_COLUMN not in train.column_names:
        train = with_content_hashes(train, "training")
    places = np.array([_place(content, seed) for content in content_hashes(train, "training").tolist()])
    held = (places >= part[0]) & (places < part[1])
    if not held.any():
        raise ValueError(
            f"None of the {len(train)} images is held out at --train_val_split {part[1] - part[0]:g} (with --k_folds, "
            "one divided by it): each is decided by itself, by its content. Raise that share, give --validation_dir, "
            "or add pictures."
        )
    if need_train:
        _check_labels(train, held, part[1] - part[0])
    return train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))


def _place(content: int, seed: int) -> float:
    """A picture's own place in [0, 1)."""
    number = blake2b(
        content.to_bytes(8, "big", signed=True), digest_size=8, salt=seed.to_bytes(8, "big", signed=True)
    ).digest()
    return int.from_bytes(number, "big") / 2**64


def _check_labels(train: Dataset, held: np.ndarray, share: float) -> None:
    feature = train.features[LABEL_COLUMN]
    if isinstance(feature, Value):  # a number for each image
        if held.all():
            raise ValueError(f"All images are held out at --train_val_split {share:g}. Add pictures, or lower it.")
        return
    if isinstance(feature, List):
        names, lists = feature.feature.names, train[LABEL_COLUMN]
        images = np.repeat(np.arange(len(train)), [len(each) for each in lists])
        labels, held = np.array([label for each in lists for label in each], int), held[images]
    else:
        names, labels = feature.names, numbers_in(train, LABEL_COLUMN)
    left = np.bincount(labels[~held], minlength=len(names))
    measured = np.bincount(labels[held], minlength=len(names))
    if len(unlearned := np.flatnonzero((left == 0) & (measured > 0))):
        raise ValueError(
            f"All images of {_named(names, unlearned)} are held out at --train_val_split {share:g} (with --k_folds, "
            "one divided by it), so that nothing could be learned of them: each image is decided by itself, by its "
            "content. Add pictures of them, lower that share, give --validation_dir, or try another --seed."
        )
    if len(unmeasured := np.flatnonzero((left > 0) & (measured == 0))):
        logger.warning(f"No image of {_named(names, unmeasured)} is held out: nothing will be measured of them.")


def _named(names: list[str], which: np.ndarray) -> str:
    return name_some([names[i] for i in which])
