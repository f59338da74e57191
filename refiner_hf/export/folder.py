"""A model's folder to one that runs without PyTorch."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_refiner import RefinerConfig
from ..conversion.folder import check_processor, new_folder
from ..image_processing_pil_refiner import to_8_bit_rgb
from ..modeling_refiner import RefinerForImageClassification
from ..utils.loading import load_classifier, load_config, load_image_processor, try_out
from . import preprocess
from .graph import export_onnx, quantize_onnx


GRAPH, QUANTIZED = "model.onnx", "model_int8.onnx"
# The very file that is written beside a graph: it needs nothing of this package.
PREPROCESS = Path(preprocess.__file__)
# Pictures on which it is checked, (mode, width, height): wide, high, thin, small, grey, of a palette, in 16 bits.
_PICTURES = (
    ("RGB", 97, 41),
    ("RGB", 33, 200),
    ("RGB", 300, 2),
    ("RGB", 5, 4),
    ("L", 64, 63),
    ("P", 50, 31),
    ("I;16", 40, 30),
)


def load_for_export(
    model: str, revision: str | None = None
) -> tuple[RefinerForImageClassification, BaseImageProcessor]:
    """
    A classifier in float32 and in evaluation mode, and its image processor.

    Raises:
        `ValueError`: it isn't a Refiner with a classifier, it is quantized or damaged, or its image processor doesn't
            fit it.
        `OSError`: there is no such model, or it has no image processor.
    """
    config = load_config(model, revision=revision)
    if not isinstance(config, RefinerConfig):
        raise ValueError(
            f"{model} is a {config.model_type!r} model, not a Refiner. (Hugging Face's optimum exports others.)"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{model} is quantized, which ONNX has no operations for. Export the model that it was made of; --int8 "
            "quantizes the graph."
        )
    network, processor = load_classifier(model, revision), load_image_processor(model, {"revision": revision})
    check_processor(processor, network.config)
    try_out(model, network, processor)
    return network, processor


def export_folder(
    model: RefinerForImageClassification,
    processor: BaseImageProcessor,
    output_dir: str | Path,
    int8: bool = False,
) -> tuple[list[Path], float]:
    """
    Writes `model.onnx`, with `int8` also `model_int8.onnx`, and beside them what says how images are prepared and how
    labels are called, `preprocessor_config.json` and `config.json`, and `preprocess.py`, which prepares them with
    NumPy and Pillow alone.

    Args:
        model, processor: as [`load_for_export`] gives them.
        output_dir: the folder to make; must be new or empty.
        int8 (`bool`, *optional*): also with linear layers in 8 bits.

    Returns:
        the graphs (`list[Path]`), and the largest difference between the first one's logits and the model's.

    Raises:
        `RuntimeError`: the graph's answers aren't the model's.
        `ValueError`: an image processor that does what `preprocess.py` can't do.
        `FileExistsError`: `output_dir` holds something already. Nothing half-written is left behind in any case.
    """
    output_dir = Path(output_dir)
    with new_folder(output_dir) as unfinished:
        difference = export_onnx(model, unfinished / GRAPH)
        if int8:
            quantize_onnx(unfinished / GRAPH, unfinished / QUANTIZED)
        model.config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        shutil.copyfile(PREPROCESS, unfinished / PREPROCESS.name)
        check_preprocess(unfinished)
    return [output_dir / GRAPH] + [output_dir / QUANTIZED] * int8, difference


def check_preprocess(folder: Path) -> None:
    """
    Compares what `preprocess.py` makes of odd pictures with what the image processor in a folder does.

    Raises:
        `ValueError`: they differ.
    """
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    grey = preprocess.settings_in(str(folder))["num_channels"] == 1
    for number, (mode, width, height) in enumerate(_PICTURES):
        levels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(levels).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        given = to_8_bit_rgb(picture).convert("L") if grey else to_8_bit_rgb(picture)
        expected = np.asarray(processor(given, return_tensors="np").pixel_values)
        try:
            same = np.array_equal(preprocess.pixel_values(picture, folder), expected)
        except (KeyError, TypeError):  # it asks for what isn't known there
            same = False
        if not same:
            raise ValueError(
                f"The image processor ({type(processor).__name__}) does something that can't be written without "
                "transformers: a picture comes out otherwise. Prepare pictures with refiner_hf.RefinerImageProcessor, "
                "or with a ViTImageProcessor or DeiTImageProcessor, and export again."
            )
