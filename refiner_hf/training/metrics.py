"""Accuracy, F1 and the confusion matrix, as a metric of `evaluate`."""

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from transformers import EvalPrediction


class RankedClassification(evaluate.Metric):
    """
    Accuracy, top-5 accuracy where five or more ranks are given, the mean F1 of the labels that there are ("f1_macro"),
    and the confusion matrix.

    `predictions` are the labels in falling order of score, (images, ranks); `references` the true labels. A class, and
    not a name for `evaluate.load`, which would fetch a script from the Hub: it works without a network.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int32")), "references": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            features=datasets.Features(features),
            inputs_description="",
        )

    def _compute(self, predictions, references, num_labels: int) -> dict[str, float | list[list[int]]]:
        ranked, references = np.asarray(predictions), np.asarray(references)
        result = {"accuracy": float(accuracy_score(references, ranked[:, 0]))}
        if ranked.shape[1] >= 5:
            result["top5_accuracy"] = float((ranked[:, :5] == references[:, None]).any(axis=1).mean())
        result["f1_macro"] = float(f1_score(references, ranked[:, 0], average="macro", zero_division=0))
        counts = confusion_matrix(references, ranked[:, 0], labels=list(range(num_labels)))
        return {**result, "confusion_matrix": counts.tolist()}


class ClassificationMetrics:
    """
    `compute_metrics` of a Trainer. Beside the numbers it returns, it keeps the last `confusion_matrix`.

    Use together with [`rank_labels`] as `preprocess_logits_for_metrics`.
    """

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        self.confusion_matrix: list[list[int]] | None = None
        self._metric = RankedClassification(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ranked, references = prediction.predictions, prediction.label_ids
        result = self._metric.compute(predictions=ranked, references=references, num_labels=self.num_labels)
        self.confusion_matrix = result.pop("confusion_matrix")
        return result


def rank_labels(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """
    The best labels of each image, best first: five where there are more than five labels, else one. Keeps the
    evaluation of a large set from holding all its logits.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(5 if logits.shape[-1] > 5 else 1, dim=-1).indices
