# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""What a CPU does faster where nothing is differentiated."""

from math import prod
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

from .folding_refiner import has_hooks, is_plain, is_transformed
from .operations_refiner import operation
from .prepacking_refiner import prepacked, prepacked_linear


# A product of oneDNN's. In float32 torch itself takes another library's, unless weights are frozen.
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# Multiplications of a product. In smaller ones that library is longer on its way to the product than the other is.
_PAYS_FROM = 4 * 10**6


def only_infers(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` are computed, now or by what is compiled, and no more than that."""
    return not (torch.is_grad_enabled() or is_transformed(tensor))


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False) -> torch.Tensor:
    """(..., D), (d, D), (d) -> (..., d), with or without an activation."""
    if (
        inputs.device.type != "cpu"
        or not only_infers(inputs)
        or not _pays(inputs, weight)
        or not inputs.dtype == weight.dtype == torch.float32
        or not (is_plain(inputs) and is_plain(weight))
        or not weight.is_contiguous()
        or torch.is_autocast_enabled("cpu")
    ):
        return _as_torch_does(inputs, weight, bias, gelu)
    return _linear(inputs, weight, bias, gelu)


def _as_torch_does(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    outputs = nn.functional.linear(inputs, weight, bias)
    return nn.functional.gelu(outputs) if gelu else outputs


def _pays(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    rows = inputs.shape[:-1]
    if torch.compiler.is_compiling():  # what is compiled may be for any number of images
        rows = rows[-1:]
    return prod(rows) * weight.numel() >= _PAYS_FROM


@operation(
    "linear(Tensor inputs, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    fake=lambda inputs, weight, *others: inputs.new_empty(*inputs.shape[:-1], weight.shape[0]),
    flops=lambda inputs_shape, weight_shape, *others: 2 * prod(inputs_shape) * weight_shape[0],
)
def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    packed = prepacked(weight)
    if packed is not None:
        return prepacked_linear(inputs, weight, packed, bias, gelu)
    if _product is None:
        return _as_torch_does(inputs, weight, bias, gelu)
    return _product(inputs, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))


def call_linear(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """`module(inputs)`; a linear layer without hooks needn't be called."""
    if not _is_plain(module, nn.Linear):
        return module(inputs)
    return linear(inputs, module.weight, module.bias)


def call_linear_and_activation(module: Any, activation: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`activation(module(inputs))`, in one go where both are as they usually are."""
    if not _is_plain(module, nn.Linear) or not _is_plain(activation, GELUActivation):
        return activation(module(inputs))
    return linear(inputs, module.weight, module.bias, gelu=True)


def _is_plain(module: nn.Module, kind: type) -> bool:
    return type(module) is kind and not has_hooks(module)
