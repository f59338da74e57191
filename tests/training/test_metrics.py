import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from refiner_hf.training.metrics import ClassificationMetrics, RankedClassification, rank_labels


LOGITS = torch.tensor([[9, 8, 7, 6, 5, 4, 0], [0, 1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 5, 6, 7.0], [7, 6, 5, 4, 3, 2, 1]])
LABELS = np.array([0, 0, 6, 6])


def test_ranks():
    assert rank_labels(LOGITS, None).tolist()[0] == [0, 1, 2, 3, 4]
    assert rank_labels((LOGITS[:, :5], LOGITS), None).shape == (4, 1)


def test_accuracies_and_confusion_matrix():
    metrics = ClassificationMetrics(7)
    result = metrics(EvalPrediction(rank_labels(LOGITS, None).numpy(), LABELS))
    # Of the labels that are there (0, 2, 6), label 0 has precision and recall 1/2, the others nothing.
    assert result == {"accuracy": 0.25, "top5_accuracy": 0.5, "f1_macro": 0.5 / 3}
    counts = np.zeros((7, 7), int)
    counts[0, 0] = counts[0, 6] = counts[6, 2] = counts[6, 0] = 1
    assert metrics.confusion_matrix == counts.tolist()
    again = metrics(EvalPrediction(np.array([[0, 1, 2, 3, 4]]), np.array([1])))
    assert again == {"accuracy": 0.0, "top5_accuracy": 1.0, "f1_macro": 0.0}


def test_up_to_five_labels_have_no_top5():
    result = ClassificationMetrics(5)(EvalPrediction(np.array([[1], [2]]), np.array([1, 1])))
    assert result == {"accuracy": 0.5, "f1_macro": pytest.approx(1 / 3)}


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
