"""What is fastest is found and kept. Times are made up, or those of Triton's interpreter, which mean nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from refiner_hf import triton_tiles_refiner
from refiner_hf.benchmarking import tiles
from refiner_hf.benchmarking.options import BenchmarkOptions
from refiner_hf.benchmarking.report import write_report
from refiner_hf.benchmarking.run import run_benchmark
from refiner_hf.commands.benchmark import main
from refiner_hf.triton_tiles_refiner import (
    CANDIDATES,
    Kernels,
    MapTiles,
    RefinementTiles,
    chosen_tiles,
    in_words,
    tiles_file,
    tiles_for,
)
from refiner_hf.utils import measure
from refiner_hf.utils.locking import locked

from ..kernels import INTERPRETED, kernels_run, not_interpreted, run_interpreted


pytest.importorskip("triton")

CPU = torch.device("cpu")
KERNELS = Kernels("refinement", False, torch.bfloat16, 12, 36, 3)
NAMES = [
    "refinement, inference, bfloat16, 12 heads expanded to 36, kernel 3",
    "refinement, training, bfloat16, 12 heads expanded to 36, kernel 3",
    "map, inference, bfloat16, 12 heads of 32",
    "map, training, bfloat16, 12 heads of 32",
]
# By tiles, how long a step takes. The first would be the fastest, but the GPU refuses it.
REFUSED = RefinementTiles(64, 4, 64, 32)
SECONDS = {
    REFUSED: 0.001,
    RefinementTiles(16, 1, 64, 16): 0.002,
    MapTiles(32, 16, 8): 0.003,
    MapTiles(64, 64, 4): 0.004,
}


def options(part: str = "tiles", **changes) -> BenchmarkOptions:
    """As the command has them on a GPU, but for a CPU."""
    given = dict(models=["S", "M"], image_sizes=[224], rounds=3, dtype="bfloat16", device="cpu", part="op")
    made = BenchmarkOptions(**given | changes)
    made.part = part
    return made


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As on a GPU whose name is "here", with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (triton_tiles_refiner, tiles):
        monkeypatch.setattr(module, "gpu_name", lambda device: "here")
    chosen_tiles.cache_clear()
    yield
    chosen_tiles.cache_clear()


@pytest.fixture
def steps(gpu, monkeypatch):
    """Steps that do nothing, and take as long as `SECONDS` says. Gives the cases that they were made for."""
    from triton.runtime.errors import OutOfResources

    cases = []

    def make(case, contender="triton", masked=False):
        cases.append(case)

        def step():
            if masked and REFUSED in triton_tiles_refiner._tried.values():
                raise OutOfResources(300_000, 232_448, "shared memory")

        return step

    def seconds_of(step, device):
        step()
        return SECONDS.get(step.args[0], 0.01)

    monkeypatch.setattr(tiles, "make_refinement_step", make)
    monkeypatch.setattr(tiles, "_map_step", make)
    monkeypatch.setattr(tiles, "_makes_map", lambda case: True)
    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    return cases


def tune(**changes) -> str:
    said: list[str] = []
    tiles.tune(options(**changes), said.append)
    return "\n".join(said)


def test_the_fastest_is_taken_from_now_on(steps):
    tiles_file().parent.mkdir()
    others = {"elsewhere": {NAMES[0]: {"lanes": 1}}, "here": {"map, something": 7}}
    tiles_file().write_text(json.dumps(others))
    assert tiles_for(KERNELS, CPU) == KERNELS.default
    said = tune(models=["S"], batch_size=5, train_batch_size=4)
    found = [RefinementTiles(16, 1, 64, 16)] * 2 + [MapTiles(32, 16, 8), MapTiles(64, 64, 4)]
    sizes = {name: each._asdict() for name, each in zip(NAMES, found, strict=True)}
    assert json.loads(tiles_file().read_text()) == {**others, "here": {**others["here"], **sizes}}
    assert tiles_for(KERNELS, CPU) == found[0]
    assert {(case.kind, case.batch_size) for case in steps} == {("inference", 5), ("training", 4)}

    # In the tables the fastest comes first, and what was refused last.
    tables = [[line for line in part.splitlines() if line.startswith("| ")] for part in said.split("[")[1:]]
    for table, each, name in zip(tables, found, NAMES, strict=True):
        assert name in said and in_words(each) in table[2] and f"| {1e3 * SECONDS[each]:.3f} |" in table[2]
        assert sum("(default)" in line for line in table) == 1
    for table in tables[:2]:
        assert len(table) == 2 + len(CANDIDATES["refinement", True])
        assert in_words(REFUSED) in table[-1] and "OutOfResources: out of resource: shared memory" in table[-1]
    assert str(tiles_file()) in said


def test_networks_with_the_same_kernels_are_timed_once(steps):
    """M has as many heads as S, of other width. Where there are several image sizes, their times are added."""
    said = tune(image_sizes=[224, 384])
    names = json.loads(tiles_file().read_text())["here"]
    assert set(names) == {*NAMES, *(f"map, {kind}, bfloat16, 12 heads of 35" for kind in ("inference", "training"))}
    assert "| tiles | 224 pixels, ms | 384 pixels, ms |" in said and {case.image_size for case in steps} == {224, 384}


def test_maps_that_kernels_do_not_make_are_left_out(monkeypatch):
    """In float32 M's heads are too wide for them."""
    monkeypatch.setattr("refiner_hf.triton_attention_refiner.why_no_kernels", lambda tensor: None)
    assert {kernels.width for kernels in tiles._cases(options(dtype="float32")) if kernels.of == "map"} == {32}
    assert {kernels.width for kernels in tiles._cases(options()) if kernels.of == "map"} == {32, 35}


def test_another_process_takes_them(steps):
    tune(models=["S"])
    code = f"""
import torch
from refiner_hf import triton_tiles_refiner as tiles
tiles.gpu_name = lambda device: "here"
kernels = tiles.Kernels("refinement", False, torch.bfloat16, 12, 36, 3)
assert kernels.name == {NAMES[0]!r}
print(tiles.tiles_for(kernels, torch.device("cpu")))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert child.stdout.strip() == str(RefinementTiles(16, 1, 64, 16)), child.stderr


def few(monkeypatch, number: int) -> dict:
    """Only these are candidates."""
    candidates = {key: each[:number] for key, each in CANDIDATES.items()}
    monkeypatch.setattr(triton_tiles_refiner, "CANDIDATES", candidates)
    return candidates


def test_where_the_gpu_takes_none(steps, monkeypatch):
    few(monkeypatch, 2)

    def refused(case, *others):
        def step():
            raise ValueError(f"not in {case.kind}")

        return step

    monkeypatch.setattr(tiles, "make_refinement_step", refused)
    said = tune(models=["S"])
    assert said.count("None of them runs here") == 2 and "not in training" in said
    assert list(json.loads(tiles_file().read_text())["here"]) == NAMES[2:]
    tiles_file().unlink()
    monkeypatch.setattr(tiles, "_map_step", refused)
    with pytest.raises(RuntimeError, match="None of the tiles runs on this GPU"):
        tune(models=["S"])
    assert not tiles_file().exists()


def test_a_damaged_file_is_named_before_anything_is_timed(steps):
    tiles_file().parent.mkdir()
    tiles_file().write_text("{")
    with pytest.raises(ValueError, match="is damaged.*Delete it"):
        tune()
    assert not steps and tiles_file().read_text() == "{"


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_timed(steps, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        tune()
    assert not steps


def test_sizes_are_said_if_they_cannot_be_written_after_all(steps, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiles, "write_json", full)
    with pytest.raises(OSError, match="can't be written.*No space left") as error:
        tune()
    found = json.loads(str(error.value).split("it can: ")[1])
    assert found == {"here": {NAMES[0]: RefinementTiles(16, 1, 64, 16)._asdict()}}


def test_two_at_a_time(steps):
    tiles_file().parent.mkdir()
    with locked(tiles_file().with_suffix(".lock"), "it"), pytest.raises(BlockingIOError, match="Another process"):
        tune()
    assert not steps


def test_a_benchmark_says_which_tiles_it_had(steps, tmp_path):
    tried = options("op", models=[], output_dir=str(tmp_path))  # nothing to measure
    record = run_benchmark(tried, "a command")
    assert record["facts"]["tiles of the kernels"] == "the defaults"
    tune(models=["S"])
    with pytest.raises(ValueError, match="tiles of the kernels was 'the defaults' and is now 'refinement, inference"):
        run_benchmark(tried, "a command")
    tried.fresh = True
    text = write_report(run_benchmark(tried, "a command"), tmp_path / "cpu")
    assert f"| tiles of the kernels | {NAMES[0]}: lanes 16, warps 1, rows 64, channels 16; {NAMES[1]}: " in text


@not_interpreted
def test_on_a_cpu_there_are_no_tiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tiles.facts_of_tiles("float32", "cpu") == {}
    for words, message in (
        ([], "NVIDIA GPU of compute capability 8.0 or newer, but there is none here. Nothing was changed"),
        (["--device", "cuda"], "no CUDA device"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["--part", "tiles", "--output_dir", str(tmp_path / "out"), *words])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "refiner benchmark --part tiles" in capsys.readouterr().out


@kernels_run
class TestRealSteps:
    def test_tuning(self, gpu, monkeypatch):
        """Every kind of kernels runs, with the tiles that are tried and then with the fastest."""
        candidates = few(monkeypatch, 1)
        device = "cpu" if INTERPRETED else "cuda"
        said = tune(
            models=["tiny"],
            image_sizes=[16],
            batch_size=1,
            train_batch_size=1,
            rounds=1,
            dtype="float32",
            device=device,
        )
        assert "Error" not in said and said.count("| lanes 16, warps 1") == 2
        found = json.loads(tiles_file().read_text())["here"]
        assert len(found) == 4
        for name, sizes in found.items():
            of, kind, *_ = name.split(", ")
            assert sizes in [each._asdict() for each in candidates[of, kind == "training"]]


@not_interpreted
def test_in_the_interpreter():
    run_interpreted(__file__, "TestRealSteps")
