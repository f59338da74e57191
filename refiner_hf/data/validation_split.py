"""
Images held out of the training set, to evaluate on, where there is no validation set.

Each picture is decided by itself, from what is in its file and the run's seed: whatever is added or taken away, none
that was trained on is ever evaluated on, and copies of a picture are on one side.
"""

from hashlib import blake2b

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..utils.text import name_some
from .columns import CONTENT_COLUMN, LABEL_COLUMN
from .content_hashes import content_hashes, numbers_in, with_content_hashes


logger = logging.get_logger(__name__)


def hold_out(train: Dataset, share: float, seed: int, *, need_train: bool = True) -> tuple[Dataset, Dataset]:
    """
    Args:
        train: encoded rows with checked labels.
        share (`float`): about so much of them is held out.
        seed (`int`): another one holds out others.
        need_train (`bool`, *optional*, defaults to `True`): whether what is left must do for a training.

    Returns:
        what is left, and what is held out.

    Raises:
        `ValueError`: nothing is held out; or nothing is left, of all images or of a label's.
    """
    if CONTENT_COLUMN not in train.column_names:
        train = with_content_hashes(train, "training")
    held = np.array([_place(content, seed) < share for content in content_hashes(train, "training").tolist()], bool)
    if not held.any():
        raise ValueError(
            f"None of the {len(train)} images is held out at --train_val_split {share:g}: each is decided by itself, "
            "by its content. Raise --train_val_split, give --validation_dir, or add pictures."
        )
    if need_train:
        _check_labels(train, held, share)
    return train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))


def _place(content: int, seed: int) -> float:
    """A picture's own place in [0, 1)."""
    number = blake2b(
        content.to_bytes(8, "big", signed=True), digest_size=8, salt=seed.to_bytes(8, "big", signed=True)
    ).digest()
    return int.from_bytes(number, "big") / 2**64


def _check_labels(train: Dataset, held: np.ndarray, share: float) -> None:
    names = train.features[LABEL_COLUMN].names
    labels = numbers_in(train, LABEL_COLUMN)
    left = np.bincount(labels[~held], minlength=len(names))
    measured = np.bincount(labels[held], minlength=len(names))
    if len(unlearned := np.flatnonzero((left == 0) & (measured > 0))):
        raise ValueError(
            f"All images of {_named(names, unlearned)} are held out at --train_val_split {share:g}, so that nothing "
            "could be learned of them: each image is decided by itself, by its content. Add pictures of them, lower "
            "--train_val_split, give --validation_dir, or try another --seed."
        )
    if len(unmeasured := np.flatnonzero((left > 0) & (measured == 0))):
        logger.warning(f"No image of {_named(names, unmeasured)} is held out: nothing will be measured of them.")


def _named(names: list[str], which: np.ndarray) -> str:
    return name_some([names[i] for i in which])
