"""Times of contenders, measured in turns; where one fails, the reason."""

import gc
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


Step = Callable[[], object]

WARM_UP = 2  # steps, for each contender
OUT_OF_MEMORY = "out of memory"


def time_in_turns(makers: dict[str, Callable[[], Step]], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """
    Times one step of each contender in each round, so that other work of the machine slows all of them alike. Each
    round has another order: whoever comes after somebody with much memory is slower.

    Args:
        makers: by contender, what makes its step.
        rounds: how many times each is timed, after a warm-up.
        device: "cpu" or "cuda".

    Returns:
        by contender `seconds` (one for each round), `first_seconds` (of the very first step, compilation included)
        and on CUDA `memory`; or `error`, why there are none.
    """
    gc.collect()  # networks of the case before
    rows: dict[str, dict[str, Any]] = {name: {} for name in makers}
    steps: dict[str, Step] = {}
    for name, make_step in makers.items():
        with failure_noted_in(rows[name]):
            step = make_step()
            rows[name]["first_seconds"] = seconds_of(step, device)
            for _ in range(WARM_UP - 1):
                step()
            if device == "cuda":
                rows[name]["memory"] = cuda_peak(step)
            rows[name]["seconds"] = []
            steps[name] = step
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(steps)
        shuffle(order)
        for name in order:
            with failure_noted_in(rows[name]):
                rows[name]["seconds"].append(seconds_of(steps[name], device))
            if "error" in rows[name]:
                del steps[name]
    return rows


def seconds_of(step: Callable[[], object], device: str) -> float:
    """Seconds that one call takes, until its result is there."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def cuda_peak(step: Step) -> int:
    """Bytes that a step allocates at its peak, above what stays allocated between steps."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base


@contextmanager
def failure_noted_in(row: dict[str, Any]) -> Iterator[None]:
    """If anything fails within, `row` holds only the reason, and the benchmark continues."""
    try:
        yield
    except Exception as error:  # a contender may fail in any way: a compiler's, a kernel's, the allocator's
        row.clear()
        row["error"] = describe_failure(f"{type(error).__name__}: {error}")
    if "error" in row:
        gc.collect()  # the error held on to the step's tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def describe_failure(text: str) -> str:
    """The first line of an error, without folders of this machine."""
    if re.search("out of memory|allocate memory|MemoryError", text):
        return OUT_OF_MEMORY
    return re.sub(r"(?<![\w:/])/(?:[^\s/'\"]+/)*", "", text.strip().splitlines()[0])[:200]
