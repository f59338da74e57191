"""Finds the tiles with which the Triton kernels are fastest on the GPU at hand, and keeps them for what runs there."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ..configuration_refiner import RefinerConfig
from ..packed_maps_refiner import as_maps, empty_packed
from ..triton_attention_refiner import make_map, makes_map
from ..triton_tiles_refiner import (
    Kernels,
    Tiles,
    chosen_tiles,
    gpu_name,
    in_words,
    read_tiles,
    tiles_file,
    tiles_for,
    trying,
)
from ..utils.files import check_writable, write_json
from ..utils.locking import locked
from ..utils.markdown import markdown_table
from ..utils.measure import Step, time_in_turns
from .contenders import NETWORKS, Case, make_refinement_step
from .options import BenchmarkOptions


Times = dict[str, dict[str, Any]]  # by candidate `seconds`, or `error`, why there are none


def tune(options: BenchmarkOptions, say: Callable[[str], None] = print) -> None:
    """
    Times every candidate for the kernels of some networks, and writes the fastest to the file of
    [`triton_tiles_refiner`], after each kind of kernels. What the file has of others stays.

    Args:
        options: the networks, image sizes (where there are several, their times are added), batches, type and rounds.
        say: gets a table for each kind of kernels.

    Raises:
        `ValueError`, `OSError`: options that don't fit each other, a damaged file, or a folder that can't be written;
            before anything is timed.
        `RuntimeError`: the GPU takes none of all candidates.
        `OSError`: the file couldn't be written after all. Its text has the sizes.
    """
    device = torch.empty(0, device=options.device).device
    found: dict[str, dict[str, int]] = {}
    cases = _cases(options)
    read_tiles()
    path = tiles_file()
    check_writable(path.parent, "The cache", "Give another one in XDG_CACHE_HOME.")
    with locked(path.with_suffix(".lock"), str(path)):
        for index, (kernels, sizes) in enumerate(cases.items(), 1):
            say(f"[{index}/{len(cases)}] {kernels.name}, {sizes[0].batch_size} images ...\n")
            rows = [_times(kernels, case, options.rounds) for case in sizes]
            say(f"{_table(kernels, sizes, rows)}\n")
            fastest = _fastest(kernels, rows)
            if fastest is None:
                say("None of them runs here, so nothing is changed for these kernels.\n")
            else:
                found[kernels.name] = fastest._asdict()
                _keep(found, device)
    if not found:
        raise RuntimeError("None of the tiles runs on this GPU; the tables say why. Nothing was changed.")
    say(f"Wrote {path}. What runs these kernels on this GPU takes the fastest tiles from there.")


def facts_of_tiles(dtype: str, device: str) -> dict[str, str]:
    """
    For a benchmark's facts: on a GPU, which tiles of its networks in a type aren't the defaults. All networks count,
    so that one can join a record later.
    """
    place = torch.empty(0, device=device).device
    if gpu_name(place) is None:
        return {}
    chosen = {kernels: tiles_for(kernels, place) for network in NETWORKS for kernels in _kernels_of(network, dtype)}
    tuned = [f"{kernels.name}: {in_words(tiles)}" for kernels, tiles in chosen.items() if tiles != kernels.default]
    return {"tiles of the kernels": "; ".join(tuned) or "the defaults"}


def _kernels_of(network: str, dtype: str) -> list[Kernels]:
    config: RefinerConfig = NETWORKS[network]()  # type: ignore[operator]
    heads, of = config.num_attention_heads, getattr(torch, dtype)
    expanded, width = heads * config.expansion_ratio, config.hidden_size // heads
    refinements = [Kernels("refinement", t, of, heads, expanded, config.refinement_kernel_size) for t in (False, True)]
    return refinements + [Kernels("map", t, of, heads, width) for t in (False, True)]


def _cases(options: BenchmarkOptions) -> dict[Kernels, list[Case]]:
    """What is timed for each kind of kernels: a case for each image size. Networks may have the same kernels."""
    cases: dict[Kernels, list[Case]] = {}
    for network in options.models:
        for kernels in _kernels_of(network, options.dtype):
            kind, batch_size = "inference", options.batch_size
            if kernels.training:
                kind, batch_size = "training", options.train_batch_size
            found = [
                Case("op", network, size, kind, batch_size, options.dtype, options.device)  # type: ignore[arg-type]
                for size in dict.fromkeys(options.image_sizes)
            ]
            for case in found:
                case.config()  # which raises where an image size doesn't fit
            if kernels.of == "refinement" or _makes_map(found[0]):
                cases.setdefault(kernels, found)
    return cases


def _makes_map(case: Case) -> bool:
    config = case.config(refine_implementation="triton")
    heads = config.num_attention_heads
    shape = (1, heads, 1, config.hidden_size // heads)
    tokens = torch.empty(shape, device=case.device, dtype=getattr(torch, case.dtype))
    return makes_map(config, tokens, tokens, tokens, None)


def _times(kernels: Kernels, case: Case, rounds: int) -> Times:
    if kernels.of == "map":
        steps = [_map_step(case)]
    else:  # with a mask the kernels are others, and what the GPU doesn't take there can't be chosen
        steps = [make_refinement_step(case, "triton", masked) for masked in (False, True)]

    def run(tiles: Tiles, step: Step) -> None:
        with trying({(kernels.of, kernels.training): tiles}):
            step()

    def make_step(tiles: Tiles) -> Step:
        for step in steps[1:]:
            run(tiles, step)
        return partial(run, tiles, steps[0])

    makers: dict[str, Callable[[], Step]] = {
        in_words(tiles): partial(make_step, tiles) for tiles in kernels.candidates
    }
    return time_in_turns(makers, rounds, case.device)


def _map_step(case: Case) -> Step:
    """Makes a layer's own map, which adds that of the layer before and weights values; in training with gradients."""
    config, training = case.config(), case.kind == "training"
    heads, kernel_size = config.num_attention_heads, config.refinement_kernel_size
    width = config.hidden_size // heads
    like = torch.empty(0, device=case.device, dtype=getattr(torch, case.dtype))
    of_tokens, of_maps = (case.batch_size, heads, case.tokens, width), (case.batch_size, heads, *2 * (case.tokens,))
    query, key, value = (like.new_empty(of_tokens).normal_().requires_grad_(training) for _ in range(3))
    if training:
        previous = like.new_empty(of_maps).uniform_().requires_grad_()
        gradients = like.new_empty(of_maps).normal_(), like.new_empty(of_tokens).normal_().transpose(1, 2).flatten(2)
    else:  # as one kernel hands it to the next
        packed = empty_packed(case.batch_size, heads, case.tokens, kernel_size, like=like)
        previous = as_maps(packed.uniform_(), heads, kernel_size)

    def step() -> None:
        made = make_map(query, key, value, previous, width**-0.5, None if training else kernel_size)
        if training:
            torch.autograd.grad(made, (query, key, value, previous), gradients)  # type: ignore[arg-type]

    return step


def _seconds(rows: list[Times], tiles: Tiles) -> list[float]:
    """A candidate's median at each image size; none if it failed at one of them."""
    found = [row[in_words(tiles)] for row in rows]
    return [] if any("error" in each for each in found) else [float(np.median(each["seconds"])) for each in found]


def _fastest(kernels: Kernels, rows: list[Times]) -> Tiles | None:
    able = [tiles for tiles in kernels.candidates if _seconds(rows, tiles)]
    return min(able, key=lambda tiles: sum(_seconds(rows, tiles)), default=None)


def _table(kernels: Kernels, cases: list[Case], rows: list[Times]) -> str:
    """Fastest first, and what failed last, with the reason."""
    lines = []
    for tiles in sorted(kernels.candidates, key=lambda tiles: sum(_seconds(rows, tiles)) or float("inf")):
        found = [row[name := in_words(tiles)] for row in rows]
        cells = [each.get("error") or f"{1e3 * np.median(each['seconds']):.3f}" for each in found]
        lines.append([name + " (default)" * (tiles == kernels.default), *cells])
    return markdown_table(["tiles", *(f"{case.image_size} pixels, ms" for case in cases)], lines)


def _keep(found: dict[str, dict[str, int]], device: torch.device) -> None:
    """Adds what was found to the file, from where it is taken from now on, in this process as well."""
    gpu, content = str(gpu_name(device)), read_tiles()
    content[gpu] = content.get(gpu, {}) | found
    try:
        write_json(tiles_file(), content)
    except OSError as error:
        raise OSError(
            f"{tiles_file()} can't be written: {error}. The fastest sizes so far, to be put into it when it can: "
            f"{json.dumps({gpu: found})}"
        ) from error
    chosen_tiles.cache_clear()
