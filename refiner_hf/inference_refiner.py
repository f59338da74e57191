# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""What a CPU does faster where nothing is differentiated, recorded or compiled."""

from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers.activations import GELUActivation

from .folding_refiner import has_hooks, is_transformed


# A product of oneDNN's that torch takes in what it compiles; elsewhere it takes another library's in float32.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# Multiplications of a product. In smaller ones that library is longer on its way to the product than the other is.
_PAYS_FROM = 4 * 10**6


def _count_flops(inputs_shape: torch.Size, weight_shape: torch.Size, *others: Any, **more: Any) -> int:
    return 2 * prod(inputs_shape) * weight_shape[0]


if _product is not None and _product not in flop_registry:  # otherwise torch's counter would overlook it
    register_flop_formula(_product)(_count_flops)


def only_infers(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` are computed, and no more than that."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(tensor))


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False) -> torch.Tensor:
    """(..., D), (d, D), (d) -> (..., d), with or without an activation."""
    if (
        _product is None
        or inputs.device.type != "cpu"
        or not only_infers(inputs)  # exporters leave sizes open
        or inputs.numel() * weight.shape[0] < _PAYS_FROM
        or not inputs.dtype == weight.dtype == torch.float32
        or type(inputs) is not torch.Tensor  # neither quantized nor divided among devices
        or type(weight) not in (torch.Tensor, nn.Parameter)
        or not weight.is_contiguous()
        or torch.is_autocast_enabled("cpu")
    ):
        outputs = nn.functional.linear(inputs, weight, bias)
        return nn.functional.gelu(outputs) if gelu else outputs
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
