# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement in evaluation on a CPU, by a small C++ function (`native_refiner.cpp`). It is compiled when it is first
needed, for the processor at hand, and kept in the user's cache. It needs a C++ compiler, and nothing of torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .folding_refiner import needs_training_form, operands_of
from .operations_refiner import like_the_map, operation


SOURCE = Path(__file__).with_suffix(".cpp")
# No -ffast-math: it would change what the whole process does with the smallest numbers.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-pthread")
_MAP_TYPES = (torch.float32, torch.bfloat16)


def native_refine(
    refinement: Any, attention_map: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """As [`blocked_refiner.blocked_refine`], where [`why_not_native`] has nothing against it."""
    return _native_refine(attention_map.contiguous(), *operands_of(refinement), scale)


@operation(
    "native_refine(Tensor map, Tensor?[] weights, float[] eps, float scale) -> Tensor", like_the_map, products=1
)
def _native_refine(
    attention_map: torch.Tensor, weights: list[torch.Tensor | None], eps: list[float], scale: float
) -> torch.Tensor:
    """The operation: calls the function. Its arguments are in the order in which that takes them."""
    output = torch.empty_like(attention_map)
    weights = [None if weight is None else weight.to(torch.float32).contiguous() for weight in weights]
    addresses = [None if each is None else each.data_ptr() for each in (attention_map, output, *weights)]
    batch, heads, size, _ = attention_map.shape
    expanded, _, kernel, _ = weights[1].shape  # type: ignore[union-attr]
    sizes = (batch, heads, expanded, size, kernel, attention_map.dtype == torch.bfloat16, torch.get_num_threads())
    function: Any = _loaded()
    failed = function(
        (ctypes.c_void_p * len(addresses))(*addresses),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * len(eps))(*eps),
        ctypes.c_double(scale),
        _parallel(),
    )
    if failed:
        raise MemoryError("There is too little memory to refine attention maps.")
    return output


def why_not_native(refinement: nn.Module, attention_map: torch.Tensor, masked: bool) -> str | None:
    """Why the function can't refine this map, or `None` where it can."""
    if attention_map.device.type != "cpu" or attention_map.dtype not in _MAP_TYPES:
        return f"it is for float32 and bfloat16 on CPUs, got {attention_map.dtype} on {attention_map.device.type}"
    if masked:
        return "it knows no masks"
    if getattr(refinement, "local_attention", None) is None:
        return "it is for refinements with a distributed local attention"
    if needs_training_form(refinement, attention_map):
        return "it is for evaluation without gradients"
    return _why_not_loaded()


@torch.compiler.assume_constant_result  # compilers needn't look into it
def _why_not_loaded() -> str | None:
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _loaded() -> Callable[..., int] | str:
    """The compiled function, or why it can't be had."""
    try:
        function = ctypes.CDLL(str(_library())).refiner_refine
    except OSError as error:
        return f"its C++ function can't be had: {error}"
    function.restype = ctypes.c_int
    return function


def _library() -> Path:
    """The compiled library, made where there is none of this source for this processor."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    if not SOURCE.is_file():
        raise OSError(f"{SOURCE.name} isn't beside the model's code; it comes with the package refiner_hf")
    kind = [SOURCE.read_text(encoding="utf-8"), *_FLAGS, compiler, platform.machine(), _processor()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refiner_hf"
    library = cache / f"native-{hashlib.sha256('|'.join(kind).encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(dir=cache)
    except OSError:  # for this process alone
        made = tempfile.mkdtemp()
        library = Path(made, library.name)
    new = Path(made, "new.so")
    try:
        run = subprocess.run([compiler, *_FLAGS, "-o", str(new), str(SOURCE)], capture_output=True, text=True)
        if run.returncode:
            raise OSError(f"{compiler} says: {run.stderr.strip()[:500]}")
        new.replace(library)  # whole or not at all, whoever else makes it now
    finally:
        if library.parent != Path(made):
            shutil.rmtree(made, ignore_errors=True)
    return library


def _processor() -> str:
    """What the processor can; a folder may be shared among machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@functools.cache
def _parallel() -> Any:
    """
    What starts threads in the OpenMP that torch has loaded. With an OpenMP of its own the function would have other
    threads, and both would wait for the processor.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    loaded = {line.split()[-1] for line in lines if "/libgomp" in line}
    # Other packages may have brought others; torch's lies beside it, or is the only one.
    of_torch = [file for file in loaded if Path(torch.__file__).parent in Path(file).parents] or list(loaded)
    if len(of_torch) != 1:
        return None
    return ctypes.cast(ctypes.CDLL(of_torch[0]).GOMP_parallel, ctypes.c_void_p)
