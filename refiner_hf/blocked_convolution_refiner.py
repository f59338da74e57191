# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement by one convolution and its norm where there is a mask, in plain torch, some images after the other: each
is cut to the rectangle that holds its real places. In evaluation the norm is folded into the convolution. In training,
with A the map, z = W * A and d the gradient of the result, the norm's gradients are closed forms in d and z.

Shapes: I images, R rows and C columns of a piece.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .blocked_refiner import image_slices, real_part
from .folding_refiner import arithmetic_type, as_affine, needs_training_form
from .normalization_refiner import all_gather_moments, all_reduce_sum, combine_moments, differentiable_once
from .recomputing_refiner import sums_type


def blocked_convolution(
    refinement: Any, attention_map: torch.Tensor, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """Arguments and result as [`blocked_refiner.blocked_refine`]'s, for a refinement by one convolution."""
    convolution, norm = refinement.convolution, refinement.output_norm
    weight = convolution.weight
    with torch.autocast(attention_map.device.type, enabled=False):
        if needs_training_form(refinement, attention_map):
            setting = _Setting(scale, norm.eps, norm.training, norm.synchronizing)
            statistics = (None, None) if norm.training else (norm.running_mean, norm.running_var)
            vectors = (weight, norm.weight, norm.bias, *statistics)
            output, count, mean, variance = _Convolution.apply(setting, attention_map, mask, *vectors)
            if norm.training:
                norm.track(mean, variance, count)
            return output
        dtype = arithmetic_type(attention_map)
        gain, bias = (scale * vector for vector in as_affine(norm, dtype))
        folded = gain[:, None, None, None] * weight.to(dtype)
        output = torch.zeros_like(attention_map, memory_format=torch.contiguous_format)
        for piece in _pieces(attention_map, mask):
            piece.of(output).copy_(_convolve(piece.of(attention_map).to(dtype), folded, bias))
        return output


class _Setting(NamedTuple):
    scale: float
    eps: float
    batch_statistics: bool
    synchronizing: bool


class _Convolution(torch.autograd.Function):
    """(maps, mask, weight, gain and bias, in evaluation mean and variance) -> (refined, count, mean, variance)."""

    @staticmethod
    def forward(ctx, setting: _Setting, attention_map, mask, weight, gain, bias, mean, variance):
        dtype = arithmetic_type(attention_map)
        exact = sums_type(attention_map)
        working = weight.to(dtype)
        convolved, parts = torch.zeros_like(attention_map, dtype=dtype), []
        for piece in _pieces(attention_map, mask):
            z = _convolve(piece.of(attention_map).to(dtype), working, None)
            piece.of(convolved).copy_(z)
            if setting.batch_statistics:
                parts.append(piece.moments(z))
        count = None
        if setting.batch_statistics:
            counts, means, scatters = (torch.stack(each).to(exact) for each in zip(*parts))
            joined = combine_moments(counts, means, means, scatters)
            count, mean, _, scatter = all_gather_moments(joined, setting.synchronizing)
            variance = scatter / count
        inverse = (variance.to(exact) + setting.eps).rsqrt()
        factor = setting.scale * gain.to(exact) * inverse
        constant = setting.scale * bias.to(exact) - factor * mean.to(exact)
        output = torch.addcmul(_channels(constant, dtype), _channels(factor, dtype), convolved).to(attention_map.dtype)
        ctx.setting = setting
        ctx.save_for_backward(attention_map, mask, convolved, weight, gain, mean, inverse, count)
        if not setting.batch_statistics:
            return output, None, None, None
        ctx.mark_non_differentiable(count, mean, variance)
        return output, count, mean, variance

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient, *_):
        with torch.autocast(gradient.device.type, enabled=False):
            return _Convolution._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx, gradient):
        attention_map, mask, convolved, weight, gain, mean, inverse, count = ctx.saved_tensors
        scale, _, batch, synchronizing = ctx.setting
        dtype, exact = arithmetic_type(attention_map), inverse.dtype
        d = gradient.to(dtype)  # zero where nothing is real
        centred = convolved - _channels(mean, dtype)
        d_bias = scale * d.sum((0, 2, 3)).to(exact)
        d_gain = scale * inverse * (d * centred).sum((0, 2, 3)).to(exact)
        factor = scale * gain.to(exact) * inverse
        dz = _channels(factor, dtype) * d
        if batch:
            mean_d, mean_dz = all_reduce_sum(torch.stack((d_bias, d_gain)), synchronizing) / count
            slope = gain.to(exact) * inverse
            dz -= _channels(slope * mean_d, dtype)
            dz.addcmul_(centred, _channels(slope * inverse * mean_dz, dtype), value=-1)
            dz.masked_fill_(~mask, 0)
        working, d_weight = weight.to(dtype), 0
        d_map = torch.zeros_like(attention_map)
        reach = weight.shape[-1] // 2
        for piece in _pieces(attention_map, mask):
            own = piece.of(attention_map).to(dtype)
            d_own, share, _ = torch.ops.aten.convolution_backward(
                piece.of(dz), own, working, None, [1, 1], [reach, reach], [1, 1], False, [0, 0], 1, [True, True, False]
            )
            piece.of(d_map).copy_(d_own)
            d_weight = d_weight + share.to(exact)
        d_vectors = (d_weight.to(weight.dtype), d_gain.to(gain.dtype), d_bias.to(gain.dtype))
        return None, d_map, None, *d_vectors, None, None


class _Piece(NamedTuple):
    """Some images, cut to the rectangle that holds their real places: `real` (I, 1, R, C), `None` if all are."""

    images: slice
    rows: slice
    columns: slice
    real: torch.Tensor | None

    def of(self, maps: torch.Tensor) -> torch.Tensor:
        """A view (I, H, R, C)."""
        return maps[self.images, :, self.rows, self.columns]

    def moments(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many values of a channel are real, their mean, and the sum of squares about it."""
        if self.real is None:
            variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
            count = mean.new_tensor(values[:, 0].numel())
            return count, mean, variance * count
        real = self.real.to(values.dtype)
        count = real.sum()
        mean = (values * real).sum((0, 2, 3)) / count.clamp(min=1)
        return count, mean, ((values - mean[:, None, None]) * real).square().sum((0, 2, 3))


def _pieces(attention_map: torch.Tensor, mask: torch.Tensor) -> Iterator[_Piece]:
    for images in image_slices(attention_map):
        rows, columns, everywhere = real_part(mask, images)
        if rows.stop > rows.start:
            yield _Piece(images, rows, columns, None if everywhere else mask[images, :, rows, columns])


def _convolve(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2)


def _channels(vector: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return vector.to(dtype)[:, None, None]
