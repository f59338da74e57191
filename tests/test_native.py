"""The compiled function refines as the modules do, and where it can't be had, nothing is lost."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from refiner_hf import attention_refiner, native_library_refiner
from refiner_hf.attention_refiner import eager_refine, pick_implementation
from refiner_hf.native_refiner import attends, native_attend, native_refine, native_weigh

from .conftest import assert_close
from .refinements import make_maps, make_refinement


def compiled() -> bool:
    return not isinstance(native_library_refiner._loaded(), str)


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
@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    "heads, ratio, images, tokens", [(12, 3, 2, 197), (16, 6, 1, 150), (3, 1, 5, 130), (1, 3, 3, 140)]
)
def test_large_maps_by_several_threads(heads, ratio, images, tokens):
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


def make_heads(images: int, heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> list:
    """Queries, keys and values (images, heads, tokens, width), as views of projections; scores of a few units."""
    torch.manual_seed(0)
    flat = (torch.randn(images, tokens, heads * width).to(dtype) for _ in range(3))
    return [each.unflatten(2, (heads, width)).transpose(1, 2) for each in flat]


def attend_exactly(query, key, value, previous, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's operations, in float64."""
    query, key, value = (each.double() for each in (query, key, value))
    attention_map = (query @ key.transpose(2, 3) * scaling).softmax(-1)
    if previous is not None:
        attention_map = attention_map + scaling * previous.double()
    return attention_map, (attention_map @ value).transpose(1, 2).flatten(2)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@needs_compiler
class TestAttention:
    @pytest.mark.parametrize("accumulates", [False, True])
    @pytest.mark.parametrize(
        "images, heads, tokens, width",
        [
            (1, 1, 1, 1),
            (2, 3, 2, 5),
            (3, 2, 16, 16),
            (2, 2, 17, 35),
            (1, 3, 61, 64),
            (1, 12, 197, 32),
            (2, 1, 230, 100),
        ],
    )
    def test_equals_torchs_operations(self, images, heads, tokens, width, accumulates, threads):
        tensors = make_heads(images, heads, tokens, width)
        previous = make_maps(images, heads, tokens) if accumulates else None
        assert attends(*tensors, previous)
        for ours, exact in zip(
            native_attend(*tensors, previous, width**-0.5), attend_exactly(*tensors, previous, width**-0.5)
        ):
            assert ours.is_contiguous() and ours.shape == exact.shape
            assert_close(ours.double(), exact, 2e-6)

    def test_scores_far_apart(self):
        query, key, value = make_heads(1, 2, 40, 8)
        ours, exact = native_attend(query, key, value, None, 40.0), attend_exactly(query, key, value, None, 40.0)
        assert exact[0].min() < 1e-30
        assert_close(ours[0].double(), exact[0], 2e-5)  # scores of hundreds have five digits behind them in float32
        assert_close(ours[0].sum(-1), torch.ones(1, 2, 40), 1e-6)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_no_number_is_seen(self, value):
        query, key, values = make_heads(1, 2, 20, 8)
        query[0, 1, 3, 2] = value
        ours, exact = native_attend(query, key, values, None, 0.3), attend_exactly(query, key, values, None, 0.3)
        assert exact[0].isnan().any()
        assert all(torch.equal(each.isnan(), other.isnan()) for each, other in zip(ours, exact))

    def test_bfloat16(self):
        tensors, previous = make_heads(2, 3, 33, 35, torch.bfloat16), make_maps(2, 3, 33, torch.bfloat16)
        for ours, exact in zip(native_attend(*tensors, previous, 0.2), attend_exactly(*tensors, previous, 0.2)):
            assert ours.dtype == torch.bfloat16
            assert_close(ours.double(), exact, 0.004)  # the rounding of the result

    def test_where_torchs_operations_are_needed(self):
        tensors = make_heads(1, 2, 5, 4)
        assert not attends(*[each.requires_grad_() for each in tensors], None)
        with torch.no_grad():
            assert attends(*tensors, None)
            assert not attends(*[each.double() for each in tensors], None)
            assert not attends(*[each[:, :, :0] for each in tensors], None)
            assert not attends(*tensors, make_maps(1, 2, 5, torch.bfloat16))


@needs_compiler
class TestWeighing:
    @pytest.mark.parametrize("heads, width", [(4, 32), (3, 35)])
    @pytest.mark.parametrize("kernel, ratio", [(3, 3), (5, 1)])
    @pytest.mark.parametrize("tokens", [2, 11, 12, 13, 26, 150])
    def test_equals_the_product_with_the_refined_map(self, tokens, kernel, ratio, heads, width, threads):
        refinement = make_refinement(heads, ratio, kernel).eval().requires_grad_(False)
        maps, (value, *_) = make_maps(3, heads, tokens), make_heads(3, heads, tokens, width)
        ours = native_weigh(refinement, maps, value, 0.7)
        refined = eager_refine(make_double(refinement), maps.double(), 0.7)
        assert_close(ours.double(), (refined @ value.double()).transpose(1, 2).flatten(2), 1e-5)

    def test_bfloat16(self):
        refinement = make_refinement().eval().requires_grad_(False)
        maps, (value, *_) = make_maps(dtype=torch.bfloat16), make_heads(3, 4, 9, 8, torch.bfloat16)
        refined = eager_refine(make_double(refinement), maps.double())
        ours = native_weigh(refinement, maps, value, 1.0)
        assert_close(ours.double(), (refined @ value.double()).transpose(1, 2).flatten(2), 0.008)

    def test_a_hook_sees_the_map(self):
        """Neither a hook on the refinement nor one on a module of it is passed over."""
        refinement, seen = make_refinement().eval().requires_grad_(False), []
        refinement.config.refine_implementation = "auto"
        maps, (value, *_) = make_maps(), make_heads(3, 4, 9, 8)
        output, refined = refinement.weigh(maps, value, map_needed=False)
        assert refined is None
        refinement.register_forward_hook(lambda module, args, output: seen.append(output))
        other, refined = refinement.weigh(maps, value, map_needed=False)
        assert refined is seen[0]
        assert_close(other, output, 1e-5)


@needs_compiler
@pytest.mark.parametrize("types", [["plain", "shared_refined"] * 2, ["refined"] * 3, ["plain"] * 3])
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_model_asked_for_its_maps_gives_the_same(tiny_model, types, accumulates):
    model = tiny_model(attention_types=types, num_hidden_layers=len(types), accumulate_attention=accumulates).eval()
    theirs, pixels = tiny_model(), torch.randn(3, 3, 16, 16)
    theirs = type(model)(model.config).double().eval()
    theirs.load_state_dict({name: each.double() for name, each in model.state_dict().items()})
    with torch.no_grad():
        ours, with_maps = model(pixels), model(pixels, output_attentions=True)
        model.set_refine_implementation("eager")
        exact = theirs(pixels.double(), output_attentions=True)
    assert_close(ours.logits.double(), exact.logits, 1e-5)
    assert_close(with_maps.logits.double(), exact.logits, 1e-5)
    for ours, map in zip(with_maps.attentions, exact.attentions):
        assert_close(ours.double(), map, 1e-5)


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
        monkeypatch.setattr(native_library_refiner.shutil, "which", lambda name: None)
        native_library_refiner._loaded.cache_clear()
        try:
            with torch.no_grad():
                assert self.picked(make_refinement().eval(), make_maps()) == "blocked"
            reason = attention_refiner.REFINE_IMPLEMENTATIONS["native"].why_not(
                make_refinement().eval().requires_grad_(False), make_maps()
            )
            assert reason == "its C++ function can't be had: there is no C++ compiler"
        finally:
            native_library_refiner._loaded.cache_clear()


@needs_compiler
class TestCompiling:
    """In processes of their own, with caches of their own."""

    CALL = (
        "from refiner_hf.native_library_refiner import _loaded\n"
        "loaded = _loaded()\n"
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


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its processors are meant")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_for_older_processors(processor, tmp_path):
    """All of the above, and the other functions, with narrower vectors or with none."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -march={processor}\n')
    compiler.chmod(0o755)
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("native", "prepacking", "stem")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(compiler)}
    child = subprocess.run(
        [*command, "-k", "not TestCompiling and not processors"], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-3000:]
    assert "passed" in child.stdout and "failed" not in child.stdout


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its processors are meant")
def test_compiles_for_newer_processors(tmp_path):
    for number, source in enumerate(native_library_refiner._SOURCES):
        if source.suffix == ".cpp":
            flags = [*native_library_refiner._FLAGS, "-march=x86-64-v4"]
            subprocess.run(["c++", *flags, "-o", str(tmp_path / f"{number}.so"), str(source)], check=True)
