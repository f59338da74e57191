"""What the numbers were measured on: device, versions, code, and the machine's own best rates."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..hub.card import device_name, versions


PACKAGE = Path(__file__).parents[1]
MATMUL_SIDE = 2048
COPY_BYTES = 2**28
REPETITIONS = 10


def describe_machine(device: str) -> dict[str, str | None]:
    """Device, versions, and the commit of this package where it is a checkout."""
    return {"device": device_name(device), "versions": versions(), "commit": commit()}


def commit() -> str | None:
    """The last commit that changed this package, and whether files of it were changed since; outside git `None`."""
    # Asked about the package's own files: an installed one may lie within somebody else's repository.
    last = _git("log", "-1", "--format=%h", "--", ".")
    if not last:
        return None
    return f"{last}, modified" if _git("status", "--porcelain", "--", ".") else last


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


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


def measure_roofline(device: str, dtype: str) -> dict[str, float]:
    """
    What this machine can do at best: operations a second in a matrix product of 2048 x 2048 numbers of type `dtype`,
    and bytes a second, read and written, in a copy of 256 MiB. The best of ten, since what disturbs only slows.
    """
    left, right = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=device).to(getattr(torch, dtype))
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.ones_like(source)

    def best(step: Callable[[], object]) -> float:
        step()
        return min(seconds_of(step, device) for _ in range(REPETITIONS))

    return {
        "flops_per_second": 2 * MATMUL_SIDE**3 / best(lambda: left @ right),
        "bytes_per_second": 2 * COPY_BYTES / best(lambda: target.copy_(source)),
    }
