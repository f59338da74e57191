"""The script that says what inference on a CPU spends its time on."""

import re
import subprocess
import sys

import pytest

from .test_on_paper import ROOT


@pytest.mark.slow
def test_the_profile(tmp_path):
    pytest.importorskip("openvino")
    output = tmp_path / "profile.md"
    words = ["--model", "tiny", "--image_size", "64", "--batch_size", "2", "--rounds", "2", "--output", str(output)]
    subprocess.run([sys.executable, ROOT / "scripts" / "profile_cpu.py", *words], check=True)
    parts, products = output.read_text().split("## The product of a linear layer")
    rows = [line.split("|")[3:8] for line in parts.splitlines() if line.startswith("| ") and "ms |" not in line][1:]
    *each, whole = [[float(re.search(r"[\d.]+", cell)[0]) for cell in row] for row in rows]
    assert len(each) == 4 and all(time > 0 for row in each for time in row)
    for column, total in zip(zip(*each), whole):
        assert sum(column) == pytest.approx(total, abs=0.25)
    # 17 tokens of width 48, 16 patches of 8 x 8 x 128
    for shape in ("(34, 48) x (48, 48)", "(34, 48) x (48, 144)", "(34, 144) x (144, 48)", "(32, 8192) x (8192, 48)"):
        assert shape in products
