# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""In evaluation on a CPU, by small C++ functions: a layer's own map, its refinement, and what they make of values."""

import ctypes
from typing import Any

import torch
from torch import nn

from .folding_refiner import is_transformed, needs_training_form, operands_of
from .native_library_refiner import call, why_no_function
from .operations_refiner import operation, products_of_weights, side_by_side


def native_refine(
    refinement: Any, attention_map: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """As [`blocked_refiner.blocked_refine`], where [`why_not_native`] has nothing against it."""
    return _native_refine(attention_map.contiguous(), None, *operands_of(refinement), scale)


def native_weigh(refinement: Any, attention_map: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """
    What the refined map makes of the values, without ever making all of it.

    Args:
        refinement, attention_map, scale: as in [`native_refine`].
        value (`torch.Tensor` of shape (B, H, N, D)).

    Returns:
        `torch.Tensor` of shape (B, N, H D).
    """
    return _native_refine(attention_map.contiguous(), side_by_side(value), *operands_of(refinement), scale)


@operation(
    "native_refine(Tensor map, Tensor? value, Tensor?[] weights, float[] eps, float scale) -> Tensor",
    fake=lambda attention_map, value, *others: torch.empty_like(attention_map if value is None else value),
    flops=lambda map_shape, value_shape, weight_shapes, *others: (
        products_of_weights(map_shape, weight_shapes) + _products_with(map_shape, value_shape)
    ),
)
def _native_refine(
    attention_map: torch.Tensor,
    value: torch.Tensor | None,
    weights: list[torch.Tensor | None],
    eps: list[float],
    scale: float,
) -> torch.Tensor:
    output = torch.empty_like(attention_map if value is None else value)
    weights = [None if weight is None else weight.to(torch.float32).contiguous() for weight in weights]
    batch, heads, size, _ = attention_map.shape
    expanded, _, kernel, _ = weights[1].shape  # type: ignore[union-attr]
    width = 0 if value is None else value.shape[2] // heads
    sizes = (batch, heads, expanded, size, kernel, width, attention_map.dtype == torch.bfloat16)
    numbers = ((ctypes.c_double * len(eps))(*eps), ctypes.c_double(scale))
    call("refiner_refine", (attention_map, value, output, *weights), sizes, *numbers)
    return output


def why_not_native(refinement: nn.Module, attention_map: torch.Tensor, masked: bool) -> str | None:
    """Why [`native_refine`] can't refine this map, or `None` where it can."""
    if masked:
        return "it knows no masks"
    if getattr(refinement, "local_attention", None) is None:
        return "it is for refinements with a distributed local attention"
    if needs_training_form(refinement, attention_map):
        return "it is for evaluation without gradients"
    return why_no_function(attention_map)


def native_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, previous: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A layer's own map, softmax(query key^T scaling) + scaling * previous, and what it makes of the values; where
    [`attends`] says so.

    Args:
        query, key, value (`torch.Tensor` of shape (B, H, N, D)).
        previous (`torch.Tensor` of shape (B, H, N, N), *optional*): a map to add.
        scaling: of the scores and of `previous`.

    Returns:
        the map (B, H, N, N) and the weighted values (B, N, H D).
    """
    previous = None if previous is None else previous.contiguous()
    return _native_attend(*map(side_by_side, (query, key, value)), previous, query.shape[1], scaling)


@operation(
    "native_attend(Tensor query, Tensor key, Tensor value, Tensor? previous, int heads, float scaling) "
    "-> (Tensor, Tensor)",
    fake=lambda query, key, value, previous, heads, scaling: (
        query.new_empty(query.shape[0], heads, query.shape[1], query.shape[1]), torch.empty_like(query)
    ),
    flops=lambda query_shape, *others: 4 * query_shape[0] * query_shape[1] ** 2 * query_shape[2],
)  # fmt: skip
def _native_attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    previous: torch.Tensor | None,
    heads: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, size, width = query.shape
    attention_map, output = query.new_empty(batch, heads, size, size), torch.empty_like(query)
    sizes = (batch, heads, size, width // heads, query.dtype == torch.bfloat16)
    tensors = (query, key, value, previous, attention_map, output)
    call("refiner_attend", tensors, sizes, ctypes.c_double(scaling))
    return attention_map, output


def attends(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, previous: torch.Tensor | None) -> bool:
    """Whether [`native_attend`] can take these."""
    given = [each for each in (query, key, value, previous) if each is not None]
    differentiated = torch.is_grad_enabled() and any(each.requires_grad for each in given)
    return not differentiated and query.numel() > 0 and not is_transformed(query) and why_no_function(*given) is None


def _products_with(map_shape: torch.Size, value_shape: torch.Size | None) -> int:
    return 0 if value_shape is None else 2 * map_shape[2] * value_shape.numel()
