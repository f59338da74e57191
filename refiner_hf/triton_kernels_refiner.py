# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The passes of the refinement as Triton kernels: `exact_refiner.py` says what each is for, `triton_refiner.py` calls
them.

A program takes a block of PIXELS neighbouring positions of one image's maps, a position being a pair (query, key), and
the expanded heads CHANNELS at a time: an expanded tile is (CHANNELS, PIXELS) and lives in registers. Where the
convolution looks at a neighbour, that neighbour is expanded again: the map's own few channels come from the cache, and
the product is what tensor cores do best. Products and sums are in float32, whatever the maps are.

Names: H heads, E expanded heads, N tokens, K side of the kernel; HP is H padded to what a product needs. Indices: h
over heads, e over expanded heads, p over positions.
"""

# Annotations as text, so that a machine without triton can import this file.
from __future__ import annotations


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def _jit(function):
    return function if triton is None else triton.jit(function)


@_jit
def _load_maps(maps, h, p, inside, area, H: tl.constexpr):
    """Some positions of an image's maps, (HP, PIXELS), zero where there is nothing."""
    mask = (h < H)[:, None] & inside[None, :]
    return tl.load(maps + h[:, None] * area + p[None, :], mask=mask, other=0.0).to(tl.float32)


@_jit
def _store_maps(maps, values, h, p, inside, area, H: tl.constexpr):
    mask = (h < H)[:, None] & inside[None, :]
    tl.store(maps + h[:, None] * area + p[None, :], values.to(maps.dtype.element_ty), mask=mask)


@_jit
def _vector(vector, i, size: tl.constexpr):
    """A short vector as a column, zero beyond its end."""
    return tl.load(vector + i, mask=i < size, other=0.0)[:, None]


@_jit
def _matrix(matrix, i, j, rows: tl.constexpr, columns: tl.constexpr):
    """A piece of a row-major matrix, zero beyond its end."""
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(matrix + i[:, None] * columns + j[None, :], mask=mask, other=0.0)


@_jit
def _relu6(values):
    # As torch's, it hands on what isn't a number.
    values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(values, 6.0, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _relu6_backward(gradient, activated):
    return tl.where((activated <= 0.0) | (activated >= 6.0), 0.0, gradient)


@_jit
def _expand(
    maps, weight, bias, h, e, p, inside, area,
    H: tl.constexpr, E: tl.constexpr, EXPANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h1, (CHANNELS, PIXELS). Outside the image it is 0, and not relu6(bias): padding comes after the activation."""
    if EXPANDS:
        values = tl.dot(weight, _load_maps(maps, h, p, inside, area, H), input_precision=PRECISION)
        return tl.where(inside[None, :], _relu6(values + bias), 0.0)
    else:
        return _load_maps(maps, e, p, inside, area, E)


@_jit
def _convolve(
    maps, weight, bias, local, h, e, p, inside, N,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """local * h1, (CHANNELS, PIXELS)."""
    row, column = p // N, p % N
    values = tl.zeros((e.shape[0], p.shape[0]), tl.float32)
    for tap in range(K * K):
        down, right = tap // K - K // 2, tap % K - K // 2
        there = _inside_image(row + down, column + right, inside, N)
        h1 = _expand(maps, weight, bias, h, e, p + down * N + right, there, N * N, H, E, EXPANDS, PRECISION)
        values += tl.load(local + e * (K * K) + tap, mask=e < E, other=0.0)[:, None] * h1
    return values


@_jit
def _inside_image(row, column, inside, N):
    return inside & (row >= 0) & (row < N) & (column >= 0) & (column < N)


@_jit
def _expansion_weights(
    weight, bias, h, e, H: tl.constexpr, E: tl.constexpr, EXPANDS: tl.constexpr
):  # fmt: skip
    if EXPANDS:
        return _matrix(weight, e, h, E, H), _vector(bias, e, E)
    else:
        return 0.0, 0.0


@_jit
def map_moments_kernel(
    maps, means, scatters, N,
    STEPS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Mean (programs, H) and scatter (programs, H, H) of STEPS blocks of positions."""
    image, group, groups = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    area, h = N * N, tl.arange(0, HP)
    maps += image.to(tl.int64) * H * area
    p = group * STEPS * PIXELS + tl.arange(0, PIXELS)
    first = _load_maps(maps, h, p, p < area, area, H)
    # Sums about some value near the mean don't cancel.
    about = (tl.sum(first, 1) / tl.sum((p < area).to(tl.float32), 0))[:, None]
    sums, scatter, count = tl.zeros((HP,), tl.float32), tl.zeros((HP, HP), tl.float32), 0.0
    for _ in range(STEPS):
        inside = p < area
        values = tl.where(inside[None, :], _load_maps(maps, h, p, inside, area, H) - about, 0.0)
        sums += tl.sum(values, 1)
        scatter += tl.dot(values, tl.trans(values), input_precision="tf32x3")
        count += tl.sum(inside.to(tl.float32), 0)
        p += PIXELS
    program = image * groups + group
    tl.store(means + program * H + h, tl.reshape(about, (HP,)) + sums / count, mask=h < H)
    scatter -= sums[:, None] * sums[None, :] / count
    mask = (h < H)[:, None] & (h < H)[None, :]
    tl.store(scatters + program * H * H + h[:, None] * H + h[None, :], scatter, mask=mask)


@_jit
def local_moments_kernel(
    maps, weight, bias, local, means, scatters, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares about it of z2, (programs, E) each, over one block of positions."""
    block, image, blocks = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    h, e = tl.arange(0, HP), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p = block * PIXELS + tl.arange(0, PIXELS)
    inside = p < N * N
    maps += image.to(tl.int64) * H * N * N
    w1, b1 = _expansion_weights(weight, bias, h, e, H, E, EXPANDS)
    z2 = _convolve(maps, w1, b1, local, h, e, p, inside, N, H, E, K, EXPANDS, PRECISION)
    mean = tl.sum(z2, 1) / tl.sum(inside.to(tl.float32), 0)
    centred = tl.where(inside[None, :], z2 - mean[:, None], 0.0)
    program = image * blocks + block
    tl.store(means + program * E + e, mean, mask=e < E)
    tl.store(scatters + program * E + e, tl.sum(centred * centred, 1), mask=e < E)


@_jit
def project_kernel(
    maps, weight, bias, local, local_bias, reduction, identity, constant, output, means, scatters, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """
    With MOMENTS z3 and, over the block, the means of z3 and of the map (programs, 2, H) and the sums of squares of z3
    and of its products with the map about the means (programs, 2, H). Without, the refined map in evaluation: z3
    plus `identity` times the map plus `constant`.
    """
    block, image, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    area, h = N * N, tl.arange(0, HP)
    p = block * PIXELS + tl.arange(0, PIXELS)
    inside = p < area
    maps += image.to(tl.int64) * H * area
    output += image.to(tl.int64) * H * area
    z3 = tl.zeros((HP, PIXELS), tl.float32)
    for start in range(0, E, CHANNELS):
        e = start + tl.arange(0, CHANNELS)
        w1, b1 = _expansion_weights(weight, bias, h, e, H, E, EXPANDS)
        n2 = _convolve(maps, w1, b1, local, h, e, p, inside, N, H, E, K, EXPANDS, PRECISION)
        h2 = _relu6(n2 + _vector(local_bias, e, E))
        z3 += tl.dot(_matrix(reduction, h, e, H, E), h2, input_precision=PRECISION)
    own = _load_maps(maps, h, p, inside, area, H)
    if MOMENTS:
        count = tl.sum(inside.to(tl.float32), 0)
        z3 = tl.where(inside[None, :], z3, 0.0)
        mean_z, mean_a = tl.sum(z3, 1) / count, tl.sum(own, 1) / count
        centred = tl.where(inside[None, :], z3 - mean_z[:, None], 0.0)
        target = (image * blocks + block) * 2 * H + h
        tl.store(means + target, mean_z, mask=h < H)
        tl.store(means + target + H, mean_a, mask=h < H)
        tl.store(scatters + target, tl.sum(centred * centred, 1), mask=h < H)
        tl.store(scatters + target + H, tl.sum(centred * (own - mean_a[:, None]), 1), mask=h < H)
    else:
        z3 += _vector(identity, h, H) * own + _vector(constant, h, H)
    _store_maps(output, z3, h, p, inside, area, H)


@_jit
def combine_kernel(coefficients, maps, reduced, output, area, H: tl.constexpr, PIXELS: tl.constexpr):
    """c0 z3 + c1 A + c2 for coefficients (3, H), a channel at a time."""
    channel = tl.program_id(0)  # of all images
    h, p = channel % H, tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    offset = channel.to(tl.int64) * area
    a = tl.load(maps + offset + p, mask=p < area, other=0.0).to(tl.float32)
    z3 = tl.load(reduced + offset + p, mask=p < area, other=0.0).to(tl.float32)
    values = tl.load(coefficients + h) * z3 + tl.load(coefficients + H + h) * a + tl.load(coefficients + 2 * H + h)
    tl.store(output + offset + p, values.to(output.dtype.element_ty), mask=p < area)


@_jit
def outer_sums_kernel(gradient, maps, reduced, mean, sums, area, H: tl.constexpr, PIXELS: tl.constexpr):
    """Sums of d, d (A - mean) and d (z3 - mean) over a block of a channel, (programs, 3, H); `mean` is (2, H)."""
    channel, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, h = channel // H, channel % H
    p = block * PIXELS + tl.arange(0, PIXELS)
    offset = channel.to(tl.int64) * area
    d = tl.load(gradient + offset + p, mask=p < area, other=0.0).to(tl.float32)  # 0 outside, and all sums have it
    a = tl.load(maps + offset + p, mask=p < area, other=0.0).to(tl.float32) - tl.load(mean + h)
    z3 = tl.load(reduced + offset + p, mask=p < area, other=0.0).to(tl.float32) - tl.load(mean + H + h)
    target = sums + (image * blocks + block) * 3 * H + h
    tl.store(target, tl.sum(d, 0))
    tl.store(target + H, tl.sum(d * a, 0))
    tl.store(target + 2 * H, tl.sum(d * z3, 0))


@_jit
def _combination(gradient, maps, reduced, coefficients, h, p, inside, area, H: tl.constexpr):
    """c0 d + c1 A + c2 z3 + c3 for coefficients (4, H), (HP, PIXELS), zero outside."""
    values = _vector(coefficients, h, H) * _load_maps(gradient, h, p, inside, area, H)
    values += _vector(coefficients + H, h, H) * _load_maps(maps, h, p, inside, area, H)
    values += _vector(coefficients + 2 * H, h, H) * _load_maps(reduced, h, p, inside, area, H)
    return tl.where(inside[None, :], values + _vector(coefficients + 3 * H, h, H), 0.0)


@_jit
def _second_norm_gradient(
    gradient, maps, reduced, coefficients, w1, b1, local, local_bias, gain, offset, reduction, h, e, p, inside, N,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dn2, z2^ and h2, (CHANNELS, PIXELS), and dz3 (HP, PIXELS)."""
    normalised = _convolve(maps, w1, b1, local, h, e, p, inside, N, H, E, K, EXPANDS, PRECISION)
    normalised += _vector(local_bias, e, E)
    h2 = _relu6(_vector(gain, e, E) * normalised + _vector(offset, e, E))
    dz3 = _combination(gradient, maps, reduced, coefficients, h, p, inside, N * N, H)
    dn2 = tl.dot(tl.trans(_matrix(reduction, h, e, H, E)), dz3, input_precision=PRECISION)
    return _relu6_backward(dn2, h2), normalised, h2, dz3


@_jit
def reduction_backward_kernel(
    gradient, maps, reduced, coefficients, weight, bias, local, local_bias, gain, offset, reduction,
    sums, products, reduction_gradient, N,
    STEPS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over STEPS blocks: of dn2 and of dn2 z2^, (programs, E), and of dz3 h2^T, (programs, H, E)."""
    group, image, groups = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    h, e = tl.arange(0, HP), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    area = N * N
    start = image.to(tl.int64) * H * area
    gradient, maps, reduced = gradient + start, maps + start, reduced + start
    w1, b1 = _expansion_weights(weight, bias, h, e, H, E, EXPANDS)
    sum_n, sum_nz = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    outer = tl.zeros((HP, CHANNELS), tl.float32)
    for step in range(STEPS):
        p = (group * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        dn2, normalised, h2, dz3 = _second_norm_gradient(
            gradient, maps, reduced, coefficients, w1, b1, local, local_bias, gain, offset, reduction,
            h, e, p, p < area, N, H, E, K, EXPANDS, PRECISION,
        )  # fmt: skip
        sum_n += tl.sum(dn2, 1)
        sum_nz += tl.sum(dn2 * normalised, 1)
        outer += tl.dot(dz3, tl.trans(h2), input_precision=PRECISION)
    program = image * groups + group
    tl.store(sums + program * E + e, sum_n, mask=e < E)
    tl.store(products + program * E + e, sum_nz, mask=e < E)
    mask = (h < H)[:, None] & (e < E)[None, :]
    tl.store(reduction_gradient + program * H * E + h[:, None] * E + e[None, :], outer, mask=mask)


@_jit
def local_gradient_kernel(
    gradient, maps, reduced, coefficients, weight, bias, local, local_bias, gain, offset, reduction,
    second_norm, exchange, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz2 = s0 dn2 + s1 z2^ + s2 for `second_norm` (3, E), into `exchange` (images, E, N, N)."""
    image, area, h = tl.program_id(2), N * N, tl.arange(0, HP)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    start = image.to(tl.int64) * H * area
    w1, b1 = _expansion_weights(weight, bias, h, e, H, E, EXPANDS)
    dn2, normalised, _, _ = _second_norm_gradient(
        gradient + start, maps + start, reduced + start, coefficients, w1, b1, local, local_bias, gain, offset,
        reduction, h, e, p, p < area, N, H, E, K, EXPANDS, PRECISION,
    )  # fmt: skip
    dz2 = _vector(second_norm, e, E) * dn2 + _vector(second_norm + E, e, E) * normalised
    dz2 += _vector(second_norm + 2 * E, e, E)
    _store_maps(exchange + image.to(tl.int64) * E * area, dz2, e, p, p < area, area, E)


@_jit
def expansion_backward_kernel(
    maps, weight, bias, local, exchange, centre, part, local_gradient, sums, products, N,
    STEPS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    TAPS: tl.constexpr, EXPANDS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    From dz2 in `exchange`: dh1 and g, their sums over STEPS blocks (dW2 (programs, E, K K), of g (programs, E), of
    g (A - centre)^T (programs, E, H)), and W1^T g into `part`, float32; without expansion dh1 itself.
    """
    group, image, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    area, h, taps = N * N, tl.arange(0, HP), tl.arange(0, TAPS)
    program = image * groups + group
    maps += image.to(tl.int64) * H * area
    part += image.to(tl.int64) * H * area
    exchange += image.to(tl.int64) * E * area
    for start in range(0, E, CHANNELS):
        e = start + tl.arange(0, CHANNELS)
        w1, b1 = _expansion_weights(weight, bias, h, e, H, E, EXPANDS)
        sum_g, sum_ga = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS, HP), tl.float32)
        sum_taps = tl.zeros((CHANNELS, TAPS), tl.float32)
        for step in range(STEPS):
            p = (group * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
            inside, row, column = p < area, p // N, p % N
            h1 = _expand(maps, w1, b1, h, e, p, inside, area, H, E, EXPANDS, PRECISION)
            dh1 = tl.zeros((CHANNELS, PIXELS), tl.float32)
            for tap in range(K * K):
                down, right = tap // K - K // 2, tap % K - K // 2
                there = _inside_image(row - down, column - right, inside, N)
                dz2 = _load_maps(exchange, e, p - down * N - right, there, area, E)
                dh1 += tl.load(local + e * (K * K) + tap, mask=e < E, other=0.0)[:, None] * dz2
                sum_taps += tl.where(taps[None, :] == tap, tl.sum(dz2 * h1, 1)[:, None], 0.0)
            if EXPANDS:
                g = _relu6_backward(dh1, h1)
                own = _load_maps(maps, h, p, inside, area, H)
                sum_g += tl.sum(g, 1)
                # Where g is 0 it doesn't matter what it is multiplied with, so nothing need be cut off outside.
                sum_ga += tl.dot(g, tl.trans(own - _vector(centre, h, H)), input_precision=PRECISION)
                share = tl.dot(tl.trans(w1), g, input_precision=PRECISION)
                if start > 0:  # the positions are this program's own, so nobody else writes here
                    share += _load_maps(part, h, p, inside, area, H)
                _store_maps(part, share, h, p, inside, area, H)
            else:
                _store_maps(part, dh1, e, p, inside, area, E)
        mask = (e < E)[:, None] & (taps < K * K)[None, :]
        tl.store(local_gradient + (program * E + e[:, None]) * (K * K) + taps[None, :], sum_taps, mask=mask)
        if EXPANDS:
            tl.store(sums + program * E + e, sum_g, mask=e < E)
            mask = (e < E)[:, None] & (h < H)[None, :]
            tl.store(products + (program * E + e[:, None]) * H + h[None, :], sum_ga, mask=mask)


@_jit
def finish_kernel(
    part, gradient, maps, reduced, coefficients, mixing, output, N,
    H: tl.constexpr, HP: tl.constexpr, MIXES: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part + c0 d + c1 A + c2 z3 + c3 + mixing A."""
    area, h = N * N, tl.arange(0, HP)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = p < area
    start = tl.program_id(1).to(tl.int64) * H * area
    maps += start
    values = _load_maps(part + start, h, p, inside, area, H)
    values += _combination(gradient + start, maps, reduced + start, coefficients, h, p, inside, area, H)
    if MIXES:
        own = _load_maps(maps, h, p, inside, area, H)
        values += tl.dot(_matrix(mixing, h, h, H, H), own, input_precision=PRECISION)
    _store_maps(output + start, values, h, p, inside, area, H)
