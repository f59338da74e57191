"""How pictures become pixels, beside a graph: `preprocess.py`, checked against the image processor."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedConfig

from ..utils.errors import explain_errors
from ..utils.image_config import image_shape_of
from ..utils.loading import load_image_processor
from . import preprocess


# (width, height): wide, tall, thin, the smallest, and photos that are made smaller, of odd sides too.
_SIZES = ((97, 41), (41, 97), (3, 80), (1, 1), (800, 600), (601, 801))


def copy_preprocessing(folder: Path, config: PreTrainedConfig) -> None:
    """
    Puts `preprocess.py` into a folder that holds `preprocessor_config.json` and `config.json`, after it has made the
    same pixels of a few pictures as the image processor in its PIL form.

    Raises:
        `ValueError`: it can't, or makes others.
    """
    processor = load_image_processor(str(folder), backend="pil")
    name = type(processor).__name__
    with explain_errors(
        f"Pictures can't be prepared without transformers as by this model's image processor ({name})"
    ):
        prepare = preprocess.Preprocess(folder)
        for picture in _pictures(config):
            expected = processor(picture, return_tensors="np").pixel_values
            if not np.array_equal(prepare(picture), expected):
                raise ValueError(
                    f"of a picture of {picture.width} x {picture.height} pixels they would come out differently. Give "
                    "the model a RefinerImageProcessor, a ViTImageProcessor or a DeiTImageProcessor; or write the "
                    "graph alone in Python, with refiner_hf.export.graph.export_onnx, and prepare them yourself."
                )
    shutil.copyfile(preprocess.__file__, folder / Path(preprocess.__file__).name)


def _pictures(config: PreTrainedConfig) -> Iterator[Image.Image]:
    """Of noise, in which every pixel counts; also of the model's own size, and one pixel wider and less high."""
    count, height, width = image_shape_of(config)
    channels = () if count == 1 else (count,)
    for wide, high in (*_SIZES, (width, height), (width + 1, max(1, height - 1))):
        noise = np.random.default_rng(0).integers(0, 256, (high, wide, *channels), np.uint8)
        yield Image.fromarray(noise)
