"""What a step costs on paper."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refiner_hf.benchmarking.on_paper import compile_launch, imagined_gpu, launches_of, operations_of

from ..kernels import INTERPRETED


pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def step() -> None:
    left, right = torch.empty(4, 8, device="cuda"), torch.empty(16, 8, device="cuda")
    product = left @ right.T
    product.view(2, 32).add_(1)
    product.to(torch.bfloat16).softmax(-1, dtype=torch.float32)


def test_operations():
    """Each reads and writes its tensors once; views and memory that is only taken cost nothing."""
    with imagined_gpu():
        found = operations_of(step)
    product, converted = 4 * 4 * 16, 2 * 4 * 16
    assert [(each.name, each.moved, each.flops) for each in found] == [
        ("mm", 4 * (4 * 8 + 16 * 8) + product, 2 * 4 * 8 * 16),
        ("add_", 2 * product, 0),
        ("_to_copy", product + converted, 0),
        ("_softmax", converted + product, 0),  # on CUDA it converts what it reads
    ]


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel can't be compiled")
def test_what_is_compiled():
    from refiner_hf.triton_kernels_refiner import combine_kernel

    with imagined_gpu():
        maps = torch.empty(2, 3, 50, 50, device="cuda", dtype=torch.bfloat16)
        coefficients = torch.empty(3, 3, device="cuda", dtype=torch.float64)
        call = combine_kernel[6, 3]
        (launch,) = launches_of(lambda: call(coefficients, maps, maps, maps, 2500, H=3, BLOCK=1024, num_warps=2))
    assert launch.name == "combine_kernel" and launch.programs == 18
    compiled = compile_launch(launch, 90)
    assert compiled.warps == 2 and compiled.spilled == 0 and compiled.registers <= 64 and compiled.loops == ()
    assert 50 < compiled.outside < 500


@pytest.mark.slow
def test_the_plan(tmp_path):
    output = tmp_path / "plan.md"
    words = ["--model", "tiny", "--image_size", "64", "--batch_size", "2", "--output", str(output)]
    subprocess.run([sys.executable, ROOT / "scripts" / "plan_gpu.py", *words], check=True)
    text = output.read_text()
    for made in ("torch", "kernels"):  # in inference and in training
        assert text.count(f"adds no map | 1 | by {made} |") == 2
    assert all(f"`{name}_kernel`" in text for name in ("packed_map", "map", "expansion_backward"))
