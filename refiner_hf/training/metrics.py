"""What is measured in an evaluation: of one label an image, of several, and of numbers."""

from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, f1_score, r2_score
from transformers import EvalPrediction

from ..choices_refiner import MULTI_LABEL, REGRESSION


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


class Metrics:
    """
    `compute_metrics` of a Trainer, with `reduce` as its `preprocess_logits_for_metrics`. Of the last evaluation it
    keeps, where images have one label, the `confusion_matrix` and the [`Answers`].
    """

    confusion_matrix: list[list[int]] | None = None
    answers: "Answers | None" = None

    @staticmethod
    def reduce(logits: torch.Tensor | tuple, labels: torch.Tensor) -> Any:
        """What is kept of a batch's logits (images, labels) until the end of an evaluation."""
        return logits[0] if isinstance(logits, tuple) else logits

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The numbers, by name."""
        raise NotImplementedError


class MultiLabelMetrics(Metrics):
    """
    Of images with any number of labels: the mean average precision ("map") over the labels that some image has and
    some has not; F1 at a score of 1/2, over all answers ("f1_micro") and as a mean over labels ("f1_macro"); and the
    share of images whose labels are all right ("accuracy_of_all").
    """

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, truth = np.asarray(prediction.predictions), np.asarray(prediction.label_ids) > 0.5
        measurable = truth.any(0) & ~truth.all(0)
        given = logits > 0  # a score above 1/2
        result = {
            "f1_micro": float(f1_score(truth, given, average="micro", zero_division=0)),
            "f1_macro": float(f1_score(truth, given, average="macro", zero_division=0)),
            "accuracy_of_all": float((truth == given).all(1).mean()),
        }
        if measurable.any():
            result["map"] = float(
                average_precision_score(truth[:, measurable], logits[:, measurable], average="macro")
            )
        return result


class RegressionMetrics(Metrics):
    """Of numbers: the mean absolute error ("mae"), the root of the mean squared one ("rmse"), and R squared ("r2")."""

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        given, truth = np.ravel(prediction.predictions), np.ravel(prediction.label_ids)
        result = {
            "mae": float(np.abs(given - truth).mean()),
            "rmse": float(np.sqrt(np.square(given - truth).mean())),
        }
        if len(truth) > 1:
            result["r2"] = float(r2_score(truth, given))
        return result


def metrics_for(problem_type: str, num_labels: int) -> Metrics:
    """The metrics of a kind of problem, named as in a configuration."""
    if problem_type == MULTI_LABEL:
        return MultiLabelMetrics()
    return RegressionMetrics() if problem_type == REGRESSION else ClassificationMetrics(num_labels)


class ClassificationMetrics(Metrics):
    """Of images with one label: as [`RankedClassification`], and the expected calibration error."""

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        self._metric = RankedClassification(keep_in_memory=True)

    @staticmethod
    def reduce(logits: torch.Tensor | tuple, labels: torch.Tensor) -> Any:
        return rank_labels(logits, labels)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        (ranked, scores), references = prediction.predictions, prediction.label_ids
        self.answers = Answers(references, ranked[:, 0], scores)
        result = self._metric.compute(predictions=ranked, references=references, num_labels=self.num_labels)
        self.confusion_matrix = result.pop("confusion_matrix")
        return {**result, "calibration_error": calibration_error(self.answers)}


class Answers(NamedTuple):
    """Of each image, in the order of the data: its true label, the one that it was given, and that one's score."""

    labels: np.ndarray
    given: np.ndarray
    scores: np.ndarray

    def worst(self, number: int) -> list[int]:
        """Which images were given a wrong label with the highest scores, the highest first."""
        wrong = np.flatnonzero(self.labels != self.given)
        return wrong[np.argsort(-self.scores[wrong], kind="stable")][:number].tolist()


def calibration_error(answers: Answers, bins: int = 15) -> float:
    """
    Expected calibration error (Guo et al., 2017, arXiv 1706.04599): how far the scores of the labels that are given
    are from the share that is right, on average, with images of similar scores taken together. From 0 to 1.
    """
    right = answers.labels == answers.given
    numbers = np.minimum((answers.scores * bins).astype(int), bins - 1)
    gaps = [abs((right - answers.scores)[numbers == number].sum()) for number in range(bins)]
    return float(sum(gaps) / len(right))


def rank_labels(logits: torch.Tensor | tuple, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best labels of each image, best first: five where there are more than five labels, else one; and the
    probability of the best. Keeps the evaluation of a large set from holding all its logits.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    ranked = logits.topk(5 if logits.shape[-1] > 5 else 1, dim=-1).indices
    return ranked, logits.float().softmax(-1).amax(-1)
