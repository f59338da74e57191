"""Encoded images to what the model takes, as transforms of a `datasets` dataset."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from transformers.image_processing_utils import BaseImageProcessor

from ..utils.text import counted, name_some
from .augmentation import Augment
from .images import EncodedImage, decode_image
from .label_maps import BOX, FLIPPED, MAP_CLASSES, MAP_SCORES, LabelMaps
from .labels import LabelValues
from .sources import IMAGE_COLUMN, LABEL_COLUMN


_NUMBERS = LabelValues()


class PrepareImages:
    """
    Batches of encoded images and labels to `pixel_values` and `labels`.

    Args:
        to_pixels: a list of RGB images to a list of tensors (channels, height, width).
        label_values ([`LabelValues`], *optional*): what the model takes for a label. Default: its number.
    """

    def __init__(
        self,
        to_pixels: Callable[[list[PILImage.Image]], list[torch.Tensor]],
        label_values: LabelValues = _NUMBERS,
    ):
        self.to_pixels = to_pixels
        self.label_values = label_values

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prepared = {"pixel_values": self.to_pixels([decode_image(image) for image in batch[IMAGE_COLUMN]])}
        if LABEL_COLUMN in batch:
            prepared[LABEL_COLUMN] = [self.label_values(label) for label in batch[LABEL_COLUMN]]
        return prepared


class PrepareTraining:
    """
    An encoded row to what a training step needs: `pixel_values`, which are still levels of 8 bits, and `labels`; with
    label maps also what [`~refiner_hf.training.targets.dense_targets`] takes.

    Args:
        augment ([`Augment`]): an image to a random view of it.
        label_values ([`LabelValues`], *optional*): what the model takes for a label. Default: its number.
        label_maps ([`LabelMaps`], *optional*): what a teacher sees in the images.
    """

    def __init__(
        self,
        augment: Augment,
        label_values: LabelValues = _NUMBERS,
        label_maps: LabelMaps | None = None,
    ):
        self.augment, self.label_values, self.label_maps = augment, label_values, label_maps

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = EncodedImage(row[IMAGE_COLUMN])
        view = self.augment(image)
        prepared = {"pixel_values": view.levels, LABEL_COLUMN: self.label_values(row[LABEL_COLUMN])}
        if self.label_maps is not None:
            label_map = self.label_maps({**row[IMAGE_COLUMN], "bytes": image.content})  # not to read a file twice
            classes = label_map.classes
            if (label_ids := self.label_values.label_ids) is not None:
                if classes.max() >= len(label_ids):
                    raise ValueError(
                        f"A label map has the class {classes.max()}, but the data has "
                        f"{counted(len(label_ids), 'label')}: the maps are of another data set."
                    )
                classes = np.asarray(label_ids, classes.dtype)[classes]
            prepared |= {MAP_SCORES: label_map.scores, MAP_CLASSES: classes, BOX: view.box, FLIPPED: view.flipped}
        return prepared


def evaluation_pixels(processor: BaseImageProcessor) -> Callable[[list[PILImage.Image]], list[torch.Tensor]]:
    """Images as the processor prepares them, one by one the same as in a pipeline."""
    return partial(_process, processor)


# At module level and not inline: dataloader workers that are spawned get these pickled.
def _process(processor: BaseImageProcessor, images: list[PILImage.Image]) -> list[torch.Tensor]:
    return list(processor(images, return_tensors="pt")["pixel_values"])


def match_labels(data_labels: list[str], model_labels: list[str]) -> list[int] | None:
    """
    The model's number of each of the data's labels, for evaluating a model in its own label order.

    Returns:
        `list[int]`, or `None` where the two orders are the same.

    Raises:
        `ValueError`: labels that the model doesn't know; the message lists both sides' differences.
    """
    if data_labels == model_labels:
        return None
    if unknown := [label for label in data_labels if label not in model_labels]:
        unseen = [label for label in model_labels if label not in data_labels]
        raise ValueError(
            f"The data has labels that the model doesn't know: {name_some(unknown)}. The model's labels that the data "
            f"lacks: {name_some(unseen)}. Rename the data's labels (folders) as the model calls them."
        )
    return [model_labels.index(label) for label in data_labels]
