# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement in training: exact batch statistics and gradients, without keeping any expanded map.

A batch norm needs the mean and variance of its input, and its backward pass needs two more sums. All of them are short
vectors, and the expanded maps are cheap to compute again from the map itself: one 1x1 product and one depthwise
convolution. So forward and backward go over the map a few times ("passes"). Each pass expands a piece of the map,
computes what it needs from it, and drops it. Kept for backward are the map, its reduction z3 (H channels) and the
vectors.

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

The short vectors are computed in float64. Several processes exchange only these vectors. A class with the functions of
[`Passes`] does the passes: in `blocked_refiner.py` with torch, in `triton_refiner.py` with kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .folding_refiner import Expansion, Local, cast_together, norms_of, operands_of
from .normalization_refiner import all_gather_moments, all_reduce_sum, refuse_second_derivative, track_together
from .operations_refiner import like_the_map, operation, products_of_weights


class Moments(NamedTuple):
    """How many values, and for pairs of channels x and y: their means and the sum of (x - mean)(y - mean)."""

    count: torch.Tensor  # ()
    x: torch.Tensor
    y: torch.Tensor
    scatter: torch.Tensor


class Passes(Protocol):
    """
    Passes over maps (B, H, N, N) in any floating type; an object for each forward and each backward. Weights and
    vectors come in the type of [`sums_type`], in which sums go out. Where there is no expansion (ratio 1), it is
    `None` and h1 is the map.
    """

    def __init__(self, attention_map, weight_shape, mask):
        """`weight_shape` is the local attention's (E, 1, k, k). `mask` (B, 1, N, N) of booleans, or `None`. Maps are
        zero where it is false; only where it is true count places for sums and moments."""

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
        transpose times g, in the layout that `finish` takes; without expansion g itself, and `None` for the sums.
        Comes after `reduction_backward`.
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


def why_not_recomputed(refinement: nn.Module) -> str | None:
    """Why [`Recomputed`] can't do a refinement in training, or `None` where it can."""
    if refinement.local_attention is None:
        return "without distributed local attention there is no training form but the modules"
    norms = norms_of(refinement)
    if len({(norm.training, norm.synchronized, norm.eps) for norm in norms}) > 1:
        return "some norms are frozen, synchronized or changed, and others not"
    return None


class Recomputed:
    """
    Refines maps with batch statistics or with gradients, and moves the running statistics.

    Forward and backward are an operation each, so that compilers take them as they are.

    Args:
        name (`str`): what the operations are called, before "_forward" and "_backward".
        passes: the class that does the passes.
    """

    def __init__(self, name: str, passes: type[Passes]):
        self.passes = passes
        settings = "float scale, bool batch_statistics, bool synchronizing, float eps"
        self._forward = operation(
            f"{name}_forward(Tensor map, Tensor? mask, Tensor[] weights, {settings}) -> (Tensor, Tensor, Tensor)",
            fake=_fake_forward,
            flops=lambda map_shape, mask, weight_shapes, *others: products_of_weights(map_shape, weight_shapes),
        )(self._compute)
        self._backward = operation(
            f"{name}_backward(Tensor map, Tensor? mask, Tensor[] weights, Tensor reduced, Tensor statistics, "
            f"Tensor gradient, {settings}) -> (Tensor, Tensor)",
            fake=_fake_backward,
            flops=lambda map_shape, mask, weight_shapes, *others: 2 * products_of_weights(map_shape, weight_shapes),
        )(self._differentiate)
        torch.library.register_autograd(self._forward, self._gradients, setup_context=_keep)
        torch.library.register_autograd(self._backward, refuse_second_derivative)

    def __call__(
        self, refinement: nn.Module, attention_map: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Args:
            refinement: the module that holds weights and norms; [`why_not_recomputed`] must have nothing against it.
            attention_map (`torch.Tensor` of shape (B, H, N, N)).
            scale: a factor on the result.
            mask (`torch.BoolTensor` of shape (B, 1, N, N), *optional*): where places are real; elsewhere the map and
                the gradient of the result are zero.

        Returns:
            `torch.Tensor` of shape (B, H, N, N). Differentiable once; a second derivative raises a `RuntimeError`.
        """
        norms = norms_of(refinement)
        batch = norms[0].training
        weights = [each for each in operands_of(refinement, statistics=not batch)[0] if each is not None]
        setting = _Setting(scale, batch, norms[0].synchronizing, norms[0].eps)
        output, _, statistics = self._forward(attention_map.contiguous(), mask, weights, *setting)
        if batch:
            features = sum(norm.num_features for norm in norms)
            track_together(norms, statistics[: 2 * features], statistics[-1])
        return output

    def _compute(self, attention_map, mask, weights, *setting):
        with torch.autocast(attention_map.device.type, enabled=False):
            return _refine(self.passes, _Setting(*setting), attention_map, mask, weights)

    def _differentiate(self, attention_map, mask, weights, reduced, statistics, gradient, *setting):
        with torch.autocast(attention_map.device.type, enabled=False):
            kept = (attention_map, mask, reduced, statistics)
            return _refine_backward(self.passes, _Setting(*setting), *kept, weights, gradient.contiguous())

    def _gradients(self, ctx, gradient, *_):
        attention_map, mask, reduced, statistics, *weights = ctx.saved_tensors
        kept = (attention_map, mask, weights, reduced, statistics)
        d_map, flat = self._backward(*kept, gradient, *ctx.setting)
        differentiated = _differentiated(_complete(weights, ctx.setting.batch_statistics))
        if len(types := {weight.dtype for weight in differentiated}) == 1:
            flat = flat.to(*types)
        parts = zip(flat.split([weight.numel() for weight in differentiated]), differentiated)
        gradients = {weight: part.view(weight.shape).to(weight.dtype) for part, weight in parts}
        return d_map, None, [gradients.get(weight) for weight in weights], *[None] * len(ctx.setting)


class _Setting(NamedTuple):
    scale: float
    batch_statistics: bool
    synchronizing: bool
    eps: float


def _complete(weights: Sequence[torch.Tensor], batch_statistics: bool) -> list[torch.Tensor | None]:
    """
    [`operands_of`] again, from those that aren't `None`. (Torch differentiates no list that has a `None` in it.)
    """
    of_norm = 2 if batch_statistics else 4
    expands = len(weights) > 2 + 3 * of_norm
    complete = [*weights[: 2 + expands]] if expands else [None, *weights[:2], *4 * [None]]
    for i in range(2 + expands, len(weights), of_norm):
        complete += [*weights[i : i + of_norm], *(4 - of_norm) * [None]]
    return complete


def _statistics_sizes(weights: Sequence[torch.Tensor | None]) -> list[int]:
    """
    With batch statistics the forward operation also gives a vector of what follows from the batch. Its parts: the four
    norms' means, their variances, the mean and the covariance of the map, the covariance of z3 and the map, the count.
    """
    norms = [0 if gain is None else len(gain) for gain in weights[3::4]]
    heads = norms[-1]
    return [*norms, *norms, heads, heads * heads, heads, 1]


def _fake_forward(attention_map, mask, weights, scale, batch_statistics, *others):
    size = sum(_statistics_sizes(_complete(weights, True))) if batch_statistics else 0
    statistics = attention_map.new_empty(size, dtype=sums_type(attention_map))
    return like_the_map(attention_map), like_the_map(attention_map), statistics


def _fake_backward(attention_map, mask, weights, reduced, statistics, gradient, scale, batch_statistics, *others):
    size = sum(weight.numel() for weight in _differentiated(_complete(weights, batch_statistics)))
    return like_the_map(attention_map), attention_map.new_empty(size, dtype=sums_type(attention_map))


def _differentiated(complete: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The weights that get gradients, in the order in which the backward operation gives those."""
    return [each for each in (*complete[:3], *complete[3::4], *complete[4::4]) if each is not None]


def _keep(ctx, inputs, output):
    attention_map, mask, weights, *setting = inputs
    _, reduced, statistics = output
    ctx.setting = _Setting(*setting)
    ctx.save_for_backward(attention_map, mask, reduced, statistics, *weights)
    ctx.mark_non_differentiable(reduced, statistics)
    ctx.set_materialize_grads(False)


def _refine(passes_class, setting, attention_map, mask, weights):
    scale, batch, synchronizing, eps = setting
    (
        w1, w2, w3, gain1, bias1, mean1, var1, gain2, bias2, mean2, var2, gain3, bias3, mean3, var3,
        gain4, bias4, mean4, var4,
    ) = cast_together(_complete(weights, batch), sums_type(attention_map))  # fmt: skip
    w1, w3 = None if w1 is None else w1.flatten(1), w3.flatten(1)  # (E, H), (H, E)
    passes = passes_class(attention_map, w2.shape, mask)

    def scaled(gain, variance):
        return gain * (variance + eps).rsqrt()

    count = covariance = None
    if batch:
        count, centre, _, scatter = all_gather_moments(passes.map_moments(), synchronizing)
        centre, covariance = centre.flatten(), scatter / count
    else:
        centre = torch.zeros_like(gain4)
    expansion = None
    if w1 is not None:
        if batch:
            mean1, var1 = w1 @ centre, ((w1 @ covariance) * w1).sum(1)
        scale1 = scaled(gain1, var1)
        expansion = _folded_expansion(w1, scale1, bias1, mean1)
    if batch:
        _, mean2, _, scatter = all_gather_moments(passes.local_moments(expansion, w2), synchronizing)
        var2 = scatter / count
    scale2 = scaled(gain2, var2)
    local = Local(scale2[:, None, None, None] * w2, torch.addcmul(bias2, scale2, mean2, value=-1))
    reduced, moments = passes.project(expansion, local, w3)
    shared = None  # covariance of z3 and A
    if batch:
        _, (mean3, _), _, scatter = all_gather_moments(moments, synchronizing)
        var3, shared = scatter / count
    scale3 = scaled(gain3, var3)
    if batch:
        mean4 = bias3 + centre
        var4 = torch.addcmul(covariance.diagonal(), scale3, torch.addcmul(2 * shared, scale3, var3))
    scale4 = scaled(gain4, var4)
    constant = torch.addcmul(bias4, scale4, torch.addcmul(bias3 - mean4, scale3, mean3, value=-1))
    output = passes.combine(scale * torch.stack((scale4 * scale3, scale4, constant)), reduced)
    if not batch:
        return output, reduced, gain4.new_empty(0)
    parts = (mean1, mean2, mean3, mean4, var1, var2, var3, var4, centre, covariance, shared, count)
    return output, reduced, torch.cat([part.reshape(-1) for part in parts if part is not None])


def _refine_backward(passes_class, setting, attention_map, mask, reduced, statistics, weights, gradient):
    scale, batch, synchronizing, eps = setting
    (
        w1, w2, w3, gain1, bias1, mean1, var1, gain2, bias2, mean2, var2, gain3, bias3, mean3, var3,
        gain4, _, mean4, var4,
    ) = cast_together(complete := _complete(weights, batch), sums_type(attention_map))  # fmt: skip
    w1, w3 = None if w1 is None else w1.flatten(1), w3.flatten(1)  # (E, H), (H, E)
    heads, expanded = w3.shape
    if batch:
        parts = statistics.split(_statistics_sizes(complete))
        mean1, mean2, mean3, mean4, var1, var2, var3, var4, centre, covariance, shared, count = parts
        covariance, count = covariance.view(heads, heads), count.squeeze()
    else:
        centre = torch.zeros_like(gain4)
    passes = passes_class(attention_map, w2.shape, mask)
    sizes = (0 if w1 is None else expanded, expanded, heads, heads)
    inverse = (torch.cat([v for v in (var1, var2, var3, var4) if v is not None]) + eps).rsqrt()
    scales = inverse * torch.cat([g for g in (gain1, gain2, gain3, gain4) if g is not None])
    inverse1, inverse2, inverse3, inverse4 = inverse.split(sizes)
    scale1, scale2, scale3, scale4 = scales.split(sizes)

    # The two outer norms. y^ = inverse4 (scale3 (z3 - mean3) + (A - centre) + rest), z3^ = inverse3 (z3 - mean3),
    # where rest = bias3 + centre - mean4 is 0 with batch statistics.
    sum_d, sum_da, sum_dz = scale * passes.outer_sums(gradient, reduced, torch.stack((centre, mean3)))
    d_bias4, d_gain4 = sum_d, torch.addcmul(sum_da, scale3, sum_dz)
    if not batch:
        d_gain4 = torch.addcmul(d_gain4, bias3 + centre - mean4, sum_d)
    d_gain4 = inverse4 * d_gain4
    # dy = c0 d + c1 A + c2 z3 + c3; parameters' gradients are this process's share of the whole.
    if batch:
        mean_d, mean_dz, mean_dy = all_reduce_sum(torch.stack((sum_d, sum_dz, d_gain4)), synchronizing) / count
        own = inverse4 * torch.addcmul(shared, scale3, var3)  # mean of y^ (z3 - mean3)
        by_map = -(scale4 * inverse4) * mean_dy
        by_reduced = by_map * scale3
        rest = torch.addcmul(torch.addcmul(scale4 * mean_d, by_map, centre), by_reduced, mean3)
        dy = torch.stack((scale * scale4, by_map, by_reduced, -rest))
        d_bias3 = torch.zeros_like(d_bias4)
        slope = scale4 * inverse3
        d_gain3 = slope * torch.addcmul(sum_dz, d_gain4, own, value=-1)
        dz3 = scale3 * dy
        correction = scale3 * inverse3 * slope * torch.addcmul(mean_dz, mean_dy, own, value=-1)
        dz3[2] -= correction
        dz3[3].addcmul_(correction, mean3)
    else:
        dy = sum_d.new_zeros(4, heads)
        dy[0] = scale * scale4
        d_bias3, d_gain3 = scale4 * sum_d, scale4 * inverse3 * sum_dz
        dz3 = scale3 * dy

    expansion = None if w1 is None else _folded_expansion(w1, scale1, bias1, mean1)
    normalised = Local(inverse2[:, None, None, None] * w2, -inverse2 * mean2)
    inputs = BackwardInputs(gradient, reduced, dz3, expansion, normalised, gain2, bias2, w3)
    d_bias2, d_gain2, dw3 = passes.reduction_backward(inputs)
    if batch:
        mean_n, mean_nz = all_reduce_sum(torch.stack((d_bias2, d_gain2)), synchronizing) / count
        second_norm = torch.stack((scale2, -scale2 * mean_nz, -scale2 * mean_n))
    else:
        second_norm = torch.stack((scale2, torch.zeros_like(scale2), torch.zeros_like(scale2)))
    dw2, d_bias1, sum_ga, part = passes.expansion_backward(inputs, second_norm, w2, centre)
    dw1 = d_gain1 = mixing = None
    if w1 is not None:
        d_gain1 = (sum_ga * w1).sum(1)
        if not batch:
            d_gain1 = torch.addcmul(d_gain1, d_bias1, w1 @ centre - mean1)
        d_gain1 = inverse1 * d_gain1
        dw1 = scale1[:, None] * sum_ga
        if batch:
            mean_g, mean_gz = all_reduce_sum(torch.stack((d_bias1, d_gain1)), synchronizing) / count
            slope = scale1 * inverse1
            dw1.addcmul_((slope * d_gain1)[:, None], w1 @ covariance, value=-1)
            mixing = (w1 * (-slope * mean_gz)[:, None]).T @ w1
            # Minus, as all of it that doesn't depend on the map.
            dy[3] -= w1.T @ (scale1 * torch.addcmul(mean_g, inverse1 * mean1, mean_gz, value=-1))
    d_map = passes.finish(part, inputs, dy, mixing)

    gradients = (dw1, dw2, dw3, d_gain1, d_gain2, d_gain3, d_gain4, d_bias1, d_bias2, d_bias3, d_bias4)
    return d_map, torch.cat([each.reshape(-1) for each in gradients if each is not None])


def _folded_expansion(weight, scale, bias, mean) -> Expansion:
    return Expansion(scale[:, None] * weight, torch.addcmul(bias, scale, mean, value=-1))


def sums_type(tensor: torch.Tensor) -> torch.dtype:
    """The type of sums over maps and of what follows from them."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
