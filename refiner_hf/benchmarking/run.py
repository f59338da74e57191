"""Runs a benchmark: what its options ask for, saved in a record."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..utils.files import write_json
from ..utils.machine import describe_machine
from ..utils.measure import time_in_turns
from .contenders import NETWORKS, Case, contender_names, make_step, takes_part
from .costs import costs
from .engines import ENGINES
from .memory import peak_memory_in_child
from .options import BenchmarkOptions
from .record import open_record
from .roofline import measure_roofline
from .startup import measure_startup
from .tiles import facts_of_tiles


KINDS = {"model": ("inference", "training"), "op": ("inference", "forward", "training")}
CURVE_KINDS = ("inference", "training")
# Against tokens (50, 101, 197, 325, 577 and 785 of them) in batches of one size, and against batch at one image size.
CURVE_IMAGE_SIZES, CURVE_BATCH_SIZE = (112, 160, 224, 288, 384, 448, 512), 4
CURVE_BATCH_SIZES, CURVE_IMAGE_SIZE = (1, 2, 4, 8, 16), 224


def plan(options: BenchmarkOptions) -> list[Case]:
    """Everything that the options ask for, in order. Raises where an image size doesn't fit a network."""
    case = partial(Case, dtype=options.dtype, device=options.device)
    batch = {
        "inference": options.batch_size,
        "forward": options.train_batch_size,
        "training": options.train_batch_size,
    }
    parts = ("op", "curves", "model") if options.part == "all" else (options.part,)
    networks = {"model": options.models, "op": _different_refinements(options.models)}
    cases = []
    for part in parts:
        if part == "startup":
            continue  # which has no cases
        if part == "curves":
            network = options.models[0]
            points = [(size, CURVE_BATCH_SIZE) for size in CURVE_IMAGE_SIZES]
            points += [(CURVE_IMAGE_SIZE, batch_size) for batch_size in CURVE_BATCH_SIZES]
            # Where the curves meet there is one case.
            cases += [
                case(part, network, image_size, kind, batch_size)
                for image_size, batch_size in dict.fromkeys(points)
                for kind in CURVE_KINDS
            ]
        else:
            cases += [
                case(part, network, size, kind, batch[kind])
                for network in networks[part]
                for size in options.image_sizes
                for kind in KINDS[part]
            ]
    for each in cases:
        each.config()
    return cases


def _different_refinements(networks: list[str]) -> list[str]:
    """One network for each number of heads: the refinements of the others cost the same."""
    return list({NETWORKS[name]().num_attention_heads: name for name in reversed(networks)}.values())[::-1]


def run_benchmark(options: BenchmarkOptions, command: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """
    Measures what the record doesn't hold yet, saving it after each measurement.

    Args:
        options: what to measure.
        command: the command line to note down.
        say: gets a line for each measurement.

    Returns:
        the record.

    Raises:
        `ValueError`, `OSError`: options that don't fit each other or the record, or a folder that can't be written;
        before anything is measured.
    """
    cases = plan(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    path = Path(f"{options.stem}.json")
    facts = describe_machine(options.device) | {"threads": torch.get_num_threads()}
    facts |= {"dtype": options.dtype, "rounds": options.rounds}
    facts |= facts_of_tiles(options.dtype, str(options.device))
    record = open_record(path, facts, options.fresh)
    if command not in record["commands"]:
        record["commands"].append(command)
    if options.roofline and not record["roofline"]:
        say("the machine's own rates ...")
        record["roofline"] = measure_roofline(options.device, options.dtype)
    if options.part in ("all", "startup") and "startup" not in record:
        say("how long commands take to answer ...")
        record["startup"] = measure_startup(options.rounds)
    write_json(path, record)

    # Compiled code of earlier runs would hide what compiling takes.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for index, case in enumerate(cases, 1):
            for what in measure(case, options, record["results"]):
                write_json(path, record)
                say(f"[{index}/{len(cases)}] {case.name}: {what}")
    return record


def measure(case: Case, options: BenchmarkOptions, results: dict[str, Any]) -> Iterator[str]:
    """Adds to `results` what is missing of a case; yields after each measurement, in words, to have it saved."""
    names = contender_names(case.part, case.device, options.contenders)
    names = [name for name in names if takes_part(case, name)]
    result = results.setdefault(case.name, {**vars(case), "tokens": case.tokens, "rows": {}})
    rows = result["rows"]
    # One that wasn't timed before and isn't asked for now would leave the case incomplete, and out of the tables.
    for name in [name for name in rows if name not in names and not {"seconds", "error"} & rows[name].keys()]:
        del rows[name]
    for name in names:
        rows.setdefault(name, costs(case, name))
    # On CUDA it comes with the times.
    if case.device == "cpu" and case.part != "curves" and sys.platform == "linux":
        for name in names:
            if name not in ENGINES and not {"memory", "error"} & rows[name].keys():
                rows[name] |= peak_memory_in_child(case, name)
                yield f"{name}, memory: {_in_words(rows[name], 'memory')}"
    # A contender that failed or was killed in a process of its own isn't run in this one.
    able = [name for name in names if "error" not in rows[name]]
    if any("seconds" not in rows[name] for name in able):
        # Contenders that were timed before are timed again, because only times of one run are compared.
        before = [name for name in rows if name not in able and "seconds" in rows[name]]
        steps = {name: partial(make_step, case, name) for name in able + before}
        timed = time_in_turns(steps, options.rounds, case.device)
        for name, row in timed.items():
            rows[name] = row | {key: value for key, value in rows[name].items() if key != "seconds"}
        yield "times: " + ", ".join(f"{name} {_in_words(rows[name], 'seconds')}" for name in names)


def _in_words(row: dict[str, Any], key: str) -> str:
    if "error" in row:
        return row["error"]
    return f"{row[key] / 1e6:.0f} MB" if key == "memory" else f"{1e3 * sorted(row[key])[len(row[key]) // 2]:.3g} ms"
