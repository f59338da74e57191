"""
Accuracy and the confusion matrix as `evaluate` metrics.

They are classes, not names for `evaluate.load`, which would fetch scripts from the Hub: these work off line too.
"""

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from transformers import EvalPrediction


class RankedAccuracy(evaluate.Metric):
    """
    Top-1 accuracy, and top-5 where five or more ranks are given.

    `predictions` are the labels in falling order of score, (images, ranks); `references` the true labels.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int32")), "references": datasets.Value("int32")}
        return _metric_info(self, features)

    def _compute(self, predictions, references) -> dict[str, float]:
        ranked, references = np.asarray(predictions), np.asarray(references)
        result = {"accuracy": float(accuracy_score(references, ranked[:, 0]))}
        if ranked.shape[1] >= 5:
            result["top5_accuracy"] = float((ranked[:, :5] == references[:, None]).any(axis=1).mean())
        return result


class ConfusionMatrix(evaluate.Metric):
    """Counts of (true label, predicted label): `{"confusion_matrix": (labels, labels) list}`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
        return _metric_info(self, features)

    def _compute(self, predictions, references, num_labels: int) -> dict[str, list[list[int]]]:
        counts = confusion_matrix(references, predictions, labels=list(range(num_labels)))
        return {"confusion_matrix": counts.tolist()}


class ClassificationMetrics:
    """
    `compute_metrics` of a Trainer. Beside the numbers it returns, it keeps the last `confusion_matrix`.

    Use together with [`rank_labels`] as `preprocess_logits_for_metrics`.
    """

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        self.confusion_matrix: list[list[int]] | None = None
        self._accuracy = RankedAccuracy(keep_in_memory=True)
        self._confusion = ConfusionMatrix(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ranked, references = prediction.predictions, prediction.label_ids
        counts = self._confusion.compute(predictions=ranked[:, 0], references=references, num_labels=self.num_labels)
        self.confusion_matrix = counts["confusion_matrix"]
        return self._accuracy.compute(predictions=ranked, references=references)


def rank_labels(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """
    The best labels of each image, best first: five where there are more than five labels, else one. Keeps the
    evaluation of a large set from holding all its logits.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(5 if logits.shape[-1] > 5 else 1, dim=-1).indices


def _metric_info(metric: evaluate.Metric, features: dict) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=type(metric).__doc__, citation="", features=datasets.Features(features), inputs_description=""
    )
