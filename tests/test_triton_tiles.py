"""Kernels have the sizes that were measured on a GPU, or the defaults; and with every candidate the same results."""

import json
from functools import partial

import pytest
import torch

from refiner_hf import triton_tiles_refiner
from refiner_hf.benchmarking.on_paper import compile_launch, imagined_gpu, launches_of
from refiner_hf.triton_attention_refiner import make_map
from refiner_hf.triton_tiles_refiner import (
    CANDIDATES,
    DEFAULTS,
    Kernels,
    MapTiles,
    RefinementTiles,
    chosen_tiles,
    tiles_file,
    tiles_for,
    trying,
)

from .kernels import INTERPRETED, kernels_run, map_tiles, not_interpreted, refinement_tiles, run_interpreted
from .refinements import make_refinement
from .test_triton import call, check, check_masked, lengths
from .test_triton_attention import check as check_map
from .test_triton_attention import check_gradients, gradients


pytest.importorskip("triton")

CPU = torch.device("cpu")
KERNELS = Kernels("refinement", True, torch.bfloat16, 12, 36, 3)
TILES = RefinementTiles(64, 4, 16, 32)
REFINEMENTS, MAPS, MAPS_IN_TRAINING = CANDIDATES["refinement", True], CANDIDATES["map", False], CANDIDATES["map", True]


def check_refinement(tiles: RefinementTiles, masked: bool) -> None:
    with refinement_tiles(**tiles._asdict()):
        if masked:
            check_masked(lengths(2, 7), 3, 3, 3, training=True)
        else:
            check(5, 4, 3, 7)


@kernels_run
class TestSomeCandidates:
    @pytest.mark.parametrize("tiles, masked", [(REFINEMENTS[0], False), (TILES, True)])
    def test_refinement(self, tiles, masked):
        check_refinement(tiles, masked)

    @pytest.mark.parametrize("tiles", [MAPS[0], MAPS[-1]])
    def test_map(self, tiles):
        with map_tiles(**tiles._asdict()):
            check_map(3, 19, 8, 3)

    @pytest.mark.parametrize("tiles", [MAPS_IN_TRAINING[2], MAPS_IN_TRAINING[-1]])
    def test_map_in_training(self, tiles):
        with map_tiles(**tiles._asdict()):
            check_gradients(2, 35, 6)


@kernels_run
@pytest.mark.slow
class TestAllCandidates:
    @pytest.mark.parametrize("tiles", REFINEMENTS)
    @pytest.mark.parametrize("masked", [False, True])
    def test_refinement(self, tiles, masked):
        check_refinement(tiles, masked)

    @pytest.mark.parametrize("tiles", MAPS)
    def test_map(self, tiles):
        with map_tiles(**tiles._asdict()):
            check_map(12, 37, 8, 5)

    @pytest.mark.parametrize("tiles", MAPS_IN_TRAINING)
    def test_map_in_training(self, tiles):
        with map_tiles(**tiles._asdict()):
            check_gradients(3, 67, 6)


@pytest.mark.parametrize("part", ["TestSomeCandidates", pytest.param("TestAllCandidates", marks=pytest.mark.slow)])
@not_interpreted
def test_in_the_interpreter(part):
    run_interpreted(__file__, part)


def launches_with(tiles: RefinementTiles | MapTiles, training: bool) -> list:
    """Of the refinement's kernels, or of those that make a map, with these tiles."""
    with torch.device("meta"):
        refinement = make_refinement(12).train(training)
    with imagined_gpu():
        if isinstance(tiles, MapTiles):
            inputs = [torch.empty(2, 12, 50, size, dtype=torch.bfloat16) for size in (32, 32, 32, 50)]
            make = partial(make_map, scaling=0.3, kernel_size=None if training else 3)
            with map_tiles(**tiles._asdict()):
                return launches_of(lambda: gradients(make, inputs) if training else make(*inputs))
        refinement.to_empty(device="cpu")
        maps, mask = torch.empty(2, 12, 50, 50, dtype=torch.bfloat16), torch.ones(2, 1, 50, 50, dtype=torch.bool)
        with refinement_tiles(**tiles._asdict()):
            return launches_of(partial(call, refinement, maps, mask))


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel isn't launched")
@pytest.mark.parametrize("training", [False, True])
def test_kernels_are_launched_with_them(training):
    of_refinement = [each for each in launches_with(TILES, training) if "ROWS" in each.arguments]
    of_map = launches_with(MapTiles(64, 32, 4), training)
    assert len(of_refinement) == (6 if training else 1) and len(of_map) == (3 if training else 1)
    for launch in of_refinement:
        rows = launch.arguments["ROWS"]  # 50 in strips of one height
        assert (launch.arguments["BLOCK"], launch.options["num_warps"], rows) == (TILES.lanes, TILES.warps, 13)
        assert launch.arguments["CHANNELS"] == TILES.channels
    for launch in of_map:
        assert (launch.arguments["ROWS"], launch.arguments["COLUMNS"], launch.options["num_warps"]) == (64, 32, 4)


# How many rows a lane walks is nothing to the compiler.
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel can't be compiled")
@pytest.mark.parametrize(
    "tiles, training",
    [
        *((each, True) for each in REFINEMENTS if each.rows == 32),
        *((each, False) for each in MAPS),
        *((each, True) for each in MAPS_IN_TRAINING),
    ],
)
def test_the_compiler_takes_them(tiles, training):
    different = {launch.compiled_for: launch for launch in launches_with(tiles, training)}
    for launch in different.values():
        for capability in (80, 90):
            # What an H100 grants a program. A smaller GPU may refuse some, and then they aren't chosen.
            assert compile_launch(launch, capability).shared <= 227 * 1024


def test_candidates_have_the_defaults_among_them():
    for key, default in DEFAULTS.items():
        assert default in CANDIDATES[key] and len(set(CANDIDATES[key])) == len(CANDIDATES[key])


def test_kernels_of_different_code_have_different_names():
    several = [
        KERNELS, *(KERNELS._replace(**{name: value}) for name, value in dict(
            of="map", training=False, dtype=torch.float32, heads=4, width=12, kernel_size=5).items())
    ]  # fmt: skip
    assert len({kernels.name for kernels in several}) == len(several)
    assert KERNELS.name == "refinement, training, bfloat16, 12 heads expanded to 36, kernel 3"
    assert Kernels("map", False, torch.float16, 12, 32).name == "map, inference, float16, 12 heads of 32"


@pytest.fixture
def warnings(monkeypatch, tmp_path):
    """As on a GPU whose name is "here", with an empty cache. Gives what warnings say."""
    said = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_tiles_refiner, "gpu_name", lambda device: "here")
    monkeypatch.setattr(triton_tiles_refiner.logger, "warning_once", said.append)
    chosen_tiles.cache_clear()
    yield said
    chosen_tiles.cache_clear()


def write(content: object) -> None:
    tiles_file().parent.mkdir(exist_ok=True)
    tiles_file().write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_sizes_come_from_the_file(warnings, monkeypatch, tmp_path):
    write({"here": {KERNELS.name: TILES._asdict()}, "elsewhere": {}})
    assert tiles_file() == tmp_path / "refiner_hf" / "tiles.json"
    assert tiles_for(KERNELS, CPU) == TILES
    assert tiles_for(KERNELS._replace(training=False), CPU) == DEFAULTS["refinement", False]
    other = RefinementTiles(16, 1, 3, 16)
    with trying({("refinement", True): other}):
        with trying({("map", True): MapTiles(1, 2, 3)}):
            assert tiles_for(KERNELS, CPU) == other
        assert tiles_for(Kernels("map", True, torch.float16, 12, 32), CPU) == DEFAULTS["map", True]
    tiles_file().unlink()  # it is read once
    assert tiles_for(KERNELS, CPU) == TILES
    chosen_tiles.cache_clear()
    monkeypatch.setattr(triton_tiles_refiner, "gpu_name", lambda device: "elsewhere")
    assert tiles_for(KERNELS, CPU) == DEFAULTS["refinement", True] and warnings == []


@pytest.mark.parametrize("content", [b"{", b"\xff", [1], {"here": 3}])
def test_a_damaged_file(warnings, content):
    write(content)
    assert tiles_for(KERNELS, CPU) == tiles_for(KERNELS, CPU) == KERNELS.default
    assert len(warnings) == 1 and f"{tiles_file()} is damaged" in warnings[0] and "Delete it" in warnings[0]


@pytest.mark.parametrize(
    "sizes", [3, {"lanes": 32}, {**TILES._asdict(), "lanes": 48}, {**TILES._asdict(), "rows": "16"}]
)
def test_sizes_that_no_kernel_can_have(warnings, sizes):
    write({"here": {KERNELS.name: sizes}})
    assert tiles_for(KERNELS, CPU) == KERNELS.default
    assert len(warnings) == 1 and "no kernel can have" in warnings[0]


def test_a_file_that_cannot_be_read(warnings):
    tiles_file().mkdir(parents=True)
    assert tiles_for(KERNELS, CPU) == KERNELS.default
    assert len(warnings) == 1 and str(tiles_file()) in warnings[0]


def test_nothing_is_read_for_a_cpu(warnings, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(triton_tiles_refiner, "read_tiles", None)
    assert tiles_for(KERNELS, CPU) == KERNELS.default
