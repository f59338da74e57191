# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Maps as the Triton kernels want them: packed, a position's heads side by side, padded to HP of them, a one behind the
H heads, and zeros around the map, as many as the convolution reaches over its edge. (`triton_kernels_refiner.py` says
what for.)

A packed map also goes from layer to layer as a usual tensor (B, H, N, N): a view of the packed one, which anybody can
read and even change. The kernels know it again by its strides, and needn't pack it.
"""

import torch


MAX_HEADS = 16  # that the kernels take
# Elements behind packed maps, with nothing in them: so no other tensor of their strides has memory of this size.
_BEHIND = 8


def padded_heads(heads: int) -> int:
    """HP: room for the heads and a one behind them, and a product's smallest side, 16."""
    return max(16, 1 << heads.bit_length())


def empty_packed(images: int, heads: int, tokens: int, kernel_size: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for packed maps, (images, N + kernel_size - 1, N + kernel_size - 1, HP), of the type of `like`."""
    side, width = tokens + kernel_size - 1, padded_heads(heads)
    elements = images * side * side * width
    return like.new_empty(elements + _BEHIND)[:elements].view(images, side, side, width)


def as_maps(packed: torch.Tensor, heads: int, kernel_size: int) -> torch.Tensor:
    """Packed maps as maps, (B, H, N, N), in the same memory."""
    half = kernel_size // 2
    inner = slice(half, packed.shape[1] - half)
    return packed[:, inner, inner, :heads].permute(0, 3, 1, 2)


def packed_of(maps: torch.Tensor, kernel_size: int) -> torch.Tensor | None:
    """
    The packed maps of which `maps` (B, H, N, N) are a view, or `None` where they aren't.

    They are known by place and strides, in memory of a size that only [`empty_packed`] takes.
    """
    images, heads, tokens, _ = maps.shape
    width, side, half = padded_heads(heads), tokens + kernel_size - 1, kernel_size // 2
    strides = side * side * width, side * width, width, 1
    is_view = (
        maps.stride() == (strides[0], 1, strides[1], width) and maps.storage_offset() == half * (side + 1) * width
    )
    if not is_view or maps.untyped_storage().nbytes() != (images * strides[0] + _BEHIND) * maps.itemsize:
        return None
    return maps.as_strided((images, side, side, width), strides, 0)
