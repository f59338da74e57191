# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""A convolution of the stem in inference on a CPU, by a small C++ function with half the multiplications."""

import torch

from .native_library_refiner import call, why_no_function


# The function reads and writes so many channels at a time, or half as many.
_CHANNELS = 16

# Pixels of all images for a thread. With fewer, transforming the weight takes longer than is saved.
_PAYS_FROM = 64


def convolves(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether [`native_convolve`] can take these, and is worth its preparation."""
    return (
        inputs.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and all(channels % _CHANNELS == 0 for channels in weight.shape[:2])
        and inputs.shape[0] * inputs.shape[2] * inputs.shape[3] >= _PAYS_FROM * torch.get_num_threads()
        and why_no_function(inputs, weight) is None
    )


def native_convolve(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    `relu(conv2d(inputs, weight, bias, padding=1))` by Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308).
    Its rounding errors are of the size of the plain convolution's.

    Args:
        inputs (`torch.Tensor` of shape (B, K, H, W)): in float32, best with the channels last.
        weight (`torch.Tensor` of shape (N, K, 3, 3)); K and N as [`convolves`] asks.
        bias (`torch.Tensor` of shape (N)).

    Returns:
        `torch.Tensor` of shape (B, N, H, W), with the channels last.
    """
    batch, channels, height, width = inputs.shape
    outputs = torch.empty(
        (batch, weight.shape[0], height, width),
        dtype=inputs.dtype,
        device=inputs.device,
        memory_format=torch.channels_last,
    )
    tensors = (inputs.contiguous(memory_format=torch.channels_last), weight.contiguous(), bias.contiguous(), outputs)
    call("refiner_convolve", tensors, (batch, height, width, channels, weight.shape[0]))
    return outputs
