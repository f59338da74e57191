"""What a confusion matrix says."""

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from refiner_hf.utils.confusions import most_confused, scores_by_label


def test_scores_by_label():
    """As of the images one by one; a label without images, and one that is never given, have zeros."""
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 4, 200), random.choice([0, 1, 2, 4], 200)
    counts = np.zeros((5, 5), int)
    np.add.at(counts, (truth, predicted), 1)
    expected = precision_recall_fscore_support(truth, predicted, labels=range(5), zero_division=0)
    found = scores_by_label(counts.tolist())
    for name, values in zip(("precision", "recall", "f1", "images"), expected):
        np.testing.assert_allclose([getattr(label, name) for label in found], values)
    assert found[4].images == 0 and found[4].recall == found[3].precision == 0 < found[0].f1


def test_most_confused():
    counts = [[5, 2, 0], [3, 9, 1], [0, 0, 4]]
    assert most_confused(counts) == [(1, 0, 3), (0, 1, 2), (1, 2, 1)]
    assert most_confused(counts, 1) == [(1, 0, 3)] and most_confused([[3, 0], [0, 2]]) == []
