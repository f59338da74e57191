# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Images to embedded patches on a CPU where nothing is differentiated."""

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from .inference_refiner import linear
from .native_convolution_refiner import convolves, native_convolve
from .operations_refiner import operation


# Images of so many pixels go through the stem together: what one convolution made is still in the processor's cache
# when the next one reads it.
_PIXELS = 100_000


def cut_into_patches(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, R height, S width) -> (B, R S, C height width), row by row."""
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, R, height, S, width)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _flops(images_shape: torch.Size, weight_shapes: Sequence[torch.Size], biases: object, strides: list[int]) -> int:
    total, places = 0, prod((images_shape[0], *images_shape[2:]))
    for shape, stride in zip(weight_shapes, (*strides, None)):
        places //= stride**2 if stride else prod(shape[2:])
        total += 2 * places * prod(shape)
    return total


def _fake(
    images: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], strides: list[int]
) -> torch.Tensor:
    batch, _, height, width = images.shape
    rows, columns = (prod(strides) * side for side in weights[-1].shape[2:])
    return images.new_empty(batch, height // rows * (width // columns), weights[-1].shape[0])


@operation(
    "embed_patches(Tensor images, Tensor[] weights, Tensor?[] biases, int[] strides) -> Tensor",
    fake=_fake,
    flops=_flops,
)
def embed_patches(
    images: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], strides: list[int]
) -> torch.Tensor:
    """
    Convolutions with ReLUs, then the projection of patches.

    Args:
        images (`torch.Tensor` of shape (B, C, height, width)).
        weights: of the convolutions, with the norms after them folded into them, and of the projection.
        biases: theirs.
        strides: of the convolutions, which keep what is at the borders. The projection's is its kernel.

    Returns:
        `torch.Tensor` of shape (B, P, D).
    """
    *kernels, projection = weights
    patches = []
    for some in images.split(max(_PIXELS // prod(images.shape[2:]), 1)):
        hidden_states = some.contiguous(memory_format=torch.channels_last)
        for weight, bias, stride in zip(kernels, biases, strides):
            hidden_states = _convolve(hidden_states, weight, bias, stride)
        cut = cut_into_patches(hidden_states, *projection.shape[2:])
        patches.append(linear(cut, projection.flatten(1), biases[-1]))
    return patches[0] if len(patches) == 1 else torch.cat(patches)


def _convolve(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int) -> torch.Tensor:
    if stride == 1 and convolves(hidden_states, weight):
        return native_convolve(hidden_states, weight, bias)
    padding = [side // 2 for side in weight.shape[2:]]
    return nn.functional.conv2d(hidden_states, weight, bias, stride, padding).relu_()
