"""Other engines on our own graph: what somebody could take in place of torch, for inference on a CPU."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..export.engines import BFLOAT16, FLOAT32, ONNXRUNTIME, OPENVINO, has_bfloat16, installed_engines, open_graph


class EngineContender(NamedTuple):
    """
    An engine, and what it computes in. With `int8` what can be is in 8 bits, its ranges taken from the images that are
    timed, and the rest in `precision`.
    """

    engine: str
    precision: str = FLOAT32
    int8: bool = False


ENGINES = {
    "onnxruntime": EngineContender(ONNXRUNTIME),
    "onnxruntime int8": EngineContender(ONNXRUNTIME, int8=True),
    "OpenVINO": EngineContender(OPENVINO),
    "OpenVINO bfloat16": EngineContender(OPENVINO, BFLOAT16),
    "OpenVINO int8": EngineContender(OPENVINO, int8=True),
    "OpenVINO int8, bfloat16": EngineContender(OPENVINO, BFLOAT16, int8=True),
}


def engines_here() -> list[str]:
    """Those that can run here; all read the graph that onnxscript makes, and onnxruntime writes the int8 form."""
    installed = installed_engines()
    if not find_spec("onnxscript") or ONNXRUNTIME not in installed:
        return []
    return [
        name
        for name, (engine, precision, _) in ENGINES.items()
        if engine in installed and (precision == FLOAT32 or has_bfloat16(engine))
    ]


def engine_step(contender: str, model: PreTrainedModel, pixels: torch.Tensor) -> Callable[[], object]:
    """
    What is timed: a call gives the logits.

    Args:
        contender (`str`): of [`ENGINES`].
        model ([`PreTrainedModel`]): in float32.
        pixels (`torch.Tensor` of shape (B, C, height, width)): in float32.
    """
    from ..export.graph import export_onnx
    from ..export.quantize import quantize_onnx

    engine, precision, int8 = ENGINES[contender]
    images = pixels.numpy()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export_onnx(model, file)
        if int8:
            file = Path(folder, "model_int8.onnx")
            quantize_onnx(Path(folder, "model.onnx"), file, [images])
        graph = open_graph(file, engine, precision)
        graph(images)  # compiled now, while there is the file
    return lambda: graph(images)
