# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The sizes of the Triton kernels' tiles: defaults, and what is faster on the GPU at hand.

`refiner benchmark --part tiles` times the candidates and writes the fastest to a file in the user's cache. From there
everything that runs the kernels takes them: no option asks for it. Where the file has nothing for a GPU, or nothing
that can be used, the defaults hold. Sizes change speed, and results only by rounding.

The file is JSON, with sizes by GPU and by kernels, both by name:

    {"NVIDIA H100 PCIe, compute capability 9.0, triton 3.8.0":
        {"map, inference, bfloat16, 12 heads of 32": {"rows": 16, "columns": 32, "warps": 8}}}
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .triton_launch_refiner import triton
from .user_cache_refiner import user_cache


logger = logging.get_logger(__name__)


class RefinementTiles(NamedTuple):
    """Of the refinement's kernels (`triton_refiner.py`)."""

    lanes: int  # of a program
    warps: int  # that they make
    rows: int  # that a lane walks, about
    channels: int  # expanded heads of a tile


class MapTiles(NamedTuple):
    """Of the kernels that make a layer's own map (`triton_attention_refiner.py`)."""

    rows: int  # queries of a step: in inference for all heads at once, in training for one
    columns: int  # keys of a step
    warps: int  # of a program


Tiles = RefinementTiles | MapTiles


def in_words(tiles: Tiles) -> str:
    return ", ".join(f"{name} {size}" for name, size in tiles._asdict().items())


class Kernels(NamedTuple):
    """The kernels that one choice of sizes is for: what they do, and what else they are compiled for."""

    of: str  # "refinement" or "map"
    training: bool
    dtype: torch.dtype  # of the maps
    heads: int
    width: int  # of a refinement the expanded heads, of a map the numbers of a head
    kernel_size: int | None = None  # of a refinement

    @property
    def name(self) -> str:
        sizes = f"{self.heads} heads "
        sizes += f"of {self.width}" if self.of == "map" else f"expanded to {self.width}, kernel {self.kernel_size}"
        return f"{self.of}, {'training' if self.training else 'inference'}, {str(self.dtype)[6:]}, {sizes}"

    @property
    def default(self) -> Tiles:
        return DEFAULTS[self.of, self.training]

    @property
    def candidates(self) -> tuple[Tiles, ...]:
        return CANDIDATES[self.of, self.training]


# An H100's: the refinement's were timed there, the map's chosen by registers and instructions.
DEFAULTS: dict[tuple[str, bool], Tiles] = {
    ("refinement", False): RefinementTiles(lanes=32, warps=2, rows=32, channels=16),
    ("refinement", True): RefinementTiles(lanes=32, warps=2, rows=32, channels=16),
    ("map", False): MapTiles(rows=16, columns=16, warps=8),
    ("map", True): MapTiles(rows=32, columns=32, warps=2),
}

# What is tried. A product's smallest side is 16, and from four warps and 64 rows on newer GPUs have larger products.
_REFINEMENTS = tuple(
    RefinementTiles(lanes, warps, rows, channels)
    for (lanes, warps), rows, channels in product(((16, 1), (32, 1), (32, 2), (64, 4)), (16, 32, 64), (16, 32))
)
CANDIDATES: dict[tuple[str, bool], tuple[Tiles, ...]] = {
    ("refinement", False): _REFINEMENTS,
    ("refinement", True): _REFINEMENTS,
    ("map", False): tuple(MapTiles(*sizes) for sizes in product((16, 32), (16, 32), (4, 8))),
    ("map", True): tuple(MapTiles(*sizes) for sizes in product((32, 64, 128), (32, 64), (2, 4))),
}
MOST_CHANNELS = max(tiles.channels for tiles in _REFINEMENTS)

_tried: dict[tuple[str, bool], Tiles] = {}


def tiles_for(kernels: Kernels, device: torch.device) -> Any:
    """The sizes for some kernels on a device: those within [`trying`], else those of [`chosen_tiles`]."""
    return _tried.get((kernels.of, kernels.training)) or chosen_tiles(kernels, device)


@contextmanager
def trying(tiles: dict[tuple[str, bool], Tiles]) -> Iterator[None]:
    """Within it, kernels have these sizes, by what they do and whether for training; in all threads."""
    before = dict(_tried)
    _tried.update(tiles)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


@functools.cache  # also because a launch should take no longer for it
def chosen_tiles(kernels: Kernels, device: torch.device) -> Tiles:
    """The sizes that the file has for a device, or the defaults; with a warning where the file can't be used."""
    gpu = gpu_name(device)
    if gpu is None:
        return kernels.default
    try:
        sizes = read_tiles().get(gpu, {}).get(kernels.name)
        if sizes is None:
            return kernels.default
        for tiles in kernels.candidates:
            if tiles._asdict() == sizes:
                return tiles
        obstacle = f"{tiles_file()} has sizes that no kernel can have: {sizes}"
    except (OSError, ValueError, RuntimeError) as error:  # the last where there is no home
        obstacle = str(error)
    logger.warning_once(f"Tiles of kernels have their default sizes. {obstacle}")
    return kernels.default


def gpu_name(device: torch.device) -> str | None:
    """What the file calls a GPU, with all that its sizes depend on; `None` for anything else."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, triton {triton.__version__}"


def tiles_file() -> Path:
    return user_cache() / "tiles.json"


def read_tiles() -> dict[str, dict[str, Any]]:
    """
    What the file holds: sizes by kernels by GPU, none of them checked. Where there is no file, nothing.

    Raises:
        `ValueError`: the file is damaged.
        `OSError`: it can't be read.
    """
    path = tiles_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(each, dict) for each in content.values()):
            raise ValueError("it holds no sizes by GPU")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        advice = "Delete it; `refiner benchmark --part tiles` makes it again."
        raise ValueError(f"{path} is damaged: {error}. {advice}") from error
    return content
