"""
Peak memory on a CPU: each contender in a fresh process, which is this file.

Reported is the peak of resident memory during a step, above what is resident between steps: weights, optimizer states,
code and whatever an implementation keeps. Gradients, which are freed at the end of each step, count.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..utils.measure import OUT_OF_MEMORY, WARM_UP, describe_failure, failure_noted_in, seconds_of
from .contenders import Case, make_step


# Memory that is freed goes back to the system at once, so that what is resident is what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def peak_memory_in_child(case: Case, contender: str) -> dict[str, Any]:
    """`memory` in bytes and `first_seconds`, the time of the first step; or `error`, why there are none."""
    task = json.dumps({"case": asdict(case), "contender": contender, "threads": torch.get_num_threads()})
    child = subprocess.run(
        [sys.executable, "-m", __name__, task], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    if child.returncode == -signal.SIGKILL:
        return {"error": OUT_OF_MEMORY}  # the system's way to say so
    if child.returncode < 0:
        return {"error": f"killed by {signal.Signals(-child.returncode).name}"}
    if child.returncode:
        return {"error": describe_failure((child.stderr.strip() or "failed").splitlines()[-1])}
    return json.loads(child.stdout.splitlines()[-1])


def main(task: str) -> None:
    """The child: measures and prints the row."""
    task = json.loads(task)
    torch.set_num_threads(task["threads"])
    row = {}
    with failure_noted_in(row):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this is the process to be killed
        step = make_step(Case(**task["case"]), task["contender"])
        row["first_seconds"] = seconds_of(step, "cpu")
        for _ in range(WARM_UP - 1):
            step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        base = _resident("VmRSS")
        step()
        row["memory"] = _resident("VmHWM") - base
    print(json.dumps(row))


def _resident(field: str) -> int:
    """Bytes of this process that are in memory, now (VmRSS) or at the peak (VmHWM)."""
    # Not getrusage: its maximum starts at that of the process that started this one.
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main(sys.argv[1])
