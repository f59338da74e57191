"""The pictures of a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

from ..utils.plotting import literal_text
from .captions import MOST_NAMED_LABELS


@literal_text
def plot_learning_curve(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """
    Losses and accuracy over the epochs.

    Args:
        log_history: the Trainer's `state.log_history`.
        path: the PNG to write.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, curves in (
        (left, {"loss": "training", "eval_loss": "evaluation"}),
        (right, {"eval_accuracy": "top-1", "eval_top5_accuracy": "top-5"}),
    ):
        for key, label in curves.items():
            points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry and "epoch" in entry]
            if points:
                epochs, values = np.array(points).T
                axis.plot(
                    epochs, values * (100 if axis is right else 1), marker="." if len(points) < 40 else "", label=label
                )
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    left.set_title("loss")
    right.set_title("evaluation accuracy, %")
    figure.savefig(path, dpi=110)


@literal_text
def plot_confusion_matrix(counts: list[list[int]], labels: list[str], path: str | Path) -> None:
    """
    The confusion matrix, true labels down and predictions across; with names where they can be read.

    Args:
        counts: (labels, labels).
        labels: the labels' names.
        path: the PNG to write.
    """
    named = len(labels) <= MOST_NAMED_LABELS
    side = max(4.5, 0.38 * len(labels) + 1.5) if named else 8
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    display = ConfusionMatrixDisplay(np.asarray(counts), display_labels=labels if named else None)
    display.plot(ax=axis, cmap="Blues", include_values=named, xticks_rotation="vertical" if named else "horizontal")
    if not named:
        axis.set(xticks=[], yticks=[], xlabel="predicted label (by number)", ylabel="true label (by number)")
    figure.savefig(path, dpi=110)


@literal_text
def plot_predictions(images: Sequence[Image.Image | np.ndarray], titles: list[str], path: str | Path) -> None:
    """
    A strip of images with a line of text over each.

    Args:
        images: the pictures, or arrays (height, width, 3) of floats from 0 to 1.
        titles: what to write over them.
        path: the PNG to write.
    """
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, image, title in zip(axes, images, titles):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
