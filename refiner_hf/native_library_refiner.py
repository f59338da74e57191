# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The C++ functions in `native/`. They are compiled when one is first needed, for the processor at hand, and kept in the
user's cache. That needs a C++ compiler, and nothing of torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .user_cache_refiner import user_cache


_SOURCES = sorted(Path(__file__).with_name("native").glob("*"))  # none beside a model's code on the Hub
# No -ffast-math: it would change what the whole process does with the smallest numbers.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-pthread")
_TYPES = (torch.float32, torch.bfloat16)


def why_no_function(*tensors: torch.Tensor) -> str | None:
    """Why the functions can't be called with these tensors on this machine, or `None` where they can."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in _TYPES:
        return f"it is for float32 and bfloat16 on CPUs, got {first.dtype} on {first.device.type}"
    if any(each.dtype != first.dtype for each in tensors):
        return "it is for tensors of one type"
    return _why_not_loaded()


def call(function: str, tensors: Sequence[torch.Tensor | None], sizes: Sequence[int], *numbers: Any) -> None:
    """
    Calls a function of the library.

    Args:
        function (`str`): its name.
        tensors: what it reads and writes, contiguous, in the order in which it takes them.
        sizes: its integers, without the last, which is the number of threads.
        numbers: its other arguments, as `ctypes` has them.

    Raises:
        `MemoryError`: it found too little memory.
    """
    addresses = [None if each is None else each.data_ptr() for each in tensors]
    sizes = (*sizes, torch.get_num_threads())
    failed = getattr(_loaded(), function)(
        (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(sizes))(*sizes), *numbers, _parallel()
    )
    if failed:
        raise MemoryError("There is too little memory: take fewer images at once.")


@torch.compiler.assume_constant_result  # compilers needn't look into it
def _why_not_loaded() -> str | None:
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The compiled functions, or why they can't be had."""
    try:
        return ctypes.CDLL(str(_library()))
    except OSError as error:
        return f"its C++ function can't be had: {error}"


def _library() -> Path:
    """The compiled library, made where there is none of these sources for this processor."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    if not _SOURCES:
        raise OSError("its source isn't beside the model's code; it comes with the package refiner_hf")
    sources = [source.read_text(encoding="utf-8") for source in _SOURCES]
    kind = [*sources, *_FLAGS, compiler, platform.machine(), _processor()]
    cache = user_cache()
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
        files = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
        run = subprocess.run([compiler, *_FLAGS, "-o", str(new), *files], capture_output=True, text=True)
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
