"""The pictures from which a graph in 8 bits takes its ranges."""

from pathlib import Path

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from ..data.arguments import DataArguments
from ..data.image_sample import decoded, load_images
from ..data.sources import load_image_data
from ..data.transforms import evaluation_pixels
from .compare import DIGITS


IMAGES = 200
_BATCH = 8


def load_calibration(data: str, measured_on: str | None, processor: BaseImageProcessor) -> list[np.ndarray]:
    """
    Some pictures, as the model gets them; their labels don't matter.

    Args:
        data (`str`): a folder of images, in subfolders or not; or the Hub name of a dataset, or `"digits"`, of which
            only images are taken that [`~refiner_hf.export.compare.load_labelled`] doesn't take.
        measured_on (`str`, *optional*): where accuracy will be measured.
        processor (`BaseImageProcessor`): the model's.

    Returns:
        `list[np.ndarray]`: batches (B, C, height, width), float32.

    Raises:
        `ValueError`, `OSError`: there are no such images, one is damaged, or accuracy would be measured on them.
    """
    if measured_on is not None and _overlap(data, measured_on):
        raise ValueError(
            f"--int8 {data} and --measure_on {measured_on} name the same pictures: accuracy would be measured on "
            "those that set the ranges. Give --int8 the training images."
        )
    if Path(data).is_dir():
        rows = load_images(data, IMAGES)[1]
    else:
        named = DataArguments(dataset_name=None if data == DIGITS else data, max_train_samples=IMAGES)
        rows = load_image_data(named, need_train=True, need_evaluation=True, seed=0).train
    pixels = evaluation_pixels(processor)
    pictures = list(decoded(rows))
    return [np.stack(pixels(pictures[i : i + _BATCH])) for i in range(0, len(pictures), _BATCH)]


def _overlap(data: str, measured_on: str) -> bool:
    """Whether one folder is the other, or within it."""
    if not (Path(data).is_dir() and Path(measured_on).is_dir()):
        return False
    one, other = Path(data).resolve(), Path(measured_on).resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
