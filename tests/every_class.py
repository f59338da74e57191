"""A tiny network of every class, with inputs for it."""

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import ModelOutput

from refiner_hf import (
    RefinerBackbone,
    RefinerConfig,
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerModel,
    RefinerPreTrainedModel,
)

from .conftest import LAYOUTS, TINY


CLASSES = [RefinerModel, RefinerForImageClassification, RefinerForMaskedImageModeling, RefinerBackbone]
# What a class has beside the encoder, whose own tensors are the same in all of them.
HEADS = {
    RefinerModel: set(),
    RefinerForImageClassification: {
        f"{c}.{p}" for c in ("classifier", "dense_classifier") for p in ("weight", "bias")
    },
    RefinerForMaskedImageModeling: {"decoder.weight", "decoder.bias", "embeddings.mask_token"},
    RefinerBackbone: set(),
}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def config_of(**overrides) -> RefinerConfig:
    return RefinerConfig(**{**TINY, "use_dense_head": True, "out_features": ["stage1", "stage4"], **overrides})


def make(cls: type[RefinerPreTrainedModel], **overrides) -> RefinerPreTrainedModel:
    """A network in evaluation mode, the same at each call, in which no tensor has the value that it began with."""
    torch.manual_seed(0)
    model = cls(config_of(**overrides)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.05 * torch.randn_like(tensor) if tensor.is_floating_point() else 7)
    return model


def inputs_of(cls: type[RefinerPreTrainedModel], batch: int = 3, grid=(4, 4), labels: bool = False) -> dict:
    """Images of that many patches, and what the class needs beside them for a loss."""
    generator = torch.Generator().manual_seed(1)
    inputs = {"pixel_values": torch.randn(batch, 3, 4 * grid[0], 4 * grid[1], generator=generator)}
    if cls is RefinerForMaskedImageModeling:
        inputs["bool_masked_pos"] = torch.rand(batch, math.prod(grid), generator=generator) < 0.5
    if cls is RefinerForImageClassification and labels:
        inputs["labels"] = torch.arange(batch) % TINY["num_labels"]
    return inputs


def results(outputs: ModelOutput) -> list[torch.Tensor]:
    return tree_leaves(outputs.to_tuple())


def assert_initialised(model: RefinerPreTrainedModel, names: set[str]) -> None:
    """Whether these parameters and buffers are as a fresh network has them."""
    state = model.state_dict()
    constants = {"lambda1": model.config.layerscale_value, "mask_token": 0, "num_batches_tracked": 0}
    constants |= {"running_mean": 0, "running_var": 1}
    for name in names:
        tensor, (parent, _, kind) = state[name], name.rpartition(".")
        is_norm = "norm" in parent.rpartition(".")[2]
        if kind in constants:
            assert (tensor == constants[kind]).all(), name
        elif is_norm:
            assert (tensor == (1 if kind == "weight" else 0)).all(), name
        elif kind == "bias" and state[f"{parent}.weight"].ndim == 2:
            assert (tensor == 0).all(), name
        else:
            if state.get(f"{parent}.weight", tensor).ndim == 4:  # PyTorch's own: uniform within 1 / sqrt(inputs)
                bound = state[f"{parent}.weight"][0].numel() ** -0.5
                assert tensor.abs().max() <= bound, name
                std = bound / math.sqrt(3)
            else:
                std = model.config.initializer_range
            # Five standard errors of a mean and of a normal's standard deviation.
            assert abs(tensor.mean().item()) < 5 * std / tensor.numel() ** 0.5, name
            assert tensor.std().item() == pytest.approx(std, rel=5 / (2 * tensor.numel()) ** 0.5), name
