"""The compiled function refines as the modules do, and where it can't be had, nothing is lost."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from refiner_hf import attention_refiner, native_refiner
from refiner_hf.attention_refiner import eager_refine, pick_implementation
from refiner_hf.native_refiner import native_refine

from .conftest import assert_close
from .refinements import make_maps, make_refinement


def compiled() -> bool:
    return not isinstance(native_refiner._loaded(), str)


needs_compiler = pytest.mark.skipif(not compiled(), reason="there is no C++ compiler")


def evaluate(refinement: nn.Module, maps: torch.Tensor, scale: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """By the function, and module by module in float64."""
    refinement.eval()
    with torch.no_grad():
        ours = native_refine(refinement, maps, scale)
        exact = eager_refine(make_double(refinement), maps.double(), scale)
    assert ours.dtype == maps.dtype and ours.shape == exact.shape
    return ours, exact


def make_double(refinement: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(refinement).double()


@needs_compiler
@pytest.mark.parametrize("tokens", [2, 5, 16, 17, 26, 33, 65])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_equals_eager(tokens, kernel, ratio, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, exact = evaluate(make_refinement(ratio=ratio, kernel=kernel), make_maps(tokens=tokens))
    finally:
        torch.set_num_threads(before)
    assert_close(ours.double(), exact, 1e-5)


@needs_compiler
@pytest.mark.parametrize("parallel", ["torch's threads", "own threads"])
@pytest.mark.parametrize(
    "heads, ratio, images, tokens", [(12, 3, 2, 197), (16, 6, 1, 150), (3, 1, 5, 130), (1, 3, 3, 140)]
)
def test_large_maps_by_several_threads(heads, ratio, images, tokens, parallel, monkeypatch):
    if parallel == "own threads":
        monkeypatch.setattr(native_refiner, "_parallel", lambda: None)
    elif native_refiner._parallel() is None:
        pytest.skip("torch has another OpenMP")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    ours, exact = evaluate(make_refinement(heads, ratio), make_maps(images, heads, tokens))
    assert_close(ours.double(), exact, 1e-5)


@needs_compiler
def test_bfloat16_maps_and_weights():
    refinement, maps = make_refinement(), make_maps(tokens=19, dtype=torch.bfloat16)
    ours, exact = evaluate(refinement, maps)
    assert_close(ours.double(), exact, 0.008)  # the rounding of the result
    ours, exact = evaluate(refinement.to(torch.bfloat16), maps)
    assert_close(ours.double(), exact, 0.008)


@needs_compiler
def test_maps_that_are_not_contiguous():
    ours, exact = evaluate(make_refinement(), make_maps(tokens=11).transpose(2, 3))
    assert_close(ours.double(), exact, 1e-5)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_seen(value, dtype):
    refinement, maps = make_refinement().eval(), make_maps(tokens=9, dtype=dtype)
    maps[0, 1, 4, 4] = value
    with torch.no_grad():
        ours, eager = native_refine(refinement, maps), eager_refine(refinement, maps.float())
    assert not ours[0].isfinite().all() and ours[1:].isfinite().all()
    assert torch.equal(ours.isnan(), eager.isnan())


@needs_compiler
def test_a_changed_weight_is_seen():
    refinement, maps = make_refinement().eval(), make_maps()
    with torch.no_grad():
        before = native_refine(refinement, maps)
        refinement.output_norm.weight.data.mul_(2)
        refinement.reduction.weight.data.mul_(3)
        assert_close(native_refine(refinement, maps), eager_refine(refinement, maps), 1e-5)
    assert not torch.allclose(before, native_refine(refinement, maps))


@needs_compiler
def test_it_leaves_the_smallest_numbers_alone():
    """Some compilers' fast arithmetic makes a whole process take them for zero."""
    native_refine(make_refinement().eval().requires_grad_(False), make_maps())
    smallest = torch.tensor(1e-40)
    assert (smallest * 1).item() > 0 and ctypes.c_float(1e-40).value * 0.5 > 0


class TestChoice:
    def picked(self, refinement, maps, asked="auto", masked=False):
        refinement.config.refine_implementation = asked
        return pick_implementation(refinement, maps, masked)

    @needs_compiler
    def test_auto_takes_it_in_evaluation(self):
        with torch.no_grad():
            assert self.picked(make_refinement().eval(), make_maps()) == "native"
            assert self.picked(make_refinement().eval(), make_maps(dtype=torch.bfloat16)) == "native"

    def test_auto_takes_another_elsewhere(self):
        refinement, maps = make_refinement().eval(), make_maps()
        assert self.picked(make_refinement(), make_maps(tokens=400)) == "blocked"
        with torch.no_grad():
            assert self.picked(refinement, maps, masked=True) == "blocked"
            assert self.picked(refinement.double(), maps.double()) == "blocked"
            assert self.picked(make_refinement().eval(), maps.half()) == "blocked"
            assert self.picked(make_refinement(refinement="convolution").eval(), maps) == "eager"

    def test_asked_for_where_it_cannot(self, monkeypatch):
        said = []
        monkeypatch.setattr("refiner_hf.attention_refiner.logger.warning_once", said.append)
        assert self.picked(make_refinement(), make_maps(), "native") == "eager"
        assert said == [
            "Attention maps are refined by 'eager' and not by 'native': it is for evaluation without gradients."
        ]

    def test_without_a_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native_refiner.shutil, "which", lambda name: None)
        native_refiner._loaded.cache_clear()
        try:
            with torch.no_grad():
                assert self.picked(make_refinement().eval(), make_maps()) == "blocked"
            reason = attention_refiner.REFINE_IMPLEMENTATIONS["native"].why_not(
                make_refinement().eval().requires_grad_(False), make_maps()
            )
            assert reason == "its C++ function can't be had: there is no C++ compiler"
        finally:
            native_refiner._loaded.cache_clear()


@needs_compiler
class TestCompiling:
    """In processes of their own, with caches of their own."""

    CALL = (
        "from refiner_hf import native_refiner\n"
        "loaded = native_refiner._loaded()\n"
        "print(loaded if isinstance(loaded, str) else 'compiled', end='')"
    )

    def run(self, cache, **environment) -> str:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
        run = subprocess.run([sys.executable, "-c", self.CALL], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def test_once(self, tmp_path):
        assert self.run(tmp_path) == "compiled"
        (library,) = (tmp_path / "refiner_hf").iterdir()  # and nothing else
        made = library.stat().st_mtime_ns
        assert self.run(tmp_path) == "compiled" and library.stat().st_mtime_ns == made

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        assert self.run(tmp_path / "file", TMPDIR=str(tmp_path)) == "compiled"

    def test_a_compiler_that_fails(self, tmp_path):
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\necho 'no such processor' >&2\nexit 1\n")
        compiler.chmod(0o755)
        said = self.run(tmp_path / "cache", CXX=str(compiler))
        assert said == f"its C++ function can't be had: {compiler} says: no such processor"
        assert list((tmp_path / "cache" / "refiner_hf").iterdir()) == []
