"""A classifier as an ONNX graph, checked against the model it was made of, and its int8 form."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from transformers import PreTrainedModel

from ..utils.image_config import image_shape_of
from ..utils.same_answers import check_same_answers, noise_of


INPUT, OUTPUT = "pixel_values", "logits"
TOLERANCE = 1e-4  # of a logit; see `check_same_answers`
_BATCHES = (1, 2, 5)


class _Logits(nn.Module):
    """The model as a function of pixels alone."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def export_onnx(model: PreTrainedModel, file: str | Path) -> float:
    """
    Writes a model, as it is in evaluation, as an ONNX graph from `pixel_values` (B, C, height, width) to `logits`
    (B, K), both float32, for any number B of images. Their height and width are those of the model.

    Args:
        model (`PreTrainedModel`): an image classifier in float32. Its mode is restored.
        file: the `.onnx` file.

    Returns:
        `float`: the largest difference between the graph's logits and the model's, see [`check_onnx`].

    Raises:
        `ValueError`: the model isn't in float32.
        `RuntimeError`: the graph's answers aren't the model's.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"The model is in {model.dtype}; load it with dtype=torch.float32 to export it.")
    training = model.training
    model.eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                _Logits(model),
                (noise_of(image_shape_of(model.config), 2),),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            )
        assert program is not None  # with dynamo there is one
        program.save(str(file))
        return check_onnx(file, model)
    finally:
        model.train(training)


@torch.no_grad()
def check_onnx(file: str | Path, model: PreTrainedModel) -> float:
    """
    Compares a graph's logits with the model's, for one image and several.

    Returns:
        `float`: the largest difference.

    Raises:
        `RuntimeError`: it is larger than 1e-4 (of the largest logit, if that is above 1).
    """
    session, largest = open_onnx(file), 0.0
    for batch in _BATCHES:
        pixels = noise_of(image_shape_of(model.config), batch)
        expected, actual = model(pixels.to(model.device)).logits.cpu(), run_onnx(session, pixels.numpy())
        largest = max(largest, check_same_answers(expected, actual, TOLERANCE, f"The graph {Path(file).name}"))
    return largest


def quantize_onnx(file: str | Path, quantized: str | Path) -> None:
    """
    Writes the int8 form of a graph: weights of the linear layers in 8 bits, one scale for each output channel, and
    their inputs quantized as they come. The convolutions over maps, which have few weights, stay in float32.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            Path(quantized),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def open_onnx(file: str | Path) -> onnxruntime.InferenceSession:
    """A graph, ready to run on the CPU."""
    options = onnxruntime.SessionOptions()
    # Threads that wait in a loop between runs slow down everything else that runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_onnx(session: onnxruntime.InferenceSession, pixel_values: np.ndarray) -> np.ndarray:
    """(B, C, height, width) -> (B, K), both float32."""
    return session.run([OUTPUT], {INPUT: pixel_values})[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries say about their own insides."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
