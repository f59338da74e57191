"""The script that says what a call of a small network costs on a CPU."""

import subprocess
import sys

import pytest

from .test_on_paper import ROOT


@pytest.mark.slow
def test_the_costs_of_a_call(tmp_path):
    for engine in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(engine)
    output = tmp_path / "call.md"
    words = ["--rounds", "3", "--batch_sizes", "1", "5", "--output", str(output)]
    subprocess.run([sys.executable, ROOT / "scripts" / "profile_call.py", *words], check=True)
    calls, parts = output.read_text().split("What the time of one image goes into")
    rows = {row[0]: row[1:] for row in map(_cells, calls.splitlines()) if len(row) == 6}
    assert list(rows)[2:] == ["auto", "compiled", "compiled, without checks", "onnxruntime", "OpenVINO"]
    assert int(rows["auto"][0]) > 50 and int(rows["compiled"][0]) == 0  # operations that Python starts
    for _, call, each, one, five in list(rows.values())[2:]:
        assert float(call) + float(each) == pytest.approx(float(one), abs=0.02)
        assert float(call) + 5 * float(each) == pytest.approx(float(five), abs=0.02)
    *shares, (_, whole) = [_cells(line) for line in parts.splitlines() if line.startswith("| ")][2:]
    assert len(shares) == 5 and all(float(share) > 0 for _, share in shares)
    assert sum(float(share) for _, share in shares) == pytest.approx(float(whole.strip("*")), abs=0.05)
    assert whole.strip("*") == rows["compiled"][3]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]
