import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from refiner_hf.training.metrics import (
    Answers,
    ClassificationMetrics,
    RankedClassification,
    calibration_error,
    rank_labels,
)


LOGITS = torch.tensor([[9, 8, 7, 6, 5, 4, 0], [0, 1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6, 7.0], [7, 6, 5, 4, 3, 2, 1]])
LABELS = np.array([0, 0, 6, 6])


def test_ranks():
    ranked, scores = rank_labels(LOGITS, None)
    assert ranked.tolist()[0] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(scores, LOGITS.softmax(-1).max(-1).values)
    ranked, scores = rank_labels((LOGITS[:, :5], LOGITS), None)
    assert ranked.shape == (4, 1) and scores.shape == (4,)


def arrays(logits) -> tuple[np.ndarray, ...]:
    return tuple(each.numpy() for each in rank_labels(logits, None))


def test_accuracies_and_confusion_matrix():
    metrics = ClassificationMetrics(7)
    result = metrics(EvalPrediction(arrays(LOGITS), LABELS))
    # Three are wrong, with scores of 0.63 to 0.64, and so is the right one's score: all in one bin.
    error = abs(LOGITS.softmax(-1).max(-1).values.mean().item() - 0.25)
    assert result.pop("calibration_error") == pytest.approx(error, abs=1e-6)
    # Of the labels that are there (0, 2, 6), label 0 has precision and recall 1/2, the others nothing.
    assert result == {"accuracy": 0.25, "top5_accuracy": 0.5, "f1_macro": 0.5 / 3}
    counts = np.zeros((7, 7), int)
    counts[0, 0] = counts[0, 6] = counts[6, 2] = counts[6, 0] = 1
    assert metrics.confusion_matrix == counts.tolist()
    again = metrics(EvalPrediction((np.array([[0, 1, 2, 3, 4]]), np.array([0.9])), np.array([1])))
    assert again == {
        "accuracy": 0.0, "top5_accuracy": 1.0, "f1_macro": 0.0, "calibration_error": pytest.approx(0.9),
    }  # fmt: skip
    assert metrics.answers.worst(3) == [0]


def test_calibration_error_and_worst_mistakes():
    """A bin counts by its images, and within it over- and underrated ones make up for each other."""
    answers = Answers(
        labels=np.array([0, 0, 1, 1, 2]), given=np.array([0, 1, 1, 0, 1]), scores=np.array([1, 0.98, 0.4, 0.4, 0.5])
    )
    assert calibration_error(answers) == pytest.approx((0.98 + 0.2 + 0.5) / 5)
    assert answers.worst(2) == [1, 4] and answers.worst(9) == [1, 4, 3]


def test_up_to_five_labels_have_no_top5():
    scores = np.array([0.5, 0.5])
    result = ClassificationMetrics(5)(EvalPrediction((np.array([[1], [2]]), scores), np.array([1, 1])))
    assert result == {"accuracy": 0.5, "f1_macro": pytest.approx(1 / 3), "calibration_error": 0.0}


def test_batches_add_up_and_need_no_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    metric = RankedClassification(keep_in_memory=True)
    metric.add_batch(predictions=[[0, 1, 2, 3, 4]], references=[0])
    metric.add_batch(predictions=[[5, 1, 2, 3, 4]], references=[4])
    result = metric.compute(num_labels=6)
    assert (result["accuracy"], result["top5_accuracy"]) == (0.5, 1.0)
    assert result["confusion_matrix"][4][5] == result["confusion_matrix"][0][0] == 1
