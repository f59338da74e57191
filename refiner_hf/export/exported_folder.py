"""A model's folder to one that runs without PyTorch."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_refiner import RefinerConfig
from ..encoder_models_refiner import RefinedConfigMixin
from ..utils.fitting import check_processor, try_out
from ..utils.loading import load_classifier, load_config, load_image_processor
from ..utils.model_source import find_source
from ..utils.new_folder import new_folder
from .graph import export_onnx, quantize_onnx
from .pixels import copy_preprocessing


GRAPH, QUANTIZED = "model.onnx", "model_int8.onnx"


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
    int8: bool = False,
) -> tuple[list[Path], float]:
    """
    Writes `model.onnx`, with `int8` also `model_int8.onnx`, and beside them what says how images are prepared and how
    labels are called, `preprocessor_config.json` and `config.json`, and what prepares them, `preprocess.py`.

    Args:
        model, processor: as [`load_for_export`] gives them.
        output_dir: the folder to make; must be new or empty.
        int8 (`bool`, *optional*): also with linear layers in 8 bits.

    Returns:
        the graphs (`list[Path]`), and the largest difference between the first one's logits and the model's.

    Raises:
        `RuntimeError`: the graph's answers aren't the model's.
        `ValueError`: `preprocess.py` doesn't make the pixels that the image processor makes.
        `FileExistsError`: `output_dir` holds something already. Nothing half-written is left behind in any case.
    """
    output_dir = Path(output_dir)
    with new_folder(output_dir) as unfinished:
        model.config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        copy_preprocessing(unfinished, model.config)
        difference = export_onnx(model, unfinished / GRAPH)
        if int8:
            quantize_onnx(unfinished / GRAPH, unfinished / QUANTIZED)
    return [output_dir / GRAPH] + [output_dir / QUANTIZED] * int8, difference
