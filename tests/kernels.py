"""
Where tests of Triton kernels run: on a GPU, or without one in triton's interpreter. That must be switched on before
triton is imported, so there they run in a process of their own.
"""

import os
import subprocess
import sys
from contextlib import AbstractContextManager

import pytest
import torch

from refiner_hf.triton_tiles_refiner import DEFAULTS, trying


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

kernels_run = (
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
)
not_interpreted = pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run here")


@pytest.fixture(autouse=True)
def poison():
    """Memory that a kernel forgets to write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def refinement_tiles(**sizes: int) -> AbstractContextManager[None]:
    """Within it, the refinement's kernels have these sizes, and the others by default."""
    return trying({key: tiles._replace(**sizes) for key, tiles in DEFAULTS.items() if key[0] == "refinement"})


def map_tiles(**sizes: int) -> AbstractContextManager[None]:
    """The same for the kernels that make a map."""
    return trying({key: tiles._replace(**sizes) for key, tiles in DEFAULTS.items() if key[0] == "map"})


def run_interpreted(file: str, part: str) -> None:
    """All tests of a class in a test file, interpreted."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{file}::{part}"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-3000:]
    assert "passed" in child.stdout and "skipped" not in child.stdout and "failed" not in child.stdout
