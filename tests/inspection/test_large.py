"""What looking into the largest published network takes. Minutes on a CPU."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


GIGABYTES = 8  # a machine with 24 has other things to do
RUN = """
import resource, sys, torch
from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.commands.{command} import main
from refiner_hf.inspection import analysis

# Thousands of singular value decompositions, one after the other: they take the time and little memory.
analysis.effective_rank = lambda maps, centred=False: maps.mean((1, 2, 3))
if not {there}:
    torch.manual_seed(0)
    RefinerForImageClassification(RefinerConfig.large(image_size=448)).save_pretrained("large")
    RefinerImageProcessor(size={{"height": 448, "width": 448}}).save_pretrained("large")
main(["--model", "large", "--output_dir", "{command}", "--device", "cpu"] + sys.argv[1:])
print("peak of", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GB")
"""


@pytest.mark.slow
def test_large_at_448_in_little_memory(tmp_path):
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 450)).save(tmp_path / f"{i}.png")

    def peak(command: str, *words: str, there: bool) -> float:
        code = RUN.format(command=command, there=there)
        run = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:]
        print(command, run.stdout.splitlines()[-1])
        return float(run.stdout.split()[-2])

    assert peak("visualize", "--image", "0.png", "--patch", "14,14", "--html", there=False) < GIGABYTES
    assert (tmp_path / "visualize" / "maps.html").stat().st_size < 40 * 2**20
    assert peak("analyze", "--data", ".", "--batch_size", "4", there=True) < GIGABYTES
