# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement on NVIDIA GPUs by fused kernels: expanded maps are neither kept nor, but for one exchange, written.

The convolution looks at neighbours. A program of the kernels doesn't wait for others to expand them, nor does it
expand them for every position anew: it walks down columns of a map, expands each row where it and the rows beside it
need it, K times, and keeps what the rows under way have so far. Each value then costs few instructions, so what holds
up a kernel is how its operands come in: packed, with the heads of a position side by side, they come as whole vectors,
ahead of their use, straight to the tensor cores.

The gradient of the convolution is different: it needs the neighbours' gradients, which need their neighbours'
expansions. That one expanded gradient goes through memory, for as many images at a time as `_EXCHANGE` holds.
"""

import math
from functools import cached_property

import torch
from torch import nn

from .folding_refiner import Expansion, Folded, Local, needs_training_form, operands_of
from .operations_refiner import refine_operation
from .packed_maps_refiner import MAX_HEADS, empty_packed, packed_of, padded_heads
from .recomputing_refiner import BackwardInputs, Moments, Recomputed
from .triton_kernels_refiner import (
    combine_kernel,
    expansion_backward_kernel,
    finish_kernel,
    fold_kernel,
    join_kernel,
    local_gradient_kernel,
    local_moments_kernel,
    local_weight_gradient_kernel,
    outer_sums_kernel,
    pack_kernel,
    project_kernel,
    reduced_gradient_kernel,
    reduction_backward_kernel,
)
from .triton_launch_refiner import ceil_div, on_device_of, power_of_two, precision, why_no_kernels
from .triton_tiles_refiner import MOST_CHANNELS, Kernels, RefinementTiles, tiles_for


# Of programs that expand nothing (`triton_tiles_refiner.py` has the tiles of the others): positions of one channel,
# and of all of them side by side; how often those that pack take so many; partial results that are joined at once, and
# of how many sums. Bytes of the exchanged gradient.
_PLAIN, _PACKED, _STEPS, _JOINED, _JOINED_SUMS, _EXCHANGE = 1024, 64, 8, 512, 16, 128 * 2**20
# Bytes on a chip for what is loaded ahead: Ampere and Ada grant a program 99 KB, and there is more to hold.
_AHEAD = 75 * 1024


def why_not_triton(refinement: nn.Module, attention_map: torch.Tensor) -> str | None:
    """Why the kernels can't refine a map on this machine, or `None` where they can."""
    if reason := why_no_kernels(attention_map):
        return reason
    if attention_map.shape[1] > MAX_HEADS:
        return f"the kernels take up to {MAX_HEADS} heads"
    if getattr(refinement, "local_attention", None) is None:
        return "the kernels are for the refinement with distributed local attention"
    # The first is CUDA's limit, the second that of the kernels' 32-bit offsets within an image, which they pad.
    side = attention_map.shape[-1] + refinement.local_attention.kernel_size[0] - 1
    padded = max(refinement.reduction.in_channels + MOST_CHANNELS, 2 * MAX_HEADS)
    if len(attention_map) >= 2**16 or padded * side * side >= 2**31:
        return "the kernels take fewer than 65536 images, and fewer than 2^31 values of an image's expanded maps"
    return None


def triton_refine(
    refinement: nn.Module, attention_map: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The refinement by kernels: with batch statistics or gradients as in [`Recomputed`], else with every norm
    folded into the weights before it.

    Products of float32 maps are as exact as float32 (three TF32 products each), unless the user lets torch's own
    products be in TF32 (`torch.backends.cuda.matmul.fp32_precision`).

    Args:
        refinement: the module that holds weights and norms.
        attention_map (`torch.Tensor` of shape (B, H, N, N)): in float32, bfloat16 or float16, H at most 16.
        scale: a factor on the result.
        mask (`torch.BoolTensor` of shape (B, 1, N, N), *optional*): where places are real; elsewhere the map is zero.

    Returns:
        `torch.Tensor` of shape (B, H, N, N).
    """
    if needs_training_form(refinement, attention_map):
        return triton_training(refinement, attention_map, scale, mask)
    return _triton_refine(attention_map, mask, *operands_of(refinement), scale)


@refine_operation("triton")
def _triton_refine(
    attention_map: torch.Tensor,
    mask: torch.Tensor | None,
    weights: list[torch.Tensor | None],
    eps: list[float],
    scale: float,
) -> torch.Tensor:
    local = weights[1]
    if mask is not None or packed_of(attention_map, local.shape[-1]) is None:
        attention_map = attention_map.contiguous()
    output = torch.empty_like(attention_map, memory_format=torch.contiguous_format)
    passes = TritonPasses(attention_map, local.shape, mask, training=False)
    folded = _fold(weights, eps, scale)
    vectors = (folded.reduction, folded.identity, folded.constant)
    passes.run_projection(folded.expansion, folded.local, *vectors, output, None, None, None)
    return output


def _fold(weights: list[torch.Tensor | None], eps: list[float], scale: float) -> Folded:
    """[`fold`] in float32 by a kernel."""
    w1, w2, w3, *vectors = (None if weight is None else weight.contiguous() for weight in weights)
    heads, expanded, kernel = len(w3), len(w2), w2.shape[-1]
    norms = [(*vectors[4 * i : 4 * i + 4], eps[i]) for i in range(len(eps))]
    shapes = [(expanded, heads), (expanded,), w2.shape, (expanded,), (heads, expanded), (heads,), (heads,)]
    flat = torch.empty(sum(math.prod(shape) for shape in shapes), dtype=torch.float32, device=w3.device)
    pieces = [piece.view(shape) for piece, shape in zip(flat.split([math.prod(shape) for shape in shapes]), shapes)]
    with on_device_of(w3):
        fold_kernel[(1,)](
            w1, *norms[0], w2, *norms[1], w3, *norms[2], *norms[3], scale, *pieces,
            H=heads, HP=power_of_two(heads), E=expanded, EP=power_of_two(expanded), K=kernel,
            TAPS=power_of_two(kernel * kernel), EXPANDS=w1 is not None,
        )  # fmt: skip
    expansion = None if w1 is None else Expansion(*pieces[:2])
    return Folded(expansion, Local(*pieces[2:4]), *pieces[4:])


class TritonPasses:
    """The passes of [`recomputing_refiner.Passes`] as kernels."""

    def __init__(
        self, attention_map: torch.Tensor, weight_shape: torch.Size, mask: torch.Tensor | None, training: bool = True
    ):
        expanded, _, _, kernel_size = weight_shape
        self.maps, self.kernel_size = attention_map, kernel_size
        self.real = None if mask is None else mask.contiguous().view(torch.uint8)
        self.images, self.heads, self.size, _ = attention_map.shape
        self.area, self.side = self.size * self.size, self.size + kernel_size - 1
        self.padded_heads = padded_heads(self.heads)
        kernels = Kernels("refinement", training, attention_map.dtype, self.heads, expanded, kernel_size)
        self.tiles: RefinementTiles = tiles_for(kernels, attention_map.device)
        strips = ceil_div(self.size, self.tiles.rows)
        self.rows = ceil_div(self.size, strips)
        self.blocks = ceil_div(strips * self.size, self.tiles.lanes)  # programs of an image

    def map_moments(self) -> Moments:
        groups = self._pack_groups
        counts, means = self._sums(groups), self._sums(groups, self.heads)
        scatters = self._sums(groups, self.heads, self.heads)
        self.packed = self._pack(counts, means, scatters)
        count, means, scatter = self._joined(counts, means, scatters, self.heads, self.heads)
        return Moments(count, means[:, None], means[None, :], scatter)

    def local_moments(self, expansion: Expansion | None, weight: torch.Tensor) -> Moments:
        expanded = weight.shape[0]
        counts, means, scatters = self._sums(self.blocks), *(self._sums(self.blocks, expanded) for _ in range(2))
        with on_device_of(self.maps):
            local_moments_kernel[self.blocks, self.images, ceil_div(expanded, self.tiles.channels)](
                self.packed, *_of(expansion), weight.contiguous(), counts, means, scatters, self.size,
                MASKED=self.real is not None, **self._constants(expansion, weight),
            )  # fmt: skip
        count, mean, scatter = self._joined(counts, means, scatters, 1, expanded)
        return Moments(count, mean, mean, scatter)

    def project(
        self, expansion: Expansion | None, local: Local, reduction: torch.Tensor
    ) -> tuple[torch.Tensor, Moments]:
        reduced = torch.empty_like(self.maps)
        counts, means = self._sums(self.blocks), self._sums(self.blocks, 2, self.heads)
        scatters = torch.empty_like(means)
        self.run_projection(expansion, local, reduction, None, None, reduced, counts, means, scatters)
        count, means, scatter = self._joined(counts, means, scatters, 1, self.heads)
        return reduced, Moments(count, means[:1].expand_as(means), means, scatter)  # z3 with itself and with the map

    def combine(self, coefficients: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(self.maps)
        with on_device_of(self.maps):
            combine_kernel[self.images * self.heads, ceil_div(self.area, _PLAIN)](
                coefficients, self.maps, reduced, output, self.area, H=self.heads, BLOCK=_PLAIN
            )
        return output

    def outer_sums(self, gradient: torch.Tensor, reduced: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        blocks = ceil_div(self.area, _PLAIN)
        sums = self._sums(blocks, 3, self.heads)
        with on_device_of(self.maps):
            outer_sums_kernel[self.images * self.heads, blocks](
                gradient, self.maps, reduced, means, sums, self.area, H=self.heads, BLOCK=_PLAIN
            )
        return _added(sums)

    def reduction_backward(self, inputs: BackwardInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        expanded = inputs.reduction.shape[1]
        sums = self._sums(self.blocks, 2 + self.heads, expanded)
        # The gradient at z3, packed as well; the other passes need it too.
        self.reduced_gradient = self.maps.new_empty(self.images, self.area, self.padded_heads)
        with on_device_of(self.maps):
            reduced_gradient_kernel[ceil_div(self.area, _PACKED), self.images](
                inputs.gradient, self.maps, self.real, inputs.reduced, inputs.coefficients, self.reduced_gradient,
                self.size, H=self.heads, HP=self.padded_heads, BLOCK=_PACKED, MASKED=self.real is not None,
            )  # fmt: skip
            reduction_backward_kernel[self.blocks, self.images, ceil_div(expanded, self.tiles.channels)](
                *self._backward_arguments(inputs, slice(None)), sums, self.size,
                **self._constants(inputs.expansion, inputs.local.weight),
            )  # fmt: skip
        sums = _added(sums)
        return sums[0], sums[1], sums[2:]

    def expansion_backward(
        self, inputs: BackwardInputs, second_norm: torch.Tensor, weight: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        expansion, expanded, weight = inputs.expansion, len(weight), weight.contiguous()
        part = torch.empty(self.images, self.area, self.heads, dtype=torch.float32, device=self.maps.device)
        local_sums = self._sums(self.blocks, expanded, weight[0].numel())
        sums = None if expansion is None else self._sums(self.blocks, self.heads + 1, expanded)
        channel_blocks = ceil_div(expanded, self.tiles.channels)
        shape = (*self.packed.shape[1:3], channel_blocks * self.tiles.channels)
        images_at_once = min(self.images, max(1, _EXCHANGE // (math.prod(shape) * self.maps.itemsize)))
        exchange = self.maps.new_zeros(images_at_once, *shape)  # around the maps it stays so
        constants = self._constants(expansion, weight)
        # How many steps are loaded at a time: what the smallest GPU has room for.
        of_a_step = self.tiles.lanes * self.maps.itemsize * (shape[-1] * self.kernel_size + self.padded_heads)
        stages = max(1, min(3, _AHEAD // of_a_step))
        with on_device_of(self.maps):
            for start in range(0, self.images, images_at_once):
                images = slice(start, min(start + images_at_once, self.images))
                count = images.stop - images.start
                local_gradient_kernel[self.blocks, count, channel_blocks](
                    *self._backward_arguments(inputs, images), second_norm, exchange, self.size,
                    MASKED=self.real is not None, **constants,
                )  # fmt: skip
                of_these = slice(start * self.blocks, images.stop * self.blocks)
                arguments = (self.packed[images], exchange, *_of(expansion))
                local_weight_gradient_kernel[self.blocks, count, channel_blocks](
                    *arguments, local_sums[of_these], self.size, **constants
                )
                expansion_backward_kernel[self.blocks, count](
                    *arguments, weight, centre, part[images], None if sums is None else sums[of_these], self.size,
                    BLOCKS=channel_blocks, num_stages=stages, **constants,
                )  # fmt: skip
        weight_gradient = _added(local_sums).view_as(weight)
        if expansion is None:
            return weight_gradient, None, None, part
        sums = _added(sums)
        return weight_gradient, sums[-1], sums[:-1].T, part

    def finish(
        self, part: torch.Tensor, inputs: BackwardInputs, coefficients: torch.Tensor, mixing: torch.Tensor | None
    ) -> torch.Tensor:
        output = torch.empty_like(self.maps)
        with on_device_of(self.maps):
            finish_kernel[ceil_div(self.area, _PACKED), self.images](
                part, inputs.gradient, self.maps, inputs.reduced, coefficients, mixing, output, self.size,
                H=self.heads, HP=self.padded_heads, MIXES=mixing is not None, BLOCK=_PACKED,
                PRECISION=precision(),
            )  # fmt: skip
        return output

    @cached_property
    def packed(self) -> torch.Tensor:
        """Maps with their heads side by side, as the kernels want them."""
        packed = None if self.maps.is_contiguous() else packed_of(self.maps, self.kernel_size)
        return self._pack(None, None, None) if packed is None else packed

    @property
    def _pack_groups(self) -> int:
        return ceil_div(self.side * self.side, _STEPS * _PACKED)

    def _pack(self, counts, means, scatters) -> torch.Tensor:
        packed = empty_packed(self.images, self.heads, self.size, self.kernel_size, like=self.maps)
        with on_device_of(self.maps):
            pack_kernel[self._pack_groups, self.images](
                self.maps, self.real, packed, counts, means, scatters, self.size,
                STEPS=_STEPS, H=self.heads, HP=self.padded_heads, HALF=self.kernel_size // 2, BLOCK=_PACKED,
                MOMENTS=means is not None, MASKED=self.real is not None, num_warps=1 if means is not None else 4,
            )  # fmt: skip
        return packed

    def run_projection(self, expansion, local: Local, reduction, identity, constant, output, *sums) -> None:
        with on_device_of(self.maps):
            project_kernel[self.blocks, self.images](
                self.packed, *_of(expansion), local.weight.contiguous(), local.bias, reduction, identity, constant,
                output, *sums, self.size, BLOCKS=ceil_div(len(local.weight), self.tiles.channels),
                MOMENTS=identity is None, MASKED=self.real is not None, **self._constants(expansion, local.weight),
            )  # fmt: skip

    def _joined(self, counts, means, scatters, x_repeats: int, x: int) -> tuple[torch.Tensor, ...]:
        """Count, means and scatters of all programs together; see the kernel about the last two arguments."""
        sizes = (1, means[0].numel(), scatters[0].numel())
        output = self.maps.new_empty(sum(sizes), dtype=torch.float64)
        with on_device_of(self.maps):
            join_kernel[(ceil_div(sizes[2], _JOINED_SUMS),)](
                counts, means, scatters, output, len(counts),
                MEANS=sizes[1], PAIRS=sizes[2], X_REPEATS=x_repeats, X=x, PROGRAMS=_JOINED, CHANNELS=_JOINED_SUMS,
                num_warps=8,
            )  # fmt: skip
        count, mean, scatter = output.split(sizes)
        return count[0], mean.view(means.shape[1:]), scatter.view(scatters.shape[1:])

    def _backward_arguments(self, inputs: BackwardInputs, images: slice) -> tuple:
        vectors = (inputs.local.bias, inputs.gain, inputs.offset, inputs.reduction)
        maps = (self.packed[images], self.reduced_gradient[images])
        return *maps, *_of(inputs.expansion), inputs.local.weight.contiguous(), *vectors

    def _sums(self, programs: int, *shape: int) -> torch.Tensor:
        """For what `programs` programs for each image add up."""
        return self.maps.new_empty(programs * self.images, *shape, dtype=torch.float32)

    def _constants(self, expansion: Expansion | None, weight: torch.Tensor) -> dict:
        """What kernels are compiled for."""
        return dict(
            H=self.heads,
            HP=self.padded_heads,
            E=weight.shape[0],
            K=self.kernel_size,
            EXPANDS=expansion is not None,
            ROWS=self.rows,
            BLOCK=self.tiles.lanes,
            num_warps=self.tiles.warps,
            CHANNELS=self.tiles.channels,
            PRECISION=precision(),
        )


triton_training = Recomputed("triton", TritonPasses)


def _of(expansion: Expansion | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if expansion is None else (expansion.weight.contiguous(), expansion.bias)


def _added(sums: torch.Tensor) -> torch.Tensor:
    """All programs' sums together."""
    return sums.sum(0, dtype=torch.float64)
