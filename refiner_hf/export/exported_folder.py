"""A model's folder to one that runs without PyTorch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_refiner import RefinerConfig
from ..encoder_models_refiner import RefinedConfigMixin
from ..utils.fitting import check_processor, try_out
from ..utils.loading import load_classifier, load_config, load_image_processor
from ..utils.model_source import find_source
from ..utils.new_folder import new_folder
from .graph import export_onnx
from .pixels import copy_preprocessing
from .quantize import check_quantized, quantize_onnx


GRAPH, QUANTIZED = "model.onnx", "model_int8.onnx"


@dataclass
class Exported:
    """
    The graphs that were written, and what their checks found: the largest difference between the first one's logits
    and the model's; and the share of the calibration pictures to which the int8 form gives the same answer.
    """

    graph: Path
    difference: float
    int8: Path | None = None
    same_answers: float | None = None


def load_for_export(model: str, revision: str | None = None) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A classifier in float32 and in evaluation mode, and its image processor.

    Raises:
        `ValueError`: it is neither a Refiner nor refined, or no classifier; it is quantized or damaged, or its image
            processor doesn't fit it.
        `OSError`: there is no such model, or it has no image processor.
    """
    source = find_source(model, revision=revision)
    config = load_config(source)
    if not isinstance(config, RefinerConfig | RefinedConfigMixin):
        raise ValueError(
            f"{model} is a {config.model_type!r} model without refinements. (Hugging Face's optimum exports others.)"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{model} is quantized, which ONNX has no operations for. Export the model that it was made of; --int8 "
            "quantizes the graph."
        )
    network, processor = load_classifier(source), load_image_processor(source)
    check_processor(processor, network.config)
    try_out(model, network, processor)
    return network, processor


def export_folder(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    output_dir: str | Path,
    calibration: list[np.ndarray] | None = None,
) -> Exported:
    """
    Writes `model.onnx`, with `calibration` also `model_int8.onnx`, and beside them what says how images are prepared
    and how labels are called, `preprocessor_config.json` and `config.json`, and what prepares them, `preprocess.py`.

    Args:
        model, processor: as [`load_for_export`] gives them.
        output_dir: the folder to make; must be new or empty.
        calibration (`list[np.ndarray]`, *optional*): pictures to make an int8 form with, see [`quantize_onnx`].

    Raises:
        `RuntimeError`: a graph's answers aren't the model's, or an engine computes the int8 form wrongly.
        `ValueError`: `preprocess.py` doesn't make the pixels that the image processor makes.
        `FileExistsError`: `output_dir` holds something already. Nothing half-written is left behind in any case.
    """
    output_dir = Path(output_dir)
    with new_folder(output_dir) as unfinished:
        model.config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        copy_preprocessing(unfinished, model.config)
        exported = Exported(output_dir / GRAPH, export_onnx(model, unfinished / GRAPH))
        if calibration is not None:
            quantize_onnx(unfinished / GRAPH, unfinished / QUANTIZED, calibration)
            exported.int8 = output_dir / QUANTIZED
            exported.same_answers = check_quantized(unfinished / GRAPH, unfinished / QUANTIZED, calibration)
    return exported
