"""Other engines on our own graph: what somebody could take in place of torch, for inference on a CPU."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel


# By engine, its package and the types that it can compute in.
ENGINES = {
    "onnxruntime": ("onnxruntime", ("float32",)),
    "OpenVINO": ("openvino", ("float32", "bfloat16")),
}


def installed_engines() -> list[str]:
    """Those that can run here; both read the graph that onnxscript makes."""
    return [
        name for name, (package, _) in ENGINES.items() if all(map(find_spec, (package, "onnxscript", "onnxruntime")))
    ]


def engine_step(engine: str, model: PreTrainedModel, pixels: torch.Tensor, dtype: str) -> Callable[[], object]:
    """
    What is timed: a call gives the logits.

    Args:
        engine (`str`): of [`ENGINES`].
        model ([`PreTrainedModel`]): in float32.
        pixels (`torch.Tensor` of shape (B, C, height, width)): in float32.
        dtype (`str`): what the engine computes in.
    """
    from ..export.graph import export_onnx

    images = pixels.numpy()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export_onnx(model, file)
        start = _open_vino if engine == "OpenVINO" else _open_onnxruntime
        run = start(file, images.shape, dtype)
    return lambda: run(images)


def _open_onnxruntime(file: Path, shape: tuple[int, ...], dtype: str) -> Callable[[np.ndarray], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (pixel_values,) = session.get_inputs()
    return lambda images: session.run(None, {pixel_values.name: images})


def _open_vino(file: Path, shape: tuple[int, ...], dtype: str) -> Callable[[np.ndarray], object]:
    import openvino

    graph = openvino.Core().read_model(str(file))
    graph.reshape({0: list(shape)})  # told the number of images, it is at its best
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(graph, "CPU", options)
