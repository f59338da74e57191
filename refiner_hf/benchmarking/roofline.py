"""The highest rates that the machine reaches."""

from collections.abc import Callable

import torch

from ..utils.measure import seconds_of


MATMUL_SIDE = 2048
COPY_BYTES = 2**28
REPETITIONS = 10


def measure_roofline(device: str, dtype: str) -> dict[str, float]:
    """
    What this machine can do at best: operations a second in a matrix product of 2048 x 2048 numbers of type `dtype`,
    and bytes a second, read and written, in a copy of 256 MiB. The best of ten: other work can only make them lower.
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
