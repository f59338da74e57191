# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement with batch statistics and gradients, exact, without keeping a single expanded map.

A batch norm needs the mean and variance of its input, and its backward pass two sums more. All of them are short
vectors, and the expanded maps are cheap to compute again from the map itself: one 1x1 product and one depthwise
convolution. So forward and backward go over the map a few times ("passes"), each time expand a piece of it, take from
it what they came for, and drop it. Kept for backward are the map, its reduction z3 (H channels) and the vectors.

    z1 = W1 A       n1 = norm1(z1)   h1 = relu6(n1)    attention expansion              (B, E, N, N), never kept
    z2 = W2 * h1    n2 = norm2(z2)   h2 = relu6(n2)    distributed local attention      (B, E, N, N), never kept
    z3 = W3 h2      n3 = norm3(z3)                     attention reduction              (B, H, N, N), kept
    y = n3 + A      output = scale * output_norm(y) = alpha z3 + gamma A + beta

- The first norm's statistics follow from the mean m and the covariance C of the map: W1 m and diag(W1 C W1^T).
- The second norm's need a pass of their own. The third's and the output norm's follow from the moments of z3 and A,
  which the pass that computes z3 takes on the way.
- Backward, the two outer norms are closed forms in the gradient, z3 and A. One pass gives the second norm's two sums
  (and dW3), one the gradient at the first norm's output (and dW2). That norm's correction is affine in A, so it is
  applied at the end without expanding again.

The short vectors are computed in float64. Over several processes they are all there is to exchange. Who does the
passes is a class with the functions of [`Passes`]: `blocked_refiner.py` has them in torch, `triton_refiner.py` as
kernels.
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn

from .folding_refiner import Expansion, Local, arithmetic_type, norms_of
from .normalization_refiner import differentiable_once, join_moments, merge_moments, total


class Moments(NamedTuple):
    """How many values, and for pairs of channels x and y: their means and the sum of (x - mean)(y - mean)."""

    count: torch.Tensor  # ()
    x: torch.Tensor
    y: torch.Tensor
    scatter: torch.Tensor


class Passes(Protocol):
    """
    Passes over maps (B, H, N, N) in any floating type; an object for each forward and each backward. Weights and
    vectors come in `arithmetic_type(map)`, sums go out in float64. Where there is no expansion (ratio 1), it is `None`
    and h1 is the map.
    """

    def __init__(self, attention_map, kernel_size: int): ...

    def map_moments(self) -> Moments:
        """x and y are (H, 1) and (1, H), the scatter (H, H)."""

    def local_moments(self, expansion: Expansion | None, weight) -> Moments:
        """Of z2; all (E,), x and y the same."""

    def project(self, expansion: Expansion | None, local: Local, reduction) -> tuple:
        """z3 = reduction relu6(local(h1)) in the map's type; moments (2, H), of z3 with itself and with the map."""

    def combine(self, coefficients, reduced):
        """alpha z3 + gamma A + beta for `coefficients` (3, H)."""

    def outer_sums(self, gradient, reduced, means):
        """Sums of d, d (A - means[0]) and d (z3 - means[1]), (3, H)."""

    def reduction_backward(self, inputs: "BackwardInputs") -> tuple:
        """Sums of dn2 (E,), of dn2 z2^ (E,) and of dz3 h2^T (H, E)."""

    def expansion_backward(self, inputs: "BackwardInputs", second_norm, weight, centre) -> tuple:
        """
        With dz2 = second_norm[0] dn2 + second_norm[1] z2^ + second_norm[2] and g the gradient at n1 (at h1 without
        expansion): sums for dW2 (E, 1, k, k), of g (E,) and of g (A - centre)^T (E, H), and the expansion's
        transpose times g, (B, H, N, N); without expansion g itself, and `None` for the sums.
        """

    def finish(self, part, inputs: "BackwardInputs", coefficients, mixing):
        """part + c0 d + c1 A + c2 z3 + c3 + mixing A for coefficients (4, H), in the map's type. May change part."""


class BackwardInputs(NamedTuple):
    """
    What a backward pass computes its expanded maps from. `local` gives the normalised z2^ here, and
    n2 = gain z2^ + offset; dz3 = c0 d + c1 A + c2 z3 + c3 for coefficients (4, H).
    """

    gradient: torch.Tensor  # d, (B, H, N, N)
    reduced: torch.Tensor
    coefficients: torch.Tensor
    expansion: Expansion | None
    local: Local
    gain: torch.Tensor
    offset: torch.Tensor
    reduction: torch.Tensor  # (H, E)


def why_not_exact(refinement: nn.Module) -> str | None:
    """Why [`exact_refine`] can't do a refinement in training, or `None` where it can."""
    if refinement.local_attention is None:
        return "without distributed local attention there is no training form but the modules"
    norms = norms_of(refinement)
    if len({(norm.training, norm.synchronized, norm.eps) for norm in norms}) > 1:
        return "some norms are frozen, synchronized or changed, and others not"
    return None


def exact_refine(
    refinement: nn.Module, attention_map: torch.Tensor, scale: float, passes: type[Passes]
) -> torch.Tensor:
    """
    Refines maps with batch statistics or with gradients, and moves the running statistics.

    Args:
        refinement: the module that holds weights and norms; [`why_not_exact`] must have nothing against it.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        scale: a factor on the result.
        passes: who does the passes.

    Returns:
        `torch.Tensor` of shape (B, H, N, N). Differentiable once; a second derivative raises a `RuntimeError`.
    """
    norms = norms_of(refinement)
    setting = _Setting(passes, scale, norms[0].training, norms[0].synchronizing, norms[0].eps)
    convolutions = [None if c is None else c.weight for c in (refinement.expansion, refinement.local_attention)]
    vectors = [vector for norm in norms for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    if refinement.expansion is None:
        vectors = [None] * 4 + vectors
    output, count, *statistics = _Refine.apply(
        setting, attention_map.contiguous(), *convolutions, refinement.reduction.weight, *vectors
    )
    if setting.batch_statistics:
        for norm, mean, variance in zip(norms, statistics[-2 * len(norms) :: 2], statistics[1 - 2 * len(norms) :: 2]):
            norm.track(mean, variance, count)
    return output


class _Setting(NamedTuple):
    passes: type[Passes]
    scale: float
    batch_statistics: bool
    synchronizing: bool
    eps: float


class _Refine(torch.autograd.Function):
    """(maps, three weights, four norms of four vectors) -> (refined maps, count, mean and variance of each norm)."""

    @staticmethod
    def forward(ctx, setting: _Setting, attention_map, expansion_weight, local_weight, reduction_weight, *vectors):
        with torch.autocast(attention_map.device.type, enabled=False):
            return _Refine._forward(
                ctx, setting, attention_map, expansion_weight, local_weight, reduction_weight, *vectors
            )

    @staticmethod
    def _forward(ctx, setting, attention_map, expansion_weight, local_weight, reduction_weight, *vectors):
        scale, batch, synchronizing, eps = setting[1:]
        passes = setting.passes(attention_map, local_weight.shape[-1])
        exact, working = sums_type(attention_map), arithmetic_type(attention_map)
        heads = attention_map.shape[1]
        gain1, bias1, mean1, var1, gain2, bias2, mean2, var2, gain3, bias3, mean3, var3, gain4, bias4, mean4, var4 = (
            None if vector is None else vector.to(exact) for vector in vectors
        )
        w1 = None if expansion_weight is None else expansion_weight.flatten(1).to(exact)  # (E, H)
        w2, w3 = local_weight.to(exact), reduction_weight.flatten(1).to(exact)

        count = torch.ones((), dtype=exact, device=attention_map.device)
        centre, covariance = torch.zeros(heads, dtype=exact, device=attention_map.device), None
        if batch:
            count, centre, _, scatter = merge_moments(passes.map_moments(), synchronizing)
            centre, covariance = centre.flatten(), scatter / count
        expansion = scale1 = None
        if w1 is not None:
            if batch:
                mean1, var1 = w1 @ centre, ((w1 @ covariance) * w1).sum(1)
            scale1 = gain1 * (var1 + eps).rsqrt()
            expansion = _folded_expansion(w1, scale1, bias1, mean1, working)
        if batch:
            _, mean2, _, scatter = merge_moments(passes.local_moments(expansion, w2.to(working)), synchronizing)
            var2 = scatter / count
        scale2 = gain2 * (var2 + eps).rsqrt()
        local = Local((scale2[:, None, None, None] * w2).to(working), (bias2 - scale2 * mean2).to(working))
        reduced, moments = passes.project(expansion, local, w3.to(working))
        shared = None  # covariance of z3 and A
        if batch:
            _, (mean3, _), _, scatter = merge_moments(moments, synchronizing)
            var3, shared = scatter / count
        scale3 = gain3 * (var3 + eps).rsqrt()
        if batch:
            mean4 = bias3 + centre
            var4 = scale3.square() * var3 + 2 * scale3 * shared + covariance.diagonal()
        scale4 = gain4 * (var4 + eps).rsqrt()
        constant = scale4 * (bias3 - scale3 * mean3 - mean4) + bias4
        coefficients = scale * torch.stack((scale4 * scale3, scale4, constant))
        output = passes.combine(coefficients.to(working), reduced)

        ctx.setting = setting
        ctx.weight_types = [None if w is None else w.dtype for w in (expansion_weight, local_weight, reduction_weight)]
        ctx.vector_types = [None if vector is None else vector.dtype for vector in vectors]
        ctx.save_for_backward(
            attention_map, reduced, w1, w2, w3, gain1, bias1, mean1, var1, gain2, bias2, mean2, var2,
            gain3, bias3, mean3, var3, gain4, mean4, var4, count, centre, covariance, shared,
        )  # fmt: skip
        statistics = [
            count,
            *(s for pair in ((mean1, var1), (mean2, var2), (mean3, var3), (mean4, var4)) for s in pair),
        ]
        # Fresh tensors: in evaluation these are the norms' own buffers.
        statistics = [None if s is None else s.clone() for s in statistics]
        ctx.mark_non_differentiable(*(s for s in statistics if s is not None))
        return output, *statistics

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient, *_):
        with torch.autocast(gradient.device.type, enabled=False):
            return _Refine._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx, gradient):
        scale, batch, synchronizing, eps = ctx.setting[1:]
        (
            attention_map, reduced, w1, w2, w3, gain1, bias1, mean1, var1, gain2, bias2, mean2, var2,
            gain3, bias3, mean3, var3, gain4, mean4, var4, count, centre, covariance, shared,
        ) = ctx.saved_tensors  # fmt: skip
        working = arithmetic_type(attention_map)
        inverse2, inverse3, inverse4 = ((variance + eps).rsqrt() for variance in (var2, var3, var4))
        scale2, scale3, scale4 = gain2 * inverse2, gain3 * inverse3, gain4 * inverse4
        gradient = gradient.contiguous()
        passes = ctx.setting.passes(attention_map, w2.shape[-1])

        # The two outer norms. y^ = inverse4 (scale3 (z3 - mean3) + (A - centre) + rest), z3^ = inverse3 (z3 - mean3).
        means = torch.stack((centre, mean3))
        sums = scale * passes.outer_sums(gradient, reduced, means.to(working))
        rest = bias3 + centre - mean4  # 0 with batch statistics

        def output_norm_gradients(sum_d, sum_da, sum_dz):
            return inverse4 * (scale3 * sum_dz + sum_da + rest * sum_d)

        d_bias4, d_gain4 = sums[0], output_norm_gradients(*sums)
        # dy = c0 d + c1 A + c2 z3 + c3; parameters' gradients are this process's share of the whole.
        dy = torch.zeros(4, *centre.shape, dtype=centre.dtype, device=centre.device)
        dy[0] = scale * scale4
        if batch:
            over_all = total(sums, synchronizing) / count
            mean_d, mean_dy = over_all[0], output_norm_gradients(*over_all)
            dy[1] = -scale4 * inverse4 * mean_dy
            dy[2] = dy[1] * scale3
            dy[3] = -scale4 * mean_d - dy[1] * centre - dy[2] * mean3
            own = inverse4 * (scale3 * var3 + shared)  # mean of y^ (z3 - mean3)
            d_bias3 = torch.zeros_like(d_bias4)
            d_gain3 = scale4 * inverse3 * (sums[2] - d_gain4 * own)
            dz3 = scale3 * dy
            correction = scale3 * inverse3 * inverse3 * scale4 * (over_all[2] - mean_dy * own)
            dz3[2] -= correction
            dz3[3] += correction * mean3
        else:
            d_bias3, d_gain3 = scale4 * sums[0], scale4 * inverse3 * sums[2]
            dz3 = scale3 * dy

        expansion = scale1 = inverse1 = None
        if w1 is not None:
            inverse1 = (var1 + eps).rsqrt()
            scale1 = gain1 * inverse1
            expansion = _folded_expansion(w1, scale1, bias1, mean1, working)
        inputs = BackwardInputs(
            gradient, reduced, dz3.to(working), expansion,
            Local((inverse2[:, None, None, None] * w2).to(working), (-inverse2 * mean2).to(working)),
            gain2.to(working), bias2.to(working), w3.to(working),
        )  # fmt: skip
        d_bias2, d_gain2, dw3 = passes.reduction_backward(inputs)
        second_norm = torch.stack((scale2, torch.zeros_like(scale2), torch.zeros_like(scale2)))
        if batch:
            mean_n, mean_nz = total(torch.stack((d_bias2, d_gain2)), synchronizing) / count
            second_norm[1], second_norm[2] = -scale2 * mean_nz, -scale2 * mean_n
        dw2, d_bias1, sum_ga, part = passes.expansion_backward(
            inputs, second_norm.to(working), w2.to(working), centre.to(working)
        )
        dw1 = d_gain1 = mixing = None
        if w1 is not None:
            d_gain1 = inverse1 * ((sum_ga * w1).sum(1) + d_bias1 * (w1 @ centre - mean1))
            dw1 = scale1[:, None] * sum_ga
            if batch:
                mean_g, mean_gz = total(torch.stack((d_bias1, d_gain1)), synchronizing) / count
                dw1 -= (scale1 * inverse1 * d_gain1)[:, None] * (w1 @ covariance)
                mixing = -(w1.T * (scale1 * inverse1 * mean_gz)) @ w1
                dy[3] -= w1.T @ (scale1 * (mean_g - inverse1 * mean1 * mean_gz))
        d_map = passes.finish(part, inputs, dy.to(working), None if mixing is None else mixing.to(working))

        def typed(value, dtype):
            return None if value is None else value.to(dtype)

        weights = [
            typed(dw1 if dw1 is None else dw1[:, :, None, None], ctx.weight_types[0]),
            typed(dw2, ctx.weight_types[1]),
            typed(dw3[:, :, None, None], ctx.weight_types[2]),
        ]
        pairs = ((d_gain1, d_bias1), (d_gain2, d_bias2), (d_gain3, d_bias3), (d_gain4, d_bias4))
        vectors = [value for pair in pairs for value in (*pair, None, None)]
        vectors = [typed(value, dtype) for value, dtype in zip(vectors, ctx.vector_types)]
        return None, d_map, *weights, *vectors


def _folded_expansion(weight, scale, bias, mean, dtype: torch.dtype) -> Expansion:
    return Expansion((scale[:, None] * weight).to(dtype), (bias - scale * mean).to(dtype))


def joined(counts: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scatter: torch.Tensor) -> Moments:
    """[`join_moments`] of pieces' moments in the maps' working type, for the implementations of [`Passes`]."""
    return Moments(*join_moments(*(moment.to(sums_type(x)) for moment in (counts, x, y, scatter))))


def sums_type(tensor: torch.Tensor) -> torch.dtype:
    """The type of sums over maps and of what follows from them."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
