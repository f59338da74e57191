# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
A layer's own map as Triton kernels: scores, softmax, the map of the layer before, and the product with the values.
`triton_attention_refiner.py` calls them.

A program makes ROWS rows of a map, one block of COLUMNS keys after the other. It goes over the keys twice, first for
each row's largest score and the sum of its exponentials, then for the map. The scores of whole rows would fit in no
register file, and to compute them again costs less than to keep them.

In inference maps go between layers packed, as `packed_maps_refiner.py` says: a position has its heads side by side. So
there a program makes its rows for all heads. In training a program makes those of one head; backward needs the map and
two numbers of each row, and computes the softmax again.

What the arguments are called in every kernel: queries, keys and values are (images, N, H D), maps (images, H, N, N),
"d_" is before a gradient. `previous` is the map to add, with its four strides; `factor` is scaling / log(2), as
exponentials are powers of two. HD and DP are powers of two for the products, not below H and D.
"""

# Annotations as text, so that a machine without triton can import this file.
from __future__ import annotations

from .triton_launch_refiner import jit, tl


# --- inference ---


@jit
def _positions(start, N, HALF: tl.constexpr, SIZE: tl.constexpr):
    """Some places along a side of a packed map, counted from the map's own first; and which are within the map."""
    place = start + tl.arange(0, SIZE) - HALF
    return place, (place >= 0) & (place < N)


@jit
def _scores(queries, keys, column, real, h, d, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Products of queries (heads, ROWS, D) with some keys, (heads, ROWS, COLUMNS); -inf where there is no key."""
    offsets = column[None, None, :] * (H * D) + h[:, None, None] * D + d[None, :, None]
    mask = (h < H)[:, None, None] & (d < D)[None, :, None] & real[None, None, :]
    products = tl.dot(queries, tl.load(keys + offsets, mask=mask, other=0.0), input_precision=PRECISION)
    return tl.where(real[None, None, :], products, float("-inf"))


@jit
def packed_map_kernel(
    queries, keys, values, previous, packed, output, N, factor, scaling,
    image_stride, head_stride, row_stride, column_stride,
    H: tl.constexpr, HD: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACCUMULATES: tl.constexpr, PREVIOUS_PACKED: tl.constexpr, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    Writes `packed`, softmax(queries keys^T scaling) + scaling * previous, with its border; with WEIGHTS also `output`,
    the map times the values, (images, N, H D).

    `previous` is packed itself with PREVIOUS_PACKED. Rounded to the maps' type is only the sum.
    """
    image, side = tl.program_id(1).to(tl.int64), N + 2 * HALF
    h, d = tl.arange(0, HD), tl.arange(0, DP)
    row, real_row = _positions(tl.program_id(0) * ROWS, N, HALF, ROWS)
    queries += image * N * (H * D)
    keys += image * N * (H * D)
    packed += image * side * side * HP
    of_tokens = row[None, :, None] * (H * D) + h[:, None, None] * D + d[None, None, :]
    mask_of_tokens = (h < H)[:, None, None] & real_row[None, :, None] & (d < D)[None, None, :]
    query = tl.load(queries + of_tokens, mask=mask_of_tokens, other=0.0)

    highest, total = tl.full((HD, ROWS), float("-inf"), tl.float32), tl.zeros((HD, ROWS), tl.float32)
    for start in range(0, side, COLUMNS):
        column, real = _positions(start, N, HALF, COLUMNS)
        scores = _scores(query, keys, column, real, h, d, H, D, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, 2))
        total *= tl.exp2(highest * factor - higher * factor)
        total += tl.sum(tl.exp2(scores * factor - (higher * factor)[:, :, None]), 2)
        highest = higher

    share, highest = 1.0 / total, highest * factor
    if WEIGHTS:
        weighted = tl.zeros((HD, ROWS, DP), tl.float32)
    for start in range(0, side, COLUMNS):
        column, real = _positions(start, N, HALF, COLUMNS)
        scores = _scores(query, keys, column, real, h, d, H, D, PRECISION)
        attention_map = tl.exp2(scores * factor - highest[:, :, None]) * share[:, :, None]
        inside = real_row[:, None] & real[None, :]
        if ACCUMULATES:
            mask = inside[:, :, None]
            if not PREVIOUS_PACKED:  # else there is something to read behind the heads, too, and whole vectors come in
                mask = mask & (h < H)[None, None, :]
            offsets = row[:, None, None] * row_stride + column[None, :, None] * column_stride
            before = previous + image * image_stride + offsets + h[None, None, :] * head_stride
            before = tl.permute(tl.load(before, mask=mask, other=0.0), (2, 0, 1))
            attention_map += scaling * before.to(tl.float32)
        attention_map = attention_map.to(packed.dtype.element_ty)
        if WEIGHTS:
            offsets = column[None, :, None] * (H * D) + h[:, None, None] * D + d[None, None, :]
            mask = (h < H)[:, None, None] & real[None, :, None] & (d < D)[None, None, :]
            value = tl.load(values + image * N * (H * D) + offsets, mask=mask, other=0.0)
            weighted = tl.dot(attention_map, value, acc=weighted, input_precision=PRECISION)

        one = tl.where(h == H, 1.0, 0.0).to(attention_map.dtype)
        position = tl.where((h < H)[None, None, :], tl.permute(attention_map, (1, 2, 0)), one[None, None, :])
        position = tl.where(inside[:, :, None], position, 0.0)
        target = packed + ((row + HALF)[:, None] * side + (column + HALF)[None, :])[:, :, None] * HP
        mask = ((row < N + HALF)[:, None] & (column < N + HALF)[None, :])[:, :, None]
        tl.store(target + h[None, None, :], position, mask=mask)
        if HP > HD:  # as many heads as go into a product: the one comes behind them
            behind = HD + tl.arange(0, HP - HD)
            ones = tl.where(inside[:, :, None] & (behind == H)[None, None, :], 1.0, 0.0)
            tl.store(target + behind[None, None, :], ones.to(attention_map.dtype), mask=mask)
    if WEIGHTS:
        output += image * N * (H * D)
        tl.store(output + of_tokens, weighted.to(output.dtype.element_ty), mask=mask_of_tokens)


# --- training ---


@jit
def _tokens(tokens, place, d, H: tl.constexpr, D: tl.constexpr, N):
    """A head's part of some tokens, (SIZE, DP), zero where there are none."""
    mask = ((place >= 0) & (place < N))[:, None] & (d < D)[None, :]
    return tl.load(tokens + place[:, None] * (H * D) + d[None, :], mask=mask, other=0.0)


@jit
def _of_head(N, H: tl.constexpr, D: tl.constexpr):
    """Where a program's image and head begin: among tokens, among rows, in maps."""
    channel = tl.program_id(0).to(tl.int64)
    return channel // H * N * (H * D) + channel % H * D, channel * N, channel * N * N


@jit
def _products(query, key, column, N, PRECISION: tl.constexpr):
    """Products of queries (ROWS, DP) with keys (COLUMNS, DP), -inf where there is no key."""
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    return tl.where((column < N)[None, :], products, float("-inf"))


@jit
def _softmax(query, key, highest, share, column, N, factor, PRECISION: tl.constexpr):
    """The softmax of some rows, of which the largest score (as a power of two) and the shares are known."""
    products = _products(query, key, column, N, PRECISION)
    return tl.exp2(products * factor - highest[:, None]) * share[:, None]


@jit
def map_kernel(
    queries, keys, values, previous, maps, output, highest, shares, N, factor, scaling,
    image_stride, head_stride, row_stride, column_stride,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACCUMULATES: tl.constexpr, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    Writes `maps`, softmax(queries keys^T scaling) + scaling * previous, and of each row, (images, H, N), the largest
    score as a power of two and one over the sum of the exponentials; with WEIGHTS also `output`, maps times values.
    """
    tokens, rows, places = _of_head(N, H, D)
    row, d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    query = _tokens(queries + tokens, row, d, H, D, N)
    largest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        products = _products(query, _tokens(keys + tokens, column, d, H, D, N), column, N, PRECISION)
        larger = tl.maximum(largest, tl.max(products, 1))
        total *= tl.exp2(largest * factor - larger * factor)
        total += tl.sum(tl.exp2(products * factor - (larger * factor)[:, None]), 1)
        largest = larger
    largest, share = largest * factor, 1.0 / total
    tl.store(highest + rows + row, largest, mask=row < N)
    tl.store(shares + rows + row, share, mask=row < N)
    weighted = tl.zeros((ROWS, DP), tl.float32)
    channel = tl.program_id(0).to(tl.int64)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key = _tokens(keys + tokens, column, d, H, D, N)
        attention_map = _softmax(query, key, largest, share, column, N, factor, PRECISION)
        inside = (row < N)[:, None] & (column < N)[None, :]
        if ACCUMULATES:
            before = previous + channel // H * image_stride + channel % H * head_stride
            before += row[:, None] * row_stride + column[None, :] * column_stride
            attention_map += scaling * tl.load(before, mask=inside, other=0.0).to(tl.float32)
        attention_map = attention_map.to(maps.dtype.element_ty)
        tl.store(maps + places + row[:, None] * N + column[None, :], attention_map, mask=inside)
        if WEIGHTS:
            value = _tokens(values + tokens, column, d, H, D, N)
            weighted = tl.dot(attention_map, value, acc=weighted, input_precision=PRECISION)
    if WEIGHTS:
        mask = (row < N)[:, None] & (d < D)[None, :]
        target = output + tokens + row[:, None] * (H * D) + d[None, :]
        tl.store(target, weighted.to(output.dtype.element_ty), mask=mask)


@jit
def _map_gradient(
    d_maps, places, d_weighted, value, row, column, N,
    HAS_MAPS: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reaches some places of a map: from who else has it, and from the weighted values, (ROWS, COLUMNS)."""
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    if WEIGHTS:
        gradient = tl.dot(d_weighted, tl.trans(value), acc=gradient, input_precision=PRECISION)
    if HAS_MAPS:
        inside = (row < N)[:, None] & (column < N)[None, :]
        given = tl.load(d_maps + places + row[:, None] * N + column[None, :], mask=inside, other=0.0)
        gradient += given.to(tl.float32)
    return gradient


@jit
def query_gradient_kernel(
    queries, keys, values, highest, shares, d_maps, d_output, d_queries, d_previous, deltas, N, factor, scaling,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_MAPS: tl.constexpr, WEIGHTS: tl.constexpr, ACCUMULATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    The queries' gradient; with ACCUMULATES that of `previous`; and in `deltas` (images, H, N) each row's sum of the
    softmax times the map's gradient. HAS_MAPS and WEIGHTS say where gradients come from.
    """
    tokens, rows, places = _of_head(N, H, D)
    row, d = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    query = _tokens(queries + tokens, row, d, H, D, N)
    largest = tl.load(highest + rows + row, mask=row < N, other=0.0)
    share = tl.load(shares + rows + row, mask=row < N, other=0.0)
    d_weighted = query
    if WEIGHTS:
        d_weighted = _tokens(d_output + tokens, row, d, H, D, N)
    delta = tl.zeros((ROWS,), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key = _tokens(keys + tokens, column, d, H, D, N)
        value = key
        if WEIGHTS:
            value = _tokens(values + tokens, column, d, H, D, N)
        gradient = _map_gradient(
            d_maps, places, d_weighted, value, row, column, N, HAS_MAPS, WEIGHTS, ROWS, COLUMNS, PRECISION
        )
        delta += tl.sum(_softmax(query, key, largest, share, column, N, factor, PRECISION) * gradient, 1)
    tl.store(deltas + rows + row, delta, mask=row < N)
    d_query = tl.zeros((ROWS, DP), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key = _tokens(keys + tokens, column, d, H, D, N)
        value = key
        if WEIGHTS:
            value = _tokens(values + tokens, column, d, H, D, N)
        gradient = _map_gradient(
            d_maps, places, d_weighted, value, row, column, N, HAS_MAPS, WEIGHTS, ROWS, COLUMNS, PRECISION
        )
        if ACCUMULATES:
            target = d_previous + places + row[:, None] * N + column[None, :]
            inside = (row < N)[:, None] & (column < N)[None, :]
            tl.store(target, (scaling * gradient).to(d_previous.dtype.element_ty), mask=inside)
        softmax = _softmax(query, key, largest, share, column, N, factor, PRECISION)
        d_scores = (softmax * (gradient - delta[:, None])).to(key.dtype)
        d_query = tl.dot(d_scores, key, acc=d_query, input_precision=PRECISION)
    target = d_queries + tokens + row[:, None] * (H * D) + d[None, :]
    mask = (row < N)[:, None] & (d < D)[None, :]
    tl.store(target, (scaling * d_query).to(d_queries.dtype.element_ty), mask=mask)


@jit
def key_gradient_kernel(
    queries, keys, values, maps, highest, shares, d_maps, d_output, deltas, d_keys, d_values, N, factor, scaling,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_MAPS: tl.constexpr, WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and, with WEIGHTS, of values, for COLUMNS of them; after [`query_gradient_kernel`]."""
    tokens, rows, places = _of_head(N, H, D)
    column, d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DP)
    key = _tokens(keys + tokens, column, d, H, D, N)
    value = key
    if WEIGHTS:
        value = _tokens(values + tokens, column, d, H, D, N)
    d_key, d_value = tl.zeros((COLUMNS, DP), tl.float32), tl.zeros((COLUMNS, DP), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)
        query = _tokens(queries + tokens, row, d, H, D, N)
        largest = tl.load(highest + rows + row, mask=row < N, other=0.0)
        share = tl.load(shares + rows + row, mask=row < N, other=0.0)
        delta = tl.load(deltas + rows + row, mask=row < N, other=0.0)
        d_weighted = query
        if WEIGHTS:
            d_weighted = _tokens(d_output + tokens, row, d, H, D, N)
            inside = (row < N)[:, None] & (column < N)[None, :]
            own = tl.load(maps + places + row[:, None] * N + column[None, :], mask=inside, other=0.0)
            d_value = tl.dot(tl.trans(own), d_weighted, acc=d_value, input_precision=PRECISION)
        gradient = _map_gradient(
            d_maps, places, d_weighted, value, row, column, N, HAS_MAPS, WEIGHTS, ROWS, COLUMNS, PRECISION
        )
        softmax = _softmax(query, key, largest, share, column, N, factor, PRECISION)
        d_scores = (softmax * (gradient - delta[:, None])).to(key.dtype)
        d_key = tl.dot(tl.trans(d_scores), query, acc=d_key, input_precision=PRECISION)
    offsets = tokens + column[:, None] * (H * D) + d[None, :]
    mask = (column < N)[:, None] & (d < D)[None, :]
    tl.store(d_keys + offsets, (scaling * d_key).to(d_keys.dtype.element_ty), mask=mask)
    if WEIGHTS:
        tl.store(d_values + offsets, d_value.to(d_values.dtype.element_ty), mask=mask)
