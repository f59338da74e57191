"""A classifier as an ONNX graph, checked against the model it was made of."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..utils.image_config import image_shape_of
from ..utils.same_answers import check_same_answers, noise_of
from .engines import INPUT, OUTPUT, open_every_way


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
        with quiet():
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
    Compares a graph's logits in each engine that is installed with the model's, for one image and several.

    Returns:
        `float`: the largest difference.

    Raises:
        `RuntimeError`: it is larger than 1e-4 (of the largest logit, if that is above 1).
    """
    largest = 0.0
    for name, graph in open_every_way(file).items():
        for batch in _BATCHES:
            pixels = noise_of(image_shape_of(model.config), batch)
            expected, actual = model(pixels.to(model.device)).logits.cpu(), graph(pixels.numpy())
            what = f"The graph {Path(file).name} in {name}"
            largest = max(largest, check_same_answers(expected, actual, TOLERANCE, what))
    return largest


@contextmanager
def quiet() -> Iterator[None]:
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
