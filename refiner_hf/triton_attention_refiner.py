# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
A layer's own map on NVIDIA GPUs, by one kernel: scores, softmax, the map of the layer before and the product with the
values, where torch's operations write and read the map once for each of these steps. Backward takes two kernels.
"""

import math

import torch

from .configuration_refiner import RefinerConfig
from .folding_refiner import is_transformed
from .normalization_refiner import differentiable_once
from .operations_refiner import side_by_side
from .packed_maps_refiner import MAX_HEADS, as_maps, empty_packed, packed_of, padded_heads
from .triton_attention_kernels_refiner import (
    key_gradient_kernel,
    map_kernel,
    packed_map_kernel,
    query_gradient_kernel,
)
from .triton_launch_refiner import ceil_div, on_device_of, power_of_two, precision, why_no_kernels
from .triton_tiles_refiner import Kernels, MapTiles, tiles_for


# Bytes of a head's query: with more of them a program has too few registers.
_MAX_WIDTH = 128


def makes_map(
    config: RefinerConfig, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, previous: torch.Tensor | None
) -> bool:
    """
    Whether [`make_map`] can make a layer's own map, and should.

    Args:
        config: of the network; the kernel belongs to the implementation `"triton"` of its refinement.
        query, key, value (`torch.Tensor` of shape (B, H, N, D)).
        previous (`torch.Tensor` of shape (B, H, N, N), *optional*): what is added.
    """
    given = [query, key, value] if previous is None else [query, key, value, previous]
    images, heads, tokens, width = query.shape
    return (
        not (torch.compiler.is_compiling() or is_transformed(query))
        and why_no_kernels(query) is None
        and config.refine_implementation in ("auto", "triton")
        and config.refinement == "expansion_convolution"
        and all(each.dtype == query.dtype for each in given)
        and heads <= MAX_HEADS
        and width * query.itemsize <= _MAX_WIDTH
        # The first is CUDA's limit, the second that of 32-bit offsets within an image.
        and 0 < images < 2**16
        and padded_heads(heads) * (tokens + config.refinement_kernel_size - 1) ** 2 < 2**31
    )


def make_map(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    previous: torch.Tensor | None,
    scaling: float,
    kernel_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    softmax(query key^T scaling) + scaling * previous, and that times the values, where [`makes_map`] is true.

    Args:
        query, key, value (`torch.Tensor` of shape (B, H, N, D)): without values nothing is weighted.
        previous (`torch.Tensor` of shape (B, H, N, N), *optional*): a map to add.
        scaling: of the scores and of `previous`.
        kernel_size: the side of the convolution of the network's refinements, for which a map without gradients is
            packed; with `None`, as in training, it isn't.

    Returns:
        the map (B, H, N, N), packed as a view (`packed_maps_refiner.py`), and the weighted values (B, N, H D). Both
        are differentiable once; a second derivative raises a `RuntimeError`.
    """
    queries, keys, values = side_by_side(query), side_by_side(key), None if value is None else side_by_side(value)
    heads, given = query.shape[1], (query, key, value, previous)
    differentiated = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)
    if differentiated or kernel_size is None:
        return _Attend.apply(queries, keys, values, previous, heads, scaling)
    return _make_packed_map(queries, keys, values, previous, heads, scaling, kernel_size)


def _make_packed_map(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    previous: torch.Tensor | None,
    heads: int,
    scaling: float,
    kernel_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    images, tokens, _ = queries.shape
    packed = empty_packed(images, heads, tokens, kernel_size, like=queries)
    output = None if values is None else torch.empty_like(values)
    width, tiles = _widths(queries, heads), _tiles(queries, heads, training=False)
    with on_device_of(queries):
        packed_map_kernel[ceil_div(packed.shape[1], tiles.rows), images](
            queries, keys, values, previous, packed, output, tokens, *_factors(scaling), *_strides(previous),
            H=heads, HD=min(MAX_HEADS, packed.shape[-1]), HP=packed.shape[-1], **width, HALF=kernel_size // 2,
            ROWS=tiles.rows, COLUMNS=tiles.columns, ACCUMULATES=previous is not None,
            PREVIOUS_PACKED=previous is not None and packed_of(previous, kernel_size) is not None,
            WEIGHTS=values is not None, PRECISION=precision(), num_warps=tiles.warps,
            num_stages=_stages(width["DP"], queries.itemsize),
        )  # fmt: skip
    return as_maps(packed, heads, kernel_size), output


class _Attend(torch.autograd.Function):
    """[`make_map`] with gradients, of tensors (B, N, H D). The softmax isn't kept but computed again."""

    @staticmethod
    def forward(ctx, queries, keys, values, previous, heads: int, scaling: float):
        images, tokens, _ = queries.shape
        maps = queries.new_empty(images, heads, tokens, tokens)
        output = None if values is None else torch.empty_like(values)
        highest, shares = (queries.new_empty(images, heads, tokens, dtype=torch.float32) for _ in range(2))
        constants = _constants(queries, values, heads)
        with on_device_of(queries):
            map_kernel[images * heads, ceil_div(tokens, constants["ROWS"])](
                queries, keys, values, previous, maps, output, highest, shares, tokens, *_factors(scaling),
                *_strides(previous), ACCUMULATES=previous is not None, **constants,
            )  # fmt: skip
        ctx.scaling = scaling
        ctx.save_for_backward(queries, keys, values, maps, highest, shares)
        ctx.set_materialize_grads(False)
        return maps, output

    @staticmethod
    @differentiable_once
    def backward(ctx, d_maps, d_output):
        queries, keys, values, maps, highest, shares = ctx.saved_tensors
        images, heads, tokens, _ = maps.shape
        if d_maps is None and d_output is None:
            return (None,) * 6
        d_maps, d_output = (None if each is None else each.contiguous() for each in (d_maps, d_output))
        d_queries, d_keys, deltas = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(shares)
        d_values = None if d_output is None else torch.empty_like(values)
        d_previous = torch.empty_like(maps) if ctx.needs_input_grad[3] else None
        constants = _constants(queries, d_output, heads) | {"HAS_MAPS": d_maps is not None}
        with on_device_of(queries):
            query_gradient_kernel[images * heads, ceil_div(tokens, constants["ROWS"])](
                queries, keys, values, highest, shares, d_maps, d_output, d_queries, d_previous, deltas, tokens,
                *_factors(ctx.scaling), ACCUMULATES=d_previous is not None, **constants,
            )  # fmt: skip
            key_gradient_kernel[images * heads, ceil_div(tokens, constants["COLUMNS"])](
                queries, keys, values, maps, highest, shares, d_maps, d_output, deltas, d_keys, d_values, tokens,
                *_factors(ctx.scaling), **constants,
            )  # fmt: skip
        return d_queries, d_keys, d_values, d_previous, None, None


def _constants(queries: torch.Tensor, weighted: torch.Tensor | None, heads: int) -> dict:
    """What the kernels of training are compiled for."""
    tiles = _tiles(queries, heads, training=True)
    return dict(
        **_widths(queries, heads), H=heads, ROWS=tiles.rows, COLUMNS=tiles.columns,
        WEIGHTS=weighted is not None, PRECISION=precision(), num_warps=tiles.warps,
    )  # fmt: skip


def _tiles(queries: torch.Tensor, heads: int, training: bool) -> MapTiles:
    kernels = Kernels("map", training, queries.dtype, heads, queries.shape[-1] // heads)
    return tiles_for(kernels, queries.device)


def _widths(queries: torch.Tensor, heads: int) -> dict[str, int]:
    width = queries.shape[-1] // heads
    return {"D": width, "DP": max(16, power_of_two(width))}  # 16 is a product's smallest side


def _factors(scaling: float) -> tuple[float, float]:
    return scaling / math.log(2), scaling


def _strides(previous: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if previous is None else previous.stride()


def _stages(padded_width: int, itemsize: int) -> int:
    """How many steps are loaded at a time: what the smallest GPU has room for."""
    return 2 if padded_width * itemsize <= 64 else 1
