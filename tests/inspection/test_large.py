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

# Of all maps it would take hours. So only those are decomposed that come when most memory is in use: of the last
# layer, when the maps of all others are kept for comparing. That takes a minute.
decompose, batches = torch.linalg.svdvals, []
def of_the_last_layer(maps):
    batches.append(maps.shape)
    return decompose(maps) if len(batches) == {batches} else maps.diagonal(dim1=-2, dim2=-1)
torch.linalg.svdvals = of_the_last_layer

if not {there}:
    torch.manual_seed(0)
    RefinerForImageClassification(RefinerConfig.large(image_size=448)).save_pretrained("large")
    RefinerImageProcessor(size={{"height": 448, "width": 448}}).save_pretrained("large")
main(["--model", "large", "--output_dir", "{command}", "--device", "cpu"] + sys.argv[1:])
assert batches == {batches} * [(1, 16, 785, 785)], (len(batches), batches[-1])
print("peak of", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GB")
"""


@pytest.mark.slow
def test_large_at_448_in_little_memory(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 450)).save(tmp_path / "pictures" / f"{i}.png")

    def peak(command: str, *words: str, there: bool, batches: int) -> float:
        code = RUN.format(command=command, there=there, batches=batches)
        run = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:]
        print(command, run.stdout.splitlines()[-1])
        return float(run.stdout.split()[-2])

    words = ["--image", "pictures/0.png", "--patch", "14,14", "--html"]
    assert peak("visualize", *words, there=False, batches=0) < GIGABYTES
    assert (tmp_path / "visualize" / "maps.html").stat().st_size < 40 * 2**20
    # Each layer's map of each image, as it is and centred.
    assert peak("analyze", "--data", "pictures", "--batch_size", "4", there=True, batches=2 * 32 * 4) < GIGABYTES
