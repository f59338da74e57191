"""Encoded images to what the model takes, as transforms of a `datasets` dataset."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset
from PIL import Image as PILImage
from timm.data import create_transform
from transformers.utils import logging

from ..image_processing_pil_refiner import to_8_bit_rgb
from ..image_processing_refiner import RefinerImageProcessor
from .arguments import AugmentationArguments
from .sources import IMAGE_COLUMN, LABEL_COLUMN, pick_label


logger = logging.get_logger(__name__)


class PrepareImages:
    """
    Batches of encoded images and labels to `pixel_values` and `labels`.

    Args:
        to_pixels: a list of RGB images to a list of tensors (channels, height, width).
        label_ids (`list[int]`, *optional*): the model's number of each of the data's labels, where they differ.
    """

    def __init__(
        self, to_pixels: Callable[[list[PILImage.Image]], list[torch.Tensor]], label_ids: list[int] | None = None
    ):
        self.to_pixels = to_pixels
        self.label_ids = label_ids

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        prepared = {"pixel_values": self.to_pixels([decode_image(image) for image in batch[IMAGE_COLUMN]])}
        if LABEL_COLUMN in batch:
            labels = batch[LABEL_COLUMN]
            prepared[LABEL_COLUMN] = (
                labels if self.label_ids is None else [pick_label(self.label_ids, label) for label in labels]
            )
        return prepared


def evaluation_pixels(processor: RefinerImageProcessor) -> Callable[[list[PILImage.Image]], list[torch.Tensor]]:
    """Images as the processor prepares them, one by one the same as in a pipeline."""
    return partial(_process, processor)


def training_pixels(
    processor: RefinerImageProcessor, augmentation: AugmentationArguments
) -> Callable[[list[PILImage.Image]], list[torch.Tensor]]:
    """Augmented images at the processor's size and normalisation."""
    try:
        transform = _timm_transform(processor, augmentation)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"timm doesn't know the augmentation --auto_augment {augmentation.auto_augment}.") from error
    return partial(_augment, transform)


def _timm_transform(processor: RefinerImageProcessor, augmentation: AugmentationArguments) -> Callable:
    return create_transform(
        input_size=(3, processor.size["height"], processor.size["width"]),
        is_training=True,
        scale=(augmentation.crop_min_scale, 1.0),
        hflip=0.5 if augmentation.horizontal_flip else 0.0,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation="bicubic",
        mean=processor.image_mean,
        std=processor.image_std,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )


# At module level and not inline: dataloader workers that are spawned get these pickled.
def _process(processor: RefinerImageProcessor, images: list[PILImage.Image]) -> list[torch.Tensor]:
    return list(processor(images, return_tensors="pt")["pixel_values"])


def _augment(transform: Callable, images: list[PILImage.Image]) -> list[torch.Tensor]:
    return [transform(image) for image in images]


def with_transform(data: Dataset | IterableDataset, transform: PrepareImages) -> Dataset | IterableDataset:
    """Applies `transform` as rows are read."""
    if isinstance(data, IterableDataset):
        return data.map(transform, batched=True, batch_size=32, remove_columns=[IMAGE_COLUMN])
    return data.with_transform(transform)


def decode_image(encoded: dict[str, Any]) -> PILImage.Image:
    """
    An image as `datasets` stores it (bytes or a path) as an upright 8-bit RGB image.

    Raises:
        `ValueError`: not an image, or a damaged one; the message names the file.
    """
    try:
        image = Image().decode_example(encoded)
        if image.mode.startswith("I"):
            logger.warning_once(
                "There are 16-bit images among the data. They are scaled to 8 bits here and in the image processor, "
                "but transformers' pipelines clip them when they open a file: hand those to the processor yourself."
            )
        return to_8_bit_rgb(image)
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        name = encoded.get("path") or "(without a file name)"
        raise ValueError(f"The image {name} can't be read ({error}). Mend or remove it.") from error


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
            f"The data has labels that the model doesn't know: {_some(unknown)}. The model's labels that the data "
            f"lacks: {_some(unseen)}. Rename the data's labels (folders) as the model calls them."
        )
    return [model_labels.index(label) for label in data_labels]


def _some(labels: list[str], most: int = 20) -> str:
    return str(labels) if len(labels) <= most else f"{labels[:most]} and {len(labels) - most} more"
