# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The passes of the refinement as Triton kernels. `recomputing_refiner.py` says what each pass is for, and
`triton_refiner.py` calls the kernels.

Maps are first packed: a position, that is a pair (query, key), with all its heads side by side, HP of them. Behind the
H heads is a one, which the expansion multiplies with its bias. Around an image is a border of zeros, as wide as the
convolution reaches: positions outside of the map need no special case, and expand to 0 as they must. So do those that
a mask hides, which are packed as zeros, too; only sums must leave them out.

A program has BLOCK lanes. A lane walks down one column of an image's map, ROWS rows of it (a strip), and all lanes
take a step together. Expanded tiles are (BLOCK, CHANNELS) and stay in registers. A step reads one row, expands it at K
columns, and adds its share to the K rows whose convolution it belongs to; the first of these is then complete. So a
position is expanded K times, not K K times. Sums are in float32, whatever the type of the maps.

Indices: h over the heads of a packed position, e over expanded heads, p over positions. "d" is before a gradient, "^"
behind what is normalised.

What the arguments are called in every kernel; each docstring has the rest. Maps are of any float type, sums and
vectors in float32.

    maps               A, the maps to refine, (images, H, N, N)
    packed             the same, packed, (images, N + K - 1, N + K - 1, HP)
    real               the mask, bytes (images, N, N) that are zero where a place isn't real
    reduced            z3, what the reduction gives, (images, H, N, N)
    gradient           d, that of the refined maps, (images, H, N, N)
    reduced_gradient   dz3 with its heads side by side and no border, (images, N N, HP)
    exchange           dz2, packed as `packed` is, with expanded heads for heads
    part               what reaches A through the expansion, (images, N N, H)
    output             what the kernel is for
    weight, bias       the expansion with its norm, (E, H) and (E,)
    local, local_bias  the local attention with its norm, (E, K K) and (E,); in backward without its gain and bias
    reduction          (H, E)
    gain, offset       h2 = relu6(gain z2^ + offset), both (E,)
    identity, constant refined = z3 + identity A + constant, both (H,)
    coefficients       factors of a sum of maps, a row (H,) for each
    counts, means, scatters   moments, one row for each program: how many values, their mean, sums about it
    sums               other sums, one row for each program

    N, area            tokens; N N

and what the kernels are compiled for:

    H, HP              heads; numbers of a packed position: a power of two above H, at least 16
    E, K               expanded heads; side of the convolution's kernel
    EXPANDS            whether there is an expansion (else E is H, and h1 is A)
    ROWS, BLOCK        rows of a lane's strip; lanes of a program
    CHANNELS, BLOCKS   expanded heads of a tile; how many tiles hold all of them
    PRECISION          of products of float32 numbers: "tf32" or "tf32x3"
    MOMENTS            whether moments are wanted, as in training
    MASKED             whether there is a mask
"""

# Annotations as text, so that a machine without triton can import this file.
from __future__ import annotations

from .triton_launch_refiner import jit, tl


# --- what programs are made of ---


@jit
def _lanes(N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first row and the column of each lane. Lanes too many begin below the map."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return lane // N * ROWS, lane % N


@jit
def _real(packed, p, inside, H: tl.constexpr, HP: tl.constexpr):
    """Which of some packed positions aren't hidden by a mask: those that have a one behind their heads."""
    return inside & (tl.load(packed + p * HP + H, mask=inside, other=0.0) != 0.0)


@jit
def _counts(count, first, N, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """How many values each lane has: what it counted, or its rows of the map."""
    if MASKED:
        return count
    else:
        return tl.minimum(tl.maximum(N - first, 0), ROWS).to(tl.float32)


@jit
def _counted(
    count, complete, packed, p, step, H: tl.constexpr, HP: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr
):
    """Of a step: which lanes' values count, how many each has counted, and by what its mean is divided."""
    if MASKED:
        real = _real(packed, p, complete, H, HP)
        count += real.to(tl.float32)
        return real, count, tl.maximum(count, 1.0)[:, None]
    else:
        return complete, count, tl.maximum(step - (K - 2), 1)


@jit
def _mean(means, counts):
    """How many values all lanes have, and their mean, from the lanes' own (BLOCK, channels)."""
    total = tl.sum(counts, 0)
    return total, tl.sum(counts[:, None] * means, 0) / tl.maximum(total, 1.0)


@jit
def _load_heads(maps, h, p, inside, area, H: tl.constexpr):
    """Some positions of an image's unpacked maps, (heads, BLOCK), zero where there is nothing."""
    mask = (h < H)[:, None] & inside[None, :]
    return tl.load(maps + h[:, None] * area + p[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _load_packed(maps, h, p, inside, width: tl.constexpr):
    """Some positions, (BLOCK, heads), in the maps' own type."""
    return tl.load(maps + p[:, None] * width + h[None, :], mask=inside[:, None], other=0.0)


@jit
def _number(vector, i):
    return tl.load(vector + i).to(tl.float32)


@jit
def _vector(vector, i, size: tl.constexpr):
    """A short vector, zero beyond its end."""
    return tl.load(vector + i, mask=i < size, other=0.0).to(tl.float32)


@jit
def _matrix(matrix, i, j, rows: tl.constexpr, columns: tl.constexpr):
    """A piece of a row-major matrix, zero beyond its end."""
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(matrix + i[:, None] * columns + j[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _relu6(values):
    # As torch's, it hands on what isn't a number.
    values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(values, 6.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _relu6_backward(gradient, activated):
    return tl.where((activated <= 0.0) | (activated >= 6.0), 0.0, gradient)


@jit
def _halves(matrix, like):
    """A matrix as a sum of two in the maps' type, which together hold twice its digits; in float32 just itself."""
    high = matrix.to(like.dtype.element_ty)
    if like.dtype.element_ty == tl.float32:
        return high, high
    else:
        return high, (matrix - high.to(tl.float32)).to(like.dtype.element_ty)


@jit
def _product(values, halves, PRECISION: tl.constexpr):
    high, low = halves
    if values.dtype == tl.float32:
        return tl.dot(values, high, input_precision=PRECISION)
    else:
        return tl.dot(values, high, acc=tl.dot(values, low))


@jit
def _expansion(weight, bias, h, e, H: tl.constexpr, E: tl.constexpr, EXPANDS: tl.constexpr):
    """What a packed position is multiplied with to be expanded, (HP, CHANNELS)."""
    if EXPANDS:
        mask = (h < H)[:, None] & (e < E)[None, :]
        values = tl.load(weight + e[None, :] * H + h[:, None], mask=mask, other=0.0).to(tl.float32)
        return tl.where((h == H)[:, None], _vector(bias, e, E)[None, :], values)
    else:
        return tl.where((h[:, None] == e[None, :]) & (e < E)[None, :], 1.0, 0.0)


@jit
def _taps(local, e, E: tl.constexpr, K: tl.constexpr):
    """The convolution's weights, a row (1, CHANNELS) for each of its K K taps."""
    taps = ()
    for tap in tl.static_range(K * K):
        tap_weights = tl.load(local + e * (K * K) + tap, mask=e < E, other=0.0).to(tl.float32)
        taps = taps + (tap_weights[None, :],)
    return taps


@jit
def _channel_block(
    block, weight, bias, local, h, like,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Which CHANNELS expanded heads a block has, what expands to them, and their taps."""
    e = block * CHANNELS + tl.arange(0, CHANNELS)
    return e, _halves(_expansion(weight, bias, h, e, H, E, EXPANDS), like), _taps(local, e, E, K)


@jit
def _expand(values, halves, EXPANDS: tl.constexpr, PRECISION: tl.constexpr):
    """h1 of packed positions, (BLOCK, CHANNELS)."""
    if EXPANDS:
        return _relu6(_product(values, halves, PRECISION))
    else:
        return _product(values, halves, PRECISION)


@jit
def _no_rows(K: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """The K rows under way before the first step."""
    rows = ()
    for _ in tl.static_range(K):
        rows = rows + (tl.zeros((BLOCK, CHANNELS), tl.float32),)
    return rows


@jit
def _add_shares(rows, values, taps, column: tl.constexpr, K: tl.constexpr):
    """Adds a row, seen `column` columns from the left end of the kernel, to all that it has a share in."""
    after = ()
    for row in tl.static_range(K):
        after = after + (rows[row] + taps[(K - 1 - row) * K + column] * values,)
    return after


@jit
def _next(rows):
    """The rows under way once the first is complete."""
    return rows[1:] + (tl.zeros_like(rows[0]),)


@jit
def _completes(step, row, side, K: tl.constexpr):
    """Whether the first of the rows under way is a lane's own, complete with this step, and within the map."""
    return (step >= K - 1) & (row < side)


@jit
def _convolved(
    rows, packed, halves, taps, h, p, inside,
    HP: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of local * h1; p is where the kernel's left end lies."""
    for column in tl.static_range(K):
        h1 = _expand(_load_packed(packed, h, p + column, inside, HP), halves, EXPANDS, PRECISION)
        rows = _add_shares(rows, h1, taps, column, K)
    return rows


# --- evaluation ---


@jit
def _affine(gain, bias, mean, variance, eps, i, size: tl.constexpr):
    """A norm in evaluation, as gain x + bias."""
    scale = _vector(gain, i, size) / tl.sqrt(_vector(variance, i, size) + eps)
    return scale, _vector(bias, i, size) - scale * _vector(mean, i, size)


@jit
def fold_kernel(
    w1, gain1, bias1, mean1, var1, eps1, w2, gain2, bias2, mean2, var2, eps2,
    w3, gain3, bias3, mean3, var3, eps3, gain4, bias4, mean4, var4, eps4,
    scale, expansion, expansion_bias, local, local_bias, reduction, identity, constant,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
    EXPANDS: tl.constexpr,
):  # fmt: skip
    """
    What `folding_refiner.fold` does, in one go: there are too many short vectors to take them one by one.

    w1 (E, H), w2 (E, K K) and w3 (H, E) are the weights of expansion, local attention and reduction; gain, bias, mean,
    var and eps 1 to 4 are the norm's behind each of them, and the output norm's; `scale` is a factor on the result.
    `expansion`, `expansion_bias` and the five vectors after them are written. EP and TAPS are powers of two, not below
    E and K K.
    """
    h, e, tap = tl.arange(0, HP), tl.arange(0, EP), tl.arange(0, TAPS)
    if EXPANDS:
        gain, bias = _affine(gain1, bias1, mean1, var1, eps1, e, E)
        mask = (e < E)[:, None] & (h < H)[None, :]
        tl.store(expansion + e[:, None] * H + h[None, :], gain[:, None] * _matrix(w1, e, h, E, H), mask=mask)
        tl.store(expansion_bias + e, bias, mask=e < E)
    gain, bias = _affine(gain2, bias2, mean2, var2, eps2, e, E)
    mask = (e < E)[:, None] & (tap < K * K)[None, :]
    values = gain[:, None] * _matrix(w2, e, tap, E, K * K)
    tl.store(local + e[:, None] * (K * K) + tap[None, :], values, mask=mask)
    tl.store(local_bias + e, bias, mask=e < E)
    gain, bias = _affine(gain3, bias3, mean3, var3, eps3, h, H)
    output_gain, output_bias = _affine(gain4, bias4, mean4, var4, eps4, h, H)
    values = (scale * output_gain * gain)[:, None] * _matrix(w3, h, e, H, E)
    tl.store(reduction + h[:, None] * E + e[None, :], values, mask=(h < H)[:, None] & (e < E)[None, :])
    tl.store(identity + h, scale * output_gain, mask=h < H)
    tl.store(constant + h, scale * (output_gain * bias + output_bias), mask=h < H)


# --- forward ---


@jit
def pack_kernel(
    maps, real, packed, counts, means, scatters, N,
    STEPS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    MOMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """
    Writes `packed`, with a border of HALF = K // 2. With MOMENTS, of STEPS blocks of packed positions: how many lie in
    the map and are real (programs,), mean (programs, H) and scatter (programs, H, H).
    """
    image, group, groups = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    area, h, side = N * N, tl.arange(0, HP), N + 2 * HALF
    maps += image * H * area
    packed += image * side * side * HP
    p = group * STEPS * BLOCK + tl.arange(0, BLOCK)
    if MOMENTS:
        # Sums about some value near the mean don't cancel.
        about = tl.sum(_load_heads(maps, h, p % area, p >= 0, area, H), 1)[:, None] / BLOCK
        sums, scatter, count = tl.zeros((HP,), tl.float32), tl.zeros((HP, HP), tl.float32), 0.0
    for _ in range(STEPS):
        row, column = p // side - HALF, p % side - HALF
        inside = (row >= 0) & (row < N) & (column >= 0) & (column < N)
        if MASKED:
            inside &= tl.load(real + image * area + row * N + column, mask=inside, other=0) != 0
        values = _load_heads(maps, h, row * N + column, inside, area, H)
        with_one = tl.where((h == H)[:, None] & inside[None, :], 1.0, values).to(packed.dtype.element_ty)
        tl.store(packed + p[None, :] * HP + h[:, None], with_one, mask=(p < side * side)[None, :])
        if MOMENTS:
            values = tl.where(inside[None, :], values - about, 0.0)
            sums += tl.sum(values, 1)
            scatter += tl.dot(values, tl.trans(values), input_precision="tf32x3")
            count += tl.sum(inside.to(tl.float32), 0)
        p += BLOCK
    if MOMENTS:
        program, divisor = image * groups + group, tl.maximum(count, 1.0)
        tl.store(counts + program, count)
        tl.store(means + program * H + h, tl.reshape(about, (HP,)) + sums / divisor, mask=h < H)
        scatter -= sums[:, None] * sums[None, :] / divisor
        mask = (h < H)[:, None] & (h < H)[None, :]
        tl.store(scatters + program * H * H + h[:, None] * H + h[None, :], scatter, mask=mask)


@jit
def local_moments_kernel(
    packed, weight, bias, local, counts, means, scatters, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of z2: count (programs,), mean and sum of squares about it (programs, E)."""
    image, blocks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    side, h = N + (K - 1), tl.arange(0, HP)
    first, column = _lanes(N, ROWS, BLOCK)
    packed += image * side * side * HP
    e, halves, taps = _channel_block(tl.program_id(2), weight, bias, local, h, packed, H, E, K, EXPANDS, CHANNELS)
    rows = _no_rows(K, BLOCK, CHANNELS)
    mean, scatter = tl.zeros_like(rows[0]), tl.zeros_like(rows[0])  # of each lane alone
    count = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROWS + K - 1):
        row = first + step
        p = row * side + column
        rows = _convolved(rows, packed, halves, taps, h, p, row < side, HP, K, EXPANDS, PRECISION)
        complete = _completes(step, row, side, K)
        centre = p - (K // 2) * side + K // 2
        counted, count, so_far = _counted(count, complete, packed, centre, step, H, HP, K, MASKED)
        delta = tl.where(counted[:, None], rows[0] - mean, 0.0)
        mean += delta / so_far
        scatter += delta * (rows[0] - mean)
        rows = _next(rows)
    count = _counts(count, first, N, ROWS, MASKED)
    total, overall_mean = _mean(mean, count)
    delta = mean - overall_mean[None, :]
    program = image * blocks + tl.program_id(0)
    tl.store(counts + program, total)
    tl.store(means + program * E + e, overall_mean, mask=e < E)
    tl.store(scatters + program * E + e, tl.sum(scatter + count[:, None] * delta * delta, 0), mask=e < E)


@jit
def project_kernel(
    packed, weight, bias, local, local_bias, reduction, identity, constant, output, counts, means, scatters, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, MOMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """
    With MOMENTS z3, and of it and the map: count (programs,), means (programs, 2, H) and, about the means, the sums of
    squares of z3 and of its products with the map (programs, 2, H). Without, the refined map in evaluation: z3 plus
    `identity` times the map plus `constant`.
    """
    image, blocks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    area, side, h = N * N, N + (K - 1), tl.arange(0, HP)
    first, column = _lanes(N, ROWS, BLOCK)
    packed += image * side * side * HP
    output += image * H * area
    accumulators, weights = (), ()
    for block in tl.static_range(BLOCKS):
        e, halves, taps = _channel_block(block, weight, bias, local, h, packed, H, E, K, EXPANDS, CHANNELS)
        back = tl.trans(_matrix(reduction, h, e, H, E)).to(packed.dtype.element_ty)
        accumulators = accumulators + (_no_rows(K, BLOCK, CHANNELS),)
        weights = weights + ((halves, taps, _vector(local_bias, e, E)[None, :], back),)
    if MOMENTS:
        mean_z, mean_a = tl.zeros((BLOCK, HP), tl.float32), tl.zeros((BLOCK, HP), tl.float32)
        scatter_z, scatter_a = tl.zeros((BLOCK, HP), tl.float32), tl.zeros((BLOCK, HP), tl.float32)
        count = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROWS + K - 1):
        row = first + step
        p = row * side + column
        for shift in tl.static_range(K):
            values = _load_packed(packed, h, p + shift, row < side, HP)
            after = ()
            for block in tl.static_range(BLOCKS):
                h1 = _expand(values, weights[block][0], EXPANDS, PRECISION)
                after = after + (_add_shares(accumulators[block], h1, weights[block][1], shift, K),)
            accumulators = after
        z3 = tl.zeros((BLOCK, HP), tl.float32)
        after = ()
        for block in tl.static_range(BLOCKS):
            h2 = _relu6(accumulators[block][0] + weights[block][2])
            z3 = tl.dot(h2.to(packed.dtype.element_ty), weights[block][3], acc=z3, input_precision=PRECISION)
            after = after + (_next(accumulators[block]),)
        accumulators = after
        complete = _completes(step, row, side, K)
        centre = p - (K // 2) * side + K // 2
        own = _load_packed(packed, h, centre, complete, HP).to(tl.float32)
        if MOMENTS:
            counted, count, so_far = _counted(count, complete, packed, centre, step, H, HP, K, MASKED)
            delta_z = tl.where(counted[:, None], z3 - mean_z, 0.0)
            delta_a = tl.where(counted[:, None], own - mean_a, 0.0)
            mean_z += delta_z / so_far
            mean_a += delta_a / so_far
            scatter_z += delta_z * (z3 - mean_z)
            scatter_a += delta_z * (own - mean_a)
        else:
            z3 += _vector(identity, h, H)[None, :] * own + _vector(constant, h, H)[None, :]
        offsets = (row - (K - 1)) * N + column
        mask = complete[:, None] & (h < H)[None, :]
        tl.store(output + h[None, :] * area + offsets[:, None], z3.to(output.dtype.element_ty), mask=mask)
    if MOMENTS:
        count = _counts(count, first, N, ROWS, MASKED)
        total, overall_z = _mean(mean_z, count)
        _, overall_a = _mean(mean_a, count)
        mean_z -= overall_z[None, :]
        mean_a -= overall_a[None, :]
        program = image * blocks + tl.program_id(0)
        target = program * 2 * H + h
        tl.store(counts + program, total)
        tl.store(means + target, overall_z, mask=h < H)
        tl.store(means + target + H, overall_a, mask=h < H)
        tl.store(scatters + target, tl.sum(scatter_z + count[:, None] * mean_z * mean_z, 0), mask=h < H)
        tl.store(scatters + target + H, tl.sum(scatter_a + count[:, None] * mean_z * mean_a, 0), mask=h < H)


@jit
def join_kernel(
    counts, means, scatters, output, programs,
    MEANS: tl.constexpr, PAIRS: tl.constexpr, X_REPEATS: tl.constexpr, X: tl.constexpr, PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """
    All programs' moments together, in float64: count (), means (MEANS,) and scatters (PAIRS,), one behind the other in
    `output`. Pair c is of means x = c // X_REPEATS % X and y = c % MEANS. `programs` have left moments; PROGRAMS of
    them are read at a time, and a program here joins CHANNELS pairs.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    x, y = c // X_REPEATS % X, c % MEANS
    total, mean_x = tl.zeros((PROGRAMS,), tl.float64), tl.zeros((PROGRAMS, CHANNELS), tl.float64)
    mean_y, scatter = tl.zeros_like(mean_x), tl.zeros_like(mean_x)
    start = 0
    while start < programs:
        p = (start + tl.arange(0, PROGRAMS)).to(tl.int64)
        count = tl.load(counts + p, mask=p < programs, other=0.0).to(tl.float64)
        total += count
        mask = (p < programs)[:, None] & (c < PAIRS)[None, :]
        mean_x += count[:, None] * tl.load(means + p[:, None] * MEANS + x[None, :], mask=mask, other=0.0)
        mean_y += count[:, None] * tl.load(means + p[:, None] * MEANS + y[None, :], mask=mask, other=0.0)
        start += PROGRAMS
    all_of_them = tl.sum(total, 0)
    x_mean, y_mean = tl.sum(mean_x, 0) / all_of_them, tl.sum(mean_y, 0) / all_of_them
    start = 0
    while start < programs:
        p = (start + tl.arange(0, PROGRAMS)).to(tl.int64)
        count = tl.load(counts + p, mask=p < programs, other=0.0).to(tl.float64)
        mask = (p < programs)[:, None] & (c < PAIRS)[None, :]
        delta_x = tl.load(means + p[:, None] * MEANS + x[None, :], mask=mask, other=0.0) - x_mean[None, :]
        delta_y = tl.load(means + p[:, None] * MEANS + y[None, :], mask=mask, other=0.0) - y_mean[None, :]
        scatter += count[:, None] * delta_x * delta_y
        scatter += tl.load(scatters + p[:, None] * PAIRS + c[None, :], mask=mask, other=0.0)
        start += PROGRAMS
    tl.store(output, all_of_them)
    tl.store(output + 1 + y, y_mean, mask=c < PAIRS)
    tl.store(output + 1 + MEANS + c, tl.sum(scatter, 0), mask=c < PAIRS)


@jit
def combine_kernel(coefficients, maps, reduced, output, area, H: tl.constexpr, BLOCK: tl.constexpr):
    """c0 z3 + c1 A + c2 for coefficients (3, H), a channel at a time."""
    channel = tl.program_id(0)  # of all images
    h, p = channel % H, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = channel.to(tl.int64) * area
    a = tl.load(maps + offset + p, mask=p < area, other=0.0).to(tl.float32)
    z3 = tl.load(reduced + offset + p, mask=p < area, other=0.0).to(tl.float32)
    values = _number(coefficients, h) * z3 + _number(coefficients, H + h) * a + _number(coefficients, 2 * H + h)
    tl.store(output + offset + p, values.to(output.dtype.element_ty), mask=p < area)


# --- backward ---


@jit
def outer_sums_kernel(gradient, maps, reduced, mean, sums, area, H: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of d, d (A - mean) and d (z3 - mean) over a block of a channel, (programs, 3, H); `mean` is (2, H)."""
    channel, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    image, h = channel // H, channel % H
    p = block * BLOCK + tl.arange(0, BLOCK)
    offset = channel.to(tl.int64) * area
    d = tl.load(gradient + offset + p, mask=p < area, other=0.0).to(tl.float32)  # 0 outside, and all sums have it
    a = tl.load(maps + offset + p, mask=p < area, other=0.0).to(tl.float32) - _number(mean, h)
    z3 = tl.load(reduced + offset + p, mask=p < area, other=0.0).to(tl.float32) - _number(mean, H + h)
    target = sums + (image * blocks + block) * 3 * H + h
    tl.store(target, tl.sum(d, 0))
    tl.store(target + H, tl.sum(d * a, 0))
    tl.store(target + 2 * H, tl.sum(d * z3, 0))


@jit
def _combination(gradient, maps, reduced, coefficients, h, p, inside, area, H: tl.constexpr):
    """c0 d + c1 A + c2 z3 + c3 for coefficients (4, H), (heads, BLOCK), zero outside."""
    values = _vector(coefficients, h, H)[:, None] * _load_heads(gradient, h, p, inside, area, H)
    values += _vector(coefficients + H, h, H)[:, None] * _load_heads(maps, h, p, inside, area, H)
    values += _vector(coefficients + 2 * H, h, H)[:, None] * _load_heads(reduced, h, p, inside, area, H)
    return tl.where(inside[None, :], values + _vector(coefficients + 3 * H, h, H)[:, None], 0.0)


@jit
def reduced_gradient_kernel(
    gradient, maps, real, reduced, coefficients, output, N,
    H: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dz3 = c0 d + c1 A + c2 z3 + c3 as (images, N N, HP), zero where nothing is real."""
    area, h = N * N, tl.arange(0, HP)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    start, inside = image * H * area, p < area
    if MASKED:
        inside &= tl.load(real + image * area + p, mask=inside, other=0) != 0
    values = _combination(gradient + start, maps + start, reduced + start, coefficients, h, p, inside, area, H)
    offsets = output + image * area * HP + p[None, :] * HP + h[:, None]
    tl.store(offsets, values.to(output.dtype.element_ty), mask=(p < area)[None, :])


@jit
def _second_norm_gradient(convolved, dz3, back, local_bias, gain, offset, e, E: tl.constexpr, PRECISION: tl.constexpr):
    """dn2, z2^ and h2, (BLOCK, CHANNELS)."""
    normalised = convolved + _vector(local_bias, e, E)[None, :]
    h2 = _relu6(_vector(gain, e, E)[None, :] * normalised + _vector(offset, e, E)[None, :])
    dn2 = tl.dot(dz3, back, input_precision=PRECISION)
    return _relu6_backward(dn2, h2), normalised, h2


@jit
def reduction_backward_kernel(
    packed, reduced_gradient, weight, bias, local, local_bias, gain, offset, reduction,
    sums, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each program, one behind the other: sums of dn2 and of dn2 z2^, both (E,), and of dz3 h2^T, (H, E)."""
    image, blocks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    side, h = N + (K - 1), tl.arange(0, HP)
    first, column = _lanes(N, ROWS, BLOCK)
    packed += image * side * side * HP
    reduced_gradient += image * N * N * HP
    e, halves, taps = _channel_block(tl.program_id(2), weight, bias, local, h, packed, H, E, K, EXPANDS, CHANNELS)
    back = _matrix(reduction, h, e, H, E).to(packed.dtype.element_ty)
    rows = _no_rows(K, BLOCK, CHANNELS)
    sum_n, sum_nz = tl.zeros_like(rows[0]), tl.zeros_like(rows[0])
    outer = tl.zeros((HP, CHANNELS), tl.float32)
    for step in range(ROWS + K - 1):
        row = first + step
        rows = _convolved(rows, packed, halves, taps, h, row * side + column, row < side, HP, K, EXPANDS, PRECISION)
        complete = _completes(step, row, side, K)
        # Zero where nothing is complete, and all sums have it.
        dz3 = _load_packed(reduced_gradient, h, (row - (K - 1)) * N + column, complete, HP)
        dn2, normalised, h2 = _second_norm_gradient(rows[0], dz3, back, local_bias, gain, offset, e, E, PRECISION)
        sum_n += dn2
        sum_nz += dn2 * normalised
        outer = tl.dot(tl.trans(dz3), h2.to(dz3.dtype), acc=outer, input_precision=PRECISION)
        rows = _next(rows)
    sums += (image * blocks + tl.program_id(0)) * (2 + H) * E
    tl.store(sums + e, tl.sum(sum_n, 0), mask=e < E)
    tl.store(sums + E + e, tl.sum(sum_nz, 0), mask=e < E)
    tl.store(sums + (2 + h[:, None]) * E + e[None, :], outer, mask=(h < H)[:, None] & (e < E)[None, :])


@jit
def local_gradient_kernel(
    packed, reduced_gradient, weight, bias, local, local_bias, gain, offset, reduction, second_norm, exchange, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """
    dz2 = s0 dn2 + s1 z2^ + s2 for `second_norm` (3, E), into the inner of `exchange`, maps packed without a one:
    (images, N + K - 1, N + K - 1, CHANNELS of each block).
    """
    image, side, h = tl.program_id(1).to(tl.int64), N + (K - 1), tl.arange(0, HP)
    first, column = _lanes(N, ROWS, BLOCK)
    packed += image * side * side * HP
    reduced_gradient += image * N * N * HP
    width: tl.constexpr = (E + CHANNELS - 1) // CHANNELS * CHANNELS
    exchange += image * side * side * width
    e, halves, taps = _channel_block(tl.program_id(2), weight, bias, local, h, packed, H, E, K, EXPANDS, CHANNELS)
    back = _matrix(reduction, h, e, H, E).to(packed.dtype.element_ty)
    rows = _no_rows(K, BLOCK, CHANNELS)
    for step in range(ROWS + K - 1):
        row = first + step
        p = row * side + column
        rows = _convolved(rows, packed, halves, taps, h, p, row < side, HP, K, EXPANDS, PRECISION)
        complete = _completes(step, row, side, K)
        dz3 = _load_packed(reduced_gradient, h, (row - (K - 1)) * N + column, complete, HP)
        dn2, normalised, _ = _second_norm_gradient(rows[0], dz3, back, local_bias, gain, offset, e, E, PRECISION)
        dz2 = _vector(second_norm, e, E)[None, :] * dn2 + _vector(second_norm + E, e, E)[None, :] * normalised
        dz2 += _vector(second_norm + 2 * E, e, E)[None, :]
        centre = p - (K // 2) * side + K // 2
        if MASKED:
            dz2 = tl.where(_real(packed, centre, complete, H, HP)[:, None], dz2, 0.0)
        offsets = centre[:, None] * width + e[None, :]
        tl.store(exchange + offsets, dz2.to(exchange.dtype.element_ty), mask=complete[:, None])
        rows = _next(rows)


@jit
def local_weight_gradient_kernel(
    packed, exchange, weight, bias, sums, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW2 from dz2 in `exchange`, each program's share of it (programs, E, K K)."""
    image, blocks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    side, h = N + (K - 1), tl.arange(0, HP)
    first, column = _lanes(N, ROWS, BLOCK)
    packed += image * side * side * HP
    width: tl.constexpr = (E + CHANNELS - 1) // CHANNELS * CHANNELS
    exchange += image * side * side * width
    e = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    halves = _halves(_expansion(weight, bias, h, e, H, E, EXPANDS), packed)
    hidden, tap_sums = _no_rows(K, BLOCK, CHANNELS), _no_rows(K * K, BLOCK, CHANNELS)
    for step in tl.range(ROWS + K - 1, num_stages=3):  # else only operands of products are loaded ahead
        row = first + step
        p = row * side + column
        # h1 of this very row, and of those before it for which this row's dz2 counts.
        mine = (step < ROWS) & (row < N)
        values = _load_packed(packed, h, p + (K // 2) * side + K // 2, mine, HP)
        kept = (_expand(values, halves, EXPANDS, PRECISION),)
        for down in tl.static_range(K - 1):
            # Below the map it doesn't matter. But the compiler overlaps no steps that hand something on untouched.
            kept = kept + (tl.where((row < side)[:, None], hidden[down], 0.0),)
        hidden = kept
        after = ()
        for shift in tl.static_range(K):
            dz2 = _load_packed(exchange, e, p + shift, row < side, width).to(tl.float32)
            for down in tl.static_range(K):
                after = after + (tap_sums[shift * K + down] + hidden[down] * dz2,)
        tap_sums = after
    sums += (image * blocks + tl.program_id(0)) * E * K * K
    for shift in tl.static_range(K):
        for down in tl.static_range(K):
            # The convolution turned around: the gradient comes from where the value went.
            tap = (K - 1 - down) * K + K - 1 - shift
            tl.store(sums + e * (K * K) + tap, tl.sum(tap_sums[shift * K + down], 0), mask=e < E)


@jit
def expansion_backward_kernel(
    packed, exchange, weight, bias, local, centre, part, sums, N,
    H: tl.constexpr, HP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, EXPANDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    From dz2 in `exchange`: dh1 and g, and W1^T g into `part`, without expansion dh1 itself; and sums of g with packed
    positions less `centre` (H,), which keeps the sums exact: (programs, H + 1, E), of which the last are those
    of g alone.
    """
    image, blocks = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    side, h = N + (K - 1), tl.arange(0, HP)
    first, column = _lanes(N, ROWS, BLOCK)
    packed += image * side * side * HP
    exchange += image * side * side * BLOCKS * CHANNELS
    part += image * N * N * H
    middle = _vector(centre, h, H)[None, :]
    accumulators, weights, sums_ga = (), (), ()
    for block in tl.static_range(BLOCKS):
        e, halves, taps = _channel_block(block, weight, bias, local, h, packed, H, E, K, EXPANDS, CHANNELS)
        accumulators = accumulators + (_no_rows(K, BLOCK, CHANNELS),)
        weights = weights + ((e, taps, halves, (tl.trans(halves[0]), tl.trans(halves[1]))),)
        sums_ga = sums_ga + (tl.zeros((HP, CHANNELS), tl.float32),)
    for step in range(ROWS + K - 1):
        row = first + step
        p = row * side + column
        for shift in tl.static_range(K):
            after = ()
            for block in tl.static_range(BLOCKS):
                e, taps = weights[block][0], weights[block][1]
                dz2 = _load_packed(exchange, e, p + shift, row < side, BLOCKS * CHANNELS).to(tl.float32)
                shares = ()
                for down in tl.static_range(K):  # turned around, see above
                    shares = shares + (accumulators[block][down] + taps[down * K + K - 1 - shift] * dz2,)
                after = after + (shares,)
            accumulators = after
        complete = _completes(step, row, side, K)
        offsets = part + ((row - (K - 1)) * N + column)[:, None] * H
        if EXPANDS:
            own = _load_packed(packed, h, p - (K // 2) * side + K // 2, complete, HP)
            delta = tl.where(complete[:, None], own.to(tl.float32) - middle, 0.0).to(own.dtype)
            share = tl.zeros((BLOCK, HP), tl.float32)
            after, added = (), ()
            for block in tl.static_range(BLOCKS):
                h1 = _expand(own, weights[block][2], EXPANDS, PRECISION)
                g = _relu6_backward(accumulators[block][0], h1).to(packed.dtype.element_ty)
                added = added + (tl.dot(tl.trans(delta), g, acc=sums_ga[block], input_precision=PRECISION),)
                share += _product(g, weights[block][3], PRECISION)
                after = after + (_next(accumulators[block]),)
            accumulators, sums_ga = after, added
            tl.store(offsets + h[None, :], share, mask=complete[:, None] & (h < H)[None, :])
        else:
            e = tl.arange(0, CHANNELS)
            tl.store(offsets + e[None, :], accumulators[0][0], mask=complete[:, None] & (e < H)[None, :])
            accumulators = (_next(accumulators[0]),)
    if EXPANDS:
        sums += (image * blocks + tl.program_id(0)) * (H + 1) * E
        for block in tl.static_range(BLOCKS):
            e = weights[block][0]
            mask = (h <= H)[:, None] & (e < E)[None, :]
            tl.store(sums + h[:, None] * E + e[None, :], sums_ga[block], mask=mask)


@jit
def finish_kernel(
    part, gradient, maps, reduced, coefficients, mixing, output, N,
    H: tl.constexpr, HP: tl.constexpr, MIXES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part + c0 d + c1 A + c2 z3 + c3, and with MIXES + mixing A for `mixing` (H, H)."""
    area, h = N * N, tl.arange(0, HP)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image, inside = tl.program_id(1).to(tl.int64), p < area
    start = image * H * area
    maps += start
    mask = (h < H)[:, None] & inside[None, :]
    values = tl.load(part + image * area * H + p[None, :] * H + h[:, None], mask=mask, other=0.0)
    values += _combination(gradient + start, maps, reduced + start, coefficients, h, p, inside, area, H)
    if MIXES:
        own = _load_heads(maps, h, p, inside, area, H)
        values += tl.dot(_matrix(mixing, h, h, H, H), own, input_precision=PRECISION)
    tl.store(output + start + h[:, None] * area + p[None, :], values.to(output.dtype.element_ty), mask=mask)
