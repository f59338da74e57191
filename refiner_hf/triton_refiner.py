# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement on NVIDIA GPUs by fused kernels: expanded maps are neither kept nor, but for one exchange, written.

A program of the kernels expands its neighbours again rather than exchanging them with other programs: 9 (or 25) small
products on tensor cores instead of one, and nobody waits for anybody. The gradient of the convolution is different: it
needs the neighbours' gradients, which need their neighbours' expansions, 81 in all. That one expanded gradient goes
through memory, a few images at a time, as many as stay in the second-level cache.
"""

import os
from contextlib import nullcontext

import torch
from torch import nn

from .exact_refiner import BackwardInputs, Moments, exact_refine, joined, sums_type
from .folding_refiner import Expansion, Local, fold, needs_exact
from .triton_kernels_refiner import (
    combine_kernel,
    expansion_backward_kernel,
    finish_kernel,
    local_gradient_kernel,
    local_moments_kernel,
    map_moments_kernel,
    outer_sums_kernel,
    project_kernel,
    reduction_backward_kernel,
    triton,
)


# Positions and expanded heads of a tile; blocks of positions that one program adds up; positions of a program that
# expands nothing; bytes of the exchanged gradient.
_PIXELS, _CHANNELS, _STEPS, _PLAIN, _EXCHANGE = 128, 16, 8, 1024, 32 * 2**20
_MAX_HEADS = 16


def why_not_triton(refinement: nn.Module, attention_map: torch.Tensor) -> str | None:
    """Why the kernels can't refine a map on this machine, or `None` where they can."""
    if triton is None:
        return "triton isn't installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if attention_map.device.type != "cuda" or torch.version.cuda is None:
            return "the kernels need an NVIDIA GPU"
        if torch.cuda.get_device_capability(attention_map.device) < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    if attention_map.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take no maps in {attention_map.dtype}"
    if attention_map.shape[1] > _MAX_HEADS:
        return f"the kernels take up to {_MAX_HEADS} heads"
    if refinement.local_attention is None:
        return "the kernels are for the refinement with distributed local attention"
    # The first is CUDA's limit, the second that of the kernels' 32-bit offsets within an image.
    if len(attention_map) >= 2**16 or refinement.reduction.in_channels * attention_map[0, 0].numel() >= 2**31:
        return "the kernels take fewer than 65536 images, and fewer than 2^31 values of an image's expanded maps"
    return None


def triton_refine(refinement: nn.Module, attention_map: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """
    The refinement by kernels: with batch statistics or gradients as in [`exact_refine`], else with every norm folded
    into the weights before it.

    Products of float32 maps are as exact as float32 (three TF32 products each), unless the user lets torch's own
    products be in TF32 (`torch.backends.cuda.matmul.fp32_precision`).

    Args:
        refinement: the module that holds weights and norms.
        attention_map (`torch.Tensor` of shape (B, H, N, N)): in float32, bfloat16 or float16, H at most 16.
        scale: a factor on the result.

    Returns:
        `torch.Tensor` of shape (B, H, N, N).
    """
    if needs_exact(refinement, attention_map):
        return exact_refine(refinement, attention_map, scale, TritonPasses)
    folded = fold(refinement, torch.float32, scale)
    attention_map = attention_map.contiguous()
    output = torch.empty_like(attention_map)
    grid = (_Grid(attention_map).blocks, len(attention_map))
    arguments = (folded.reduction, folded.identity, folded.constant, output, None, None)
    _project(grid, attention_map, folded.expansion, folded.local, arguments, moments=False)
    return output


class TritonPasses:
    """The passes of [`exact_refiner.Passes`] as kernels."""

    @staticmethod
    def map_moments(attention_map: torch.Tensor) -> Moments:
        grid, heads = _Grid(attention_map), attention_map.shape[1]
        means = _sums(attention_map, grid.groups * grid.images, heads)
        scatters = _sums(attention_map, grid.groups * grid.images, heads, heads)
        with _on(attention_map):
            map_moments_kernel[grid.groups, grid.images](
                attention_map, means, scatters, grid.size,
                STEPS=_STEPS, H=heads, HP=_padded(heads), PIXELS=_PIXELS,
            )  # fmt: skip
        return joined(grid.counts(_STEPS * _PIXELS, means), means[:, :, None], means[:, None, :], scatters)

    @staticmethod
    def local_moments(attention_map: torch.Tensor, expansion: Expansion | None, weight: torch.Tensor) -> Moments:
        grid, expanded = _Grid(attention_map), weight.shape[0]
        means, scatters = (_sums(attention_map, grid.blocks * grid.images, expanded) for _ in range(2))
        with _on(attention_map):
            local_moments_kernel[grid.blocks, triton.cdiv(expanded, _CHANNELS), grid.images](
                attention_map, *_of(expansion), weight.contiguous(), means, scatters, grid.size,
                **_constants(attention_map, expansion, weight),
            )  # fmt: skip
        return joined(grid.counts(_PIXELS, means), means, means, scatters)

    @staticmethod
    def project(
        attention_map: torch.Tensor, expansion: Expansion | None, local: Local, reduction: torch.Tensor
    ) -> tuple[torch.Tensor, Moments]:
        grid, heads = _Grid(attention_map), attention_map.shape[1]
        reduced = torch.empty_like(attention_map)
        means, scatters = (_sums(attention_map, grid.blocks * grid.images, 2, heads) for _ in range(2))
        arguments = (reduction, None, None, reduced, means, scatters)
        _project((grid.blocks, grid.images), attention_map, expansion, local, arguments, moments=True)
        x = means[:, :1].expand_as(means)  # z3 with itself and with the map
        return reduced, joined(grid.counts(_PIXELS, means), x, means, scatters)

    @staticmethod
    def combine(coefficients: torch.Tensor, attention_map: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        images, heads, size, _ = attention_map.shape
        output = torch.empty_like(attention_map)
        with _on(attention_map):
            combine_kernel[images * heads, triton.cdiv(size * size, _PLAIN)](
                coefficients, attention_map, reduced, output, size * size, H=heads, PIXELS=_PLAIN
            )
        return output

    @staticmethod
    def outer_sums(
        gradient: torch.Tensor, attention_map: torch.Tensor, reduced: torch.Tensor, means: torch.Tensor
    ) -> torch.Tensor:
        images, heads, size, _ = attention_map.shape
        blocks = triton.cdiv(size * size, _PLAIN)
        sums = _sums(attention_map, blocks * images, 3, heads)
        with _on(attention_map):
            outer_sums_kernel[images * heads, blocks](
                gradient, attention_map, reduced, means, sums, size * size, H=heads, PIXELS=_PLAIN
            )
        return _added(sums)

    @staticmethod
    def reduction_backward(inputs: BackwardInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps, (heads, expanded) = inputs.attention_map, inputs.reduction.shape
        grid = _Grid(maps)
        sums, products = (_sums(maps, grid.groups * grid.images, expanded) for _ in range(2))
        reduction_gradient = _sums(maps, grid.groups * grid.images, heads, expanded)
        with _on(maps):
            reduction_backward_kernel[grid.groups, triton.cdiv(expanded, _CHANNELS), grid.images](
                *_backward_arguments(inputs, slice(None)), sums, products, reduction_gradient, grid.size,
                STEPS=_STEPS, **_constants(maps, inputs.expansion, inputs.local.weight),
            )  # fmt: skip
        return _added(sums), _added(products), _added(reduction_gradient)

    @staticmethod
    def expansion_backward(
        inputs: BackwardInputs, second_norm: torch.Tensor, weight: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        maps, (heads, expanded), expansion = inputs.attention_map, inputs.reduction.shape, inputs.expansion
        grid, taps = _Grid(maps), weight[0].numel()
        part = torch.empty_like(maps, dtype=torch.float32)
        programs = grid.groups * grid.images
        weight_gradient = _sums(maps, programs, expanded, taps)
        sums, products = _sums(maps, programs, expanded), _sums(maps, programs, expanded, heads)
        together = max(1, _EXCHANGE // (expanded * grid.area * maps.itemsize))
        exchange = torch.empty((min(together, grid.images), expanded, grid.area), dtype=maps.dtype, device=maps.device)
        constants = _constants(maps, expansion, weight)
        weight = weight.contiguous()
        with _on(maps):
            for start in range(0, grid.images, together):
                images = slice(start, min(start + together, grid.images))
                count = images.stop - images.start
                local_gradient_kernel[grid.blocks, triton.cdiv(expanded, _CHANNELS), count](
                    *_backward_arguments(inputs, images), second_norm, exchange, grid.size, **constants
                )
                of_these = slice(start * grid.groups, images.stop * grid.groups)
                expansion_backward_kernel[grid.groups, count](
                    maps[images], *_of(expansion), weight, exchange, centre, part[images],
                    weight_gradient[of_these], sums[of_these], products[of_these], grid.size,
                    STEPS=_STEPS, TAPS=triton.next_power_of_2(taps), **constants,
                )  # fmt: skip
        weight_gradient = _added(weight_gradient).view_as(weight)
        if expansion is None:
            return weight_gradient, None, None, part
        return weight_gradient, _added(sums), _added(products), part

    @staticmethod
    def finish(
        part: torch.Tensor, inputs: BackwardInputs, coefficients: torch.Tensor, mixing: torch.Tensor | None
    ) -> torch.Tensor:
        maps, heads = inputs.attention_map, inputs.attention_map.shape[1]
        grid = _Grid(maps)
        output = part if part.dtype == maps.dtype else torch.empty_like(maps)
        with _on(maps):
            finish_kernel[grid.blocks, grid.images](
                part, inputs.gradient, maps, inputs.reduced, coefficients, mixing, output, grid.size,
                H=heads, HP=_padded(heads), MIXES=mixing is not None, PIXELS=_PIXELS, PRECISION=_precision(maps),
            )  # fmt: skip
        return output


class _Grid:
    """How maps are divided among programs: blocks of positions, and groups of blocks that one program adds up."""

    def __init__(self, maps: torch.Tensor):
        self.images, _, self.size, _ = maps.shape
        self.area = self.size * self.size
        self.blocks = triton.cdiv(self.area, _PIXELS)
        self.groups = triton.cdiv(self.blocks, _STEPS)

    def counts(self, positions: int, like: torch.Tensor) -> torch.Tensor:
        """Positions that each program of all images sees, where it takes `positions` at most."""
        starts = torch.arange(0, self.area, positions, device=like.device)
        return (self.area - starts).clamp(max=positions).to(sums_type(like)).repeat(self.images)


def _project(grid: tuple[int, int], maps: torch.Tensor, expansion, local: Local, arguments, moments: bool) -> None:
    with _on(maps):
        project_kernel[grid](
            maps, *_of(expansion), local.weight.contiguous(), local.bias, *arguments, maps.shape[-1],
            **_constants(maps, expansion, local.weight), MOMENTS=moments,
        )  # fmt: skip


def _backward_arguments(inputs: BackwardInputs, images: slice) -> tuple:
    maps = (inputs.gradient[images], inputs.attention_map[images], inputs.reduced[images])
    vectors = (inputs.local.weight.contiguous(), inputs.local.bias, inputs.gain, inputs.offset, inputs.reduction)
    return *maps, inputs.coefficients, *_of(inputs.expansion), *vectors


def _constants(maps: torch.Tensor, expansion: Expansion | None, weight: torch.Tensor) -> dict:
    """What kernels are compiled for."""
    return dict(
        H=maps.shape[1],
        HP=_padded(maps.shape[1]),
        E=weight.shape[0],
        K=weight.shape[-1],
        EXPANDS=expansion is not None,
        PIXELS=_PIXELS,
        CHANNELS=_CHANNELS,
        PRECISION=_precision(maps),
    )


def _of(expansion: Expansion | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if expansion is None else (expansion.weight.contiguous(), expansion.bias)


def _padded(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads))  # a product's smallest side


def _precision(maps: torch.Tensor) -> str:
    # TF32 holds every bit of a half-precision map.
    exact = maps.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def _on(maps: torch.Tensor):
    """Kernels go to the current device, which need not be the maps'."""
    return torch.cuda.device(maps.device) if maps.is_cuda else nullcontext()


def _sums(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _added(sums: torch.Tensor) -> torch.Tensor:
    """All programs' sums together."""
    return sums.sum(0, dtype=sums_type(sums))
