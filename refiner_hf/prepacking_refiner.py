# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Copies of linear layers' weights in the order in which a CPU multiplies with them, for inference in float32."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch

from .folding_refiner import is_plain
from .native_library_refiner import call, why_no_function


# Packed rows are a multiple of this, however wide the processor's vectors are.
_ROWS = 64


class Prepacked:
    """A packed copy. It is used as long as somebody keeps this, with a reference to the weight."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.packed = weight.new_zeros(-(-weight.shape[0] // _ROWS) * _ROWS * weight[0].numel())
        self.version: int | None = None

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of who keeps it has weights of its own, and none that are packed


# By the weight's address, which is also that of its views in another shape.
_kept: WeakValueDictionary[int, Prepacked] = WeakValueDictionary()


def prepack(weights: Iterable[torch.Tensor]) -> list[Prepacked]:
    """
    Makes a copy of each weight, (N, K) or of more dimensions, that [`prepacked`] finds as long as the caller keeps
    what this returns. Quantized ones are left alone.

    Raises:
        `ValueError`: they aren't float32 on a CPU, two lie in the same memory, or there is no C++ compiler.
    """
    plain = [weight for weight in weights if _can_be_packed(weight)]
    if not plain:
        raise ValueError("Weights can't be prepacked: there are no plain ones, as nn.Linear has them.")
    for weight in plain:
        why_not = why_no_function(weight) or (None if weight.dtype == torch.float32 else "it is for float32")
        if why_not is not None:
            raise ValueError(f"Weights can't be prepacked: {why_not}.")
    made = []
    for weight in plain:
        other = _kept.get(weight.data_ptr())
        if other is not None and other.weight is not weight and other.weight.data_ptr() == weight.data_ptr():
            # torch doesn't count changes of one as changes of the other.
            raise ValueError("Weights can't be prepacked: two different ones lie in the same memory.")
        _kept[weight.data_ptr()] = kept = Prepacked(weight)
        made.append(kept)
        prepacked(weight.detach().flatten(1))
    return made


def _can_be_packed(weight: torch.Tensor) -> bool:
    return is_plain(weight) and weight.is_contiguous() and weight.numel() > 0


def prepacked(weight: torch.Tensor) -> torch.Tensor | None:
    """The packed copy of a weight (N, K), as it is now; `None` where there is none."""
    kept = _kept.get(weight.data_ptr())
    if kept is None or kept.weight.data_ptr() != weight.data_ptr() or kept.weight.flatten(1).shape != weight.shape:
        return None
    version = None if kept.weight.is_inference() else kept.weight._version
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
