# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""What every file with Triton kernels needs. A machine without triton can import it."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, where there is triton."""
    return function if triton is None else triton.jit(function)


def why_no_kernels(tensor: torch.Tensor) -> str | None:
    """Why no kernel can run on a tensor of this type on its device, or `None` where they can."""
    if triton is None:
        return "triton isn't installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if tensor.device.type != "cuda" or torch.version.cuda is None:
            return "the kernels need an NVIDIA GPU"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take no maps in {tensor.dtype}"
    return None


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Kernels go to the current device, which need not be the tensor's."""
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


def precision() -> str:
    """Of products of float32 numbers; those of half-precision numbers are what they are."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


# Triton's own are made for kernels too, and take long on the way to one.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(least: int) -> int:
    """The smallest that isn't below."""
    return 1 << (least - 1).bit_length()
