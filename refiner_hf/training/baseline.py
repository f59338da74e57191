"""What a linear model reaches on the same split: the least that a network should be worth."""

import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data.columns import IMAGE_COLUMN, LABEL_COLUMN
from ..data.images import EncodedImage
from ..data.rows import Rows
from ..data.sources import ImageData


SIDE = 16  # of the thumbnails, in pixels; smaller where the images are
_MOST_IMAGES, _MOST_LABELS = 5000, 100  # so that it takes seconds


@dataclass
class Baseline:
    """
    The accuracy of logistic regression on thumbnails of `side` pixels, trained on `trained_on` images and measured on
    `measured_on`: all of them, or as many at random as take some seconds.
    """

    accuracy: float
    side: int
    trained_on: int
    measured_on: int

    def __str__(self) -> str:
        return f"logistic regression on thumbnails of {self.side} x {self.side} pixels"


def linear_baseline(data: ImageData, seed: int) -> Baseline | None:
    """
    Logistic regression on thumbnails of 16 x 16 pixels or less, in colours where the training images have any.

    Args:
        data: as a network was trained and evaluated on.
        seed (`int`): decides which images, where there are more than 5,000 on a side.

    Returns:
        [`Baseline`], or `None` for a stream, for more than 100 labels, where a side has no images, and where the
        training images have only one label.
    """
    sides = (data.train, data.evaluation)
    if len(data.labels) > _MOST_LABELS or any(rows is None or not rows.count for rows in sides):
        return None
    side = min(SIDE, _usual_side(data.train))
    (thumbnails, labels), (others, truth) = (_thumbnails(rows, side, seed) for rows in sides if rows is not None)
    if len(set(labels)) < 2:
        return None
    if (thumbnails == thumbnails[..., :1]).all():  # grey
        thumbnails, others = thumbnails[..., 0], others.mean(-1)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is as good as it gets in a few seconds
        model.fit(thumbnails.reshape(len(thumbnails), -1), labels)
    accuracy = model.score(others.reshape(len(others), -1), truth)
    return Baseline(float(accuracy), side, len(labels), len(truth))


def _usual_side(rows: Rows | None) -> int:
    """The shorter side of a usual image: enlarging would add nothing."""
    assert rows is not None
    return int(np.median([min(EncodedImage(row[IMAGE_COLUMN]).size) for row in rows.spread(99)]))


def _thumbnails(rows: Rows, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, side, side, 3) in 0..255, and their labels."""
    thumbnails, labels = [], []
    for row in rows.sample(_MOST_IMAGES, seed):
        image = EncodedImage(row[IMAGE_COLUMN]).decode(at_least=(2 * side, 2 * side))
        thumbnails.append(np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32))
        labels.append(row[LABEL_COLUMN])
    return np.stack(thumbnails), np.array(labels)
