"""What a confusion matrix says of each label, and of pairs of them."""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import precision_recall_fscore_support


class LabelScores(NamedTuple):
    """
    A label: its `images`; `precision`, the share of the images given this label that have it; `recall`, the share of
    its images that were given it; `f1`, their harmonic mean. Where nothing can be divided, 0.
    """

    images: int
    precision: float
    recall: float
    f1: float


def scores_by_label(counts: list[list[int]]) -> list[LabelScores]:
    """
    Args:
        counts: (labels, labels), true ones down and predicted ones across.
    """
    truth, predicted = np.indices(np.shape(counts)).reshape(2, -1)
    columns = precision_recall_fscore_support(
        truth, predicted, labels=range(len(counts)), sample_weight=np.ravel(counts), zero_division=0
    )
    return [LabelScores(round(n), float(p), float(r), float(f)) for p, r, f, n in zip(*columns)]


def most_confused(counts: list[list[int]], number: int = 5) -> list[tuple[int, int, int]]:
    """The pairs (true label, predicted label, how often) that are most often confused, the most often first."""
    wrong = [(i, j, n) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    return sorted(wrong, key=lambda pair: -pair[2])[:number]
