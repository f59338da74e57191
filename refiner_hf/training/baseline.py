"""What a linear model reaches on the same split: the least that a network should be worth."""

import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from ..choices_refiner import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ..data.columns import IMAGE_COLUMN, LABEL_COLUMN
from ..data.images import EncodedImage
from ..data.rows import Rows
from ..data.sources import ImageData


SIDE = 16  # of the thumbnails, in pixels; smaller where the images are
_MOST_IMAGES, _MOST_LABELS = 5000, 100  # so that it takes seconds


@dataclass
class Baseline:
    """
    What a linear model on thumbnails of `side` pixels reaches, trained on `trained_on` images and measured on
    `measured_on`: all of them, or as many at random as take some seconds. `value` is what an evaluation calls
    `metric`: the accuracy of logistic regression, its mean average precision ("map") for several labels an image, or
    for numbers the R squared ("r2") of ridge regression.
    """

    metric: str
    value: float
    side: int
    trained_on: int
    measured_on: int

    def __str__(self) -> str:
        kind = "ridge" if self.metric == "r2" else "logistic"
        return f"{kind} regression on thumbnails of {self.side} x {self.side} pixels"


def linear_baseline(data: ImageData, seed: int) -> Baseline | None:
    """
    A linear model on thumbnails of 16 x 16 pixels or less, in colours where the training images have any.

    Args:
        data: as a network was trained and evaluated on.
        seed (`int`): decides which images, where there are more than 5,000 on a side.

    Returns:
        [`Baseline`], or `None` for a stream, for more than 100 labels, where a side has no images, and where there is
        nothing to tell apart.
    """
    sides = (data.train, data.evaluation)
    if len(data.labels) > _MOST_LABELS or any(rows is None or not rows.count for rows in sides):
        return None
    side = min(SIDE, _usual_side(data.train))
    (thumbnails, labels), (others, truth) = (_thumbnails(rows, side, seed) for rows in sides if rows is not None)
    if (thumbnails == thumbnails[..., :1]).all():  # grey
        thumbnails, others = thumbnails[..., 0], others.mean(-1)
    measure, metric = _MEASURES[data.problem_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is as good as it gets in a few seconds
        value = measure(thumbnails.reshape(len(labels), -1), others.reshape(len(truth), -1), labels, truth)
    return None if value is None else Baseline(metric, value, side, len(labels), len(truth))


def _accuracy(train: np.ndarray, test: np.ndarray, labels: list, truth: list) -> float | None:
    if len(set(labels)) < 2:
        return None
    return float(make_pipeline(StandardScaler(), _logistic()).fit(train, labels).score(test, truth))


def _average_precision(train: np.ndarray, test: np.ndarray, labels: list, truth: list) -> float | None:
    """Mean over the labels that some images have and some don't, on both sides."""
    binarizer = MultiLabelBinarizer().fit([*labels, *truth])
    learned, measured = (binarizer.transform(each) for each in (labels, truth))
    kept = np.all([each.any(0) & ~each.all(0) for each in (learned, measured)], axis=0)
    if not kept.any():
        return None
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(_logistic())).fit(train, learned[:, kept])
    scores = model.decision_function(test).reshape(len(test), -1)
    return float(average_precision_score(measured[:, kept], scores, average="macro"))


def _r_squared(train: np.ndarray, test: np.ndarray, labels: list, truth: list) -> float | None:
    if len(truth) < 2:
        return None
    strengths = np.logspace(0, 5, 11)
    return float(make_pipeline(StandardScaler(), RidgeCV(strengths)).fit(train, labels).score(test, truth))


def _logistic() -> LogisticRegression:
    return LogisticRegression(max_iter=200)


_MEASURES = {
    SINGLE_LABEL: (_accuracy, "accuracy"),
    MULTI_LABEL: (_average_precision, "map"),
    REGRESSION: (_r_squared, "r2"),
}


def _usual_side(rows: Rows | None) -> int:
    """The shorter side of a usual image: enlarging would add nothing."""
    assert rows is not None
    return int(np.median([min(EncodedImage(row[IMAGE_COLUMN]).size) for row in rows.spread(99)]))


def _thumbnails(rows: Rows, side: int, seed: int) -> tuple[np.ndarray, list]:
    """(images, side, side, 3) in 0..255, and their labels."""
    thumbnails, labels = [], []
    for row in rows.sample(_MOST_IMAGES, seed):
        image = EncodedImage(row[IMAGE_COLUMN]).decode(at_least=(2 * side, 2 * side))
        thumbnails.append(np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32))
        labels.append(row[LABEL_COLUMN])
    return np.stack(thumbnails), labels
