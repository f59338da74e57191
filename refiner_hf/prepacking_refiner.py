# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Copies of linear layers' weights in the order in which a CPU multiplies with them, for inference in float32."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .native_library_refiner import call, why_no_function


# Packed rows are a multiple of this, however wide the processor's vectors are.
_ROWS = 64


@dataclass
class _Prepacked:
    weight: weakref.ref  # what was packed; the copy goes when it goes
    packed: torch.Tensor
    version: int | None


# By the weight's address, which is also that of its views in another shape.
_kept: dict[int, _Prepacked] = {}


def prepack(weights: Iterable[torch.Tensor]) -> None:
    """
    Makes a copy of each weight, (N, K) or of more dimensions, that [`prepacked`] finds. Quantized ones are left alone.

    Raises:
        `ValueError`: they aren't float32 on a CPU, or there is no C++ compiler.
    """
    plain = [weight for weight in weights if type(weight) in (torch.Tensor, nn.Parameter) and weight.is_contiguous()]
    for weight in plain:
        why_not = why_no_function(weight) or (None if weight.dtype == torch.float32 else "it is for float32")
        if why_not is not None:
            raise ValueError(f"Weights can't be prepacked: {why_not}.")
    if not plain:
        raise ValueError("Weights can't be prepacked: there are no plain ones, as nn.Linear has them.")
    for weight in plain:
        address = weight.data_ptr()
        packed = weight.new_zeros(-(-weight.shape[0] // _ROWS) * _ROWS * weight[0].numel())
        _kept[address] = _Prepacked(weakref.ref(weight, partial(_forget, address)), packed, None)
        prepacked(weight.detach().flatten(1))


def _forget(address: int, reference: weakref.ref) -> None:
    if address in _kept and _kept[address].weight is reference:
        del _kept[address]


def prepacked(weight: torch.Tensor) -> torch.Tensor | None:
    """The packed copy of a weight (N, K), as it is now; `None` where there is none."""
    kept = _kept.get(weight.data_ptr())
    if kept is None:
        return None
    packed_weight = kept.weight()
    if (
        packed_weight is None
        or packed_weight.data_ptr() != weight.data_ptr()
        or packed_weight.flatten(1).shape != weight.shape
    ):
        return None
    version = None if packed_weight.is_inference() else packed_weight._version
    if version is None or version != kept.version:
        call("refiner_pack", (weight, kept.packed), weight.shape)
        kept.version = version
    return kept.packed


def prepacked_linear(
    inputs: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """
    A linear layer and perhaps a GELU.

    Args:
        inputs (`torch.Tensor` of shape (..., K)): in float32.
        weight (`torch.Tensor` of shape (N, K)): if it has changed, as far as a few of its numbers tell, `packed` is
            made anew.
        packed: the weight's copy.
        bias (`torch.Tensor` of shape (N), *optional*).

    Returns:
        `torch.Tensor` of shape (..., N).
    """
    outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
    tensors = (inputs.contiguous(), weight, packed, None if bias is None else bias.contiguous(), outputs)
    call("refiner_linear", tensors, (inputs.shape[:-1].numel(), *weight.shape, gelu))
    return outputs
