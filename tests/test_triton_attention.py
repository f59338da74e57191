"""The kernel that makes a layer's own map equals torch's operations, and the refinement takes its map as it is."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from refiner_hf import RefinerConfig
from refiner_hf.benchmarking.on_paper import compile_launch, imagined_gpu, launches_of
from refiner_hf.modeling_refiner import RefinerAttention
from refiner_hf.packed_maps_refiner import as_maps, empty_packed, packed_of
from refiner_hf.triton_attention_refiner import make_map, makes_map
from refiner_hf.triton_refiner import TritonPasses, triton_refine

from .conftest import assert_close
from .kernels import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    kernels_run,
    map_tiles,
    not_interpreted,
    poison,
    run_interpreted,
)
from .refinements import make_refinement


pytest.importorskip("triton")

# (heads, tokens, width, kernel): widths and numbers of tokens that no tile divides; 16 heads have their one behind.
SIZES = [(4, 9, 6, 3), (3, 1, 4, 3), (12, 17, 8, 3), (16, 5, 16, 5), (5, 33, 20, 1)]
LAYERS = [["plain", "shared_refined", "plain"], ["refined", "refined"], ["plain", "plain"]]
ON_GPU = [(12, 197, 32, 3), (12, 577, 35, 3), (16, 197, 32, 5), (6, 1025, 64, 3), (1, 50, 16, 1)]


def attention(query, key, value, previous, scaling):
    """(B, H, N, D) three times, (B, H, N, N) -> the map and the weighted values (B, N, H D), by torch's operations."""
    attention_map = ((query * scaling) @ key.transpose(2, 3)).softmax(
        -1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    attention_map = attention_map.to(query.dtype)
    if previous is not None:
        attention_map = attention_map.add(previous, alpha=scaling)
    return attention_map, (attention_map @ value).transpose(1, 2).flatten(2)


def make_inputs(heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32, images: int = 2) -> list:
    """Queries, keys and values as a layer makes them, and a map."""
    torch.manual_seed(0)
    tensors = [
        2 * torch.randn(images, tokens, heads * width).unflatten(-1, (heads, -1)).transpose(1, 2) for _ in range(3)
    ]
    tensors.append(torch.rand(images, heads, tokens, tokens))
    return [each.to(DEVICE, dtype) for each in tensors]


def packed_by_itself(maps: torch.Tensor, kernel: int) -> torch.Tensor:
    return TritonPasses(maps.contiguous(), (1, 1, kernel, kernel), None).packed


def exact(inputs: list, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(*(None if each is None else each.double() for each in inputs), scaling)


def check(heads: int, tokens: int, width: int, kernel: int) -> None:
    """Three layers: the first has no map before it, the second a packed one, the third another's."""
    *inputs, other = make_inputs(heads, tokens, width)
    previous, scaling = None, width**-0.5
    with torch.no_grad():
        for layer in range(3):
            ours, weighted = make_map(*inputs, previous, scaling, kernel)
            for actual, expected in zip((ours, weighted), exact([*inputs, previous], scaling), strict=True):
                assert_close(actual, expected, what=f"layer {layer}")
            assert torch.equal(packed_of(ours, kernel), packed_by_itself(ours, kernel))
            previous = (ours, other.transpose(2, 3))[min(layer, 1)]


def check_half(dtype: torch.dtype, tokens: int) -> None:
    """No further from float64 than torch's operations in the same type."""
    inputs = make_inputs(8, tokens, 16, dtype)
    with torch.no_grad():
        ours, theirs = make_map(*inputs, 0.25, 3), attention(*inputs, 0.25)
    for actual, usual, expected in zip(ours, theirs, exact(inputs, 0.25), strict=True):
        assert (actual - expected).norm() <= 1.05 * (usual - expected).norm()


def gradients(
    make: Callable, inputs: list, used: str = "both", dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Map, weighted values, and the gradients of the inputs, where the map, the weighted values or both are used."""
    given = [None if each is None else each.detach().to(dtype or each.dtype).requires_grad_() for each in inputs]
    results = make(*given)
    torch.manual_seed(1)
    wanted = [torch.randn(each.shape).to(each) for each in results if each is not None]
    pairs = [pair for pair, name in zip(zip(results, wanted), ("map", "weighted")) if used in ("both", name)]
    torch.autograd.backward(*(list(each) for each in zip(*pairs)))
    return [*results, *(each.grad for each in given if each is not None)]


def check_gradients(heads: int, tokens: int, width: int, used: str = "both", without: int | None = None) -> None:
    """Of float32 against float64; `without` one of the inputs."""
    inputs = make_inputs(heads, tokens, width)
    if without is not None:
        inputs[without] = None
    ours = gradients(lambda *given: make_map(*given, 0.3, 3), inputs, used)
    exactly = gradients(lambda *given: attention(*given, 0.3), inputs, used, torch.float64)
    for i, (actual, expected) in enumerate(zip(ours, exactly, strict=True)):
        assert (actual is None) == (expected is None), i
        if actual is not None:
            assert_close(actual, expected, 1e-5 if i < 2 else 1e-4, str(i))


def check_half_gradients(dtype: torch.dtype, tokens: int) -> None:
    """No further from float64 than torch's operations in the same type."""
    inputs = make_inputs(4, tokens, 16, dtype)
    ours = gradients(lambda *given: make_map(*given, 0.25, 3), inputs)
    usual = gradients(lambda *given: attention(*given, 0.25), inputs)
    exactly = gradients(lambda *given: attention(*given, 0.25), inputs, dtype=torch.float64)
    for actual, theirs, expected in zip(ours, usual, exactly, strict=True):
        assert (actual - expected).norm() <= 1.05 * (theirs - expected).norm()


@kernels_run
class TestKernel:
    @pytest.mark.parametrize("heads, tokens, width, kernel", SIZES)
    def test_equals_torch(self, heads, tokens, width, kernel):
        check(heads, tokens, width, kernel)

    def test_half_precision(self):
        check_half(torch.float16, 10)  # the interpreter has no products of bfloat16

    def test_a_map_alone(self):
        query, key, value, previous = make_inputs(4, 7, 8)
        with torch.no_grad():
            alone, nothing = make_map(query, key, None, previous, 0.3, 3)
            beside, _ = make_map(query, key, value, previous, 0.3, 3)
        assert nothing is None and torch.equal(alone, beside)

    def test_scores_that_are_far_apart(self):
        query, key, value, _ = make_inputs(4, 20, 8)
        inputs = [100 * query, 100 * key, value, None]
        with torch.no_grad():
            for actual, expected in zip(make_map(*inputs, 1.0, 3), exact(inputs, 1.0), strict=True):
                assert actual.isfinite().all()
                assert_close(actual, expected, 1e-2)  # scores of 1e5 have few digits behind the point

    def test_what_is_not_a_number_comes_out(self):
        query, key, value, previous = make_inputs(4, 7, 8)
        query[1, 2, 3, 4] = previous[0, 1, 2, 3] = value[0, 0, 0, 0] = math.nan
        key[0, 3, 5, 0] = math.nan
        with torch.no_grad():
            ours, theirs = make_map(query, key, value, previous, 0.3, 3), attention(query, key, value, previous, 0.3)
        for actual, expected in zip(ours, theirs, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())

    @pytest.mark.parametrize("kernel", [3, 5])
    def test_a_refinement_takes_the_map_as_it_is(self, kernel, monkeypatch):
        refinement = make_refinement(4, 2, kernel).eval().to(DEVICE)
        with torch.no_grad():
            maps, _ = make_map(*make_inputs(4, 9, 8), 0.3, kernel)
            expected = triton_refine(refinement, maps.contiguous(), 0.7)
            mask = (torch.rand(2, 1, 9, 9) > 0.3).to(DEVICE)
            masked = triton_refine(refinement, maps.masked_fill(~mask, 0), 0.7, mask)
            assert torch.equal(triton_refine(refinement, maps.mul_(mask), 0.7, mask), masked)
            maps, _ = make_map(*make_inputs(4, 9, 8), 0.3, kernel)
            monkeypatch.setattr(TritonPasses, "_pack", None)
            refined = triton_refine(refinement, maps, 0.7)
        assert torch.equal(refined, expected) and refined.is_contiguous()

    @pytest.mark.parametrize("layers", LAYERS)
    def test_in_a_network(self, tiny_model, layers, monkeypatch):
        """The same answers and maps as without kernels; with each layer's map by the kernel, and no packing."""
        made = []

        def counted(*args):
            made.append(make_map(*args))
            return made[-1]

        monkeypatch.setattr("refiner_hf.modeling_refiner.make_map", counted)
        model = tiny_model(attention_types=layers, num_hidden_layers=len(layers)).eval().to(DEVICE)
        for module in model.modules():
            if isinstance(module, RefinerAttention):
                torch.nn.init.normal_(module.o_proj.weight, std=0.2)
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found = {}
        for name in ("eager", "triton"):
            model.set_refine_implementation(name)
            with torch.no_grad():
                found[name] = model(pixels, output_attentions=True)
                plain = model(pixels).logits
            assert_close(plain, found[name].logits)
            assert len(made) == {"eager": 0, "triton": 2 * sum(kind != "shared_refined" for kind in layers)}[name]
        assert_close(found["triton"].logits, found["eager"].logits, 1e-4)
        for ours, theirs in zip(found["triton"].attentions, found["eager"].attentions, strict=True):
            assert_close(ours, theirs, 1e-4)

    @pytest.mark.parametrize("heads, tokens, width", [(3, 37, 6), (2, 16, 16), (1, 1, 4)])
    def test_gradients(self, heads, tokens, width):
        with map_tiles(rows=32, columns=16):
            check_gradients(heads, tokens, width)

    @pytest.mark.parametrize("used", ["map", "weighted"])
    def test_gradients_where_only_one_is_used(self, used):
        check_gradients(2, 9, 8, used)

    def test_gradients_without_a_map_before(self):
        check_gradients(2, 9, 8, without=3)

    def test_gradients_half_precision(self):
        check_half_gradients(torch.float16, 40)

    def test_gradients_of_some(self):
        """A frozen layer hands on the gradient of the map before; and the map is a usual one."""
        query, key, value, previous = make_inputs(2, 9, 8)
        maps, _ = make_map(query, key, value, previous.requires_grad_(), 0.3, 3)
        assert maps.is_contiguous()
        maps.sum().backward()
        assert_close(previous.grad, torch.full_like(previous, 0.3))

    def test_a_map_of_training_is_the_same_without_gradients(self):
        inputs = [each.requires_grad_() for each in make_inputs(2, 9, 8)]
        with_gradients = make_map(*inputs, 0.3, None)
        with torch.no_grad():
            without = make_map(*inputs, 0.3, None)
        assert all(map(torch.equal, with_gradients, without)) and without[0].is_contiguous()

    def test_no_second_derivative(self):
        inputs = [each.requires_grad_() for each in make_inputs(2, 5, 8)]
        maps, _ = make_map(*inputs, 0.3, 3)
        (gradient,) = torch.autograd.grad(maps.square().sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()

    @pytest.mark.parametrize("layers", LAYERS)
    def test_training_a_network(self, tiny_model, layers):
        """Loss, gradients and running statistics are about as near to float64 as without kernels."""
        model = tiny_model(attention_types=layers, num_hidden_layers=len(layers), image_size=12).train().to(DEVICE)
        pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found = {}
        for name, dtype in (("exact", torch.float64), ("eager", torch.float32), ("triton", torch.float32)):
            twin = copy.deepcopy(model).to(dtype)
            twin.set_refine_implementation("eager" if name == "exact" else name)
            if layers[0] == "refined":
                twin.gradient_checkpointing_enable(dict(use_reentrant=False))
            loss = twin(pixels.to(dtype), labels=torch.tensor([0, 3], device=DEVICE)).loss
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
            found[name] = {"loss": loss.detach(), **gradients, **dict(twin.named_buffers())}
        largest = max(each.abs().max().item() for each in found["exact"].values())
        for name, exactly in found["exact"].items():
            ours, theirs = ((found[each][name] - exactly).abs().max().item() for each in ("triton", "eager"))
            assert ours <= max(3 * theirs, 1e-4 * exactly.abs().max().item(), 1e-6 * largest), name

    def test_where_it_is_for(self, tiny_config):
        query, key, value, previous = make_inputs(4, 7, 8)
        config = tiny_config()
        assert makes_map(config, query, key, value, previous) and makes_map(config, query, key, value, None)
        assert not makes_map(config, query.double(), key.double(), value.double(), None)
        assert not makes_map(config, query, key, value.half(), None)
        assert not makes_map(config, *make_inputs(4, 7, 33)[:3], None)  # in float32
        assert not makes_map(config, *make_inputs(17, 2, 4)[:3], None)
        assert not makes_map(config, query[:0], key[:0], value[:0], None)
        assert not makes_map(tiny_config(refinement="expansion"), query, key, value, None)
        config.refine_implementation = "eager"
        assert not makes_map(config, query, key, value, None)

    def test_not_where_maps_are_dropped(self, tiny_model):
        model = tiny_model(attention_probs_dropout_prob=0.5).train().to(DEVICE)
        layer = model.refiner.layers[0].attention
        hidden_states = torch.randn(1, 17, 24, device=DEVICE)
        with torch.no_grad():
            assert (layer(hidden_states, None)[1] == 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("heads, tokens, width, kernel", ON_GPU)
    def test_equals_torch(self, heads, tokens, width, kernel):
        if width <= 32:
            check(heads, tokens, width, kernel)
            check_gradients(heads, tokens, width)
        check_half(torch.float16, tokens)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        check_half(dtype, 197)
        check_half_gradients(dtype, 197)


@not_interpreted
def test_in_the_interpreter():
    """All of the above, interpreted."""
    run_interpreted(__file__, "TestKernel")


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel can't be compiled")
@pytest.mark.parametrize(
    "capability, dtype, heads, width",
    [
        (90, torch.bfloat16, 12, 32),
        (80, torch.float32, 16, 32),
        (80, torch.bfloat16, 12, 35),
        (80, torch.float16, 16, 64),
    ],
)
def test_compiles_for_gpus(capability, dtype, heads, width):
    """Whatever map is added, with few bytes spilled, and in what any GPU from Ampere on grants a program."""
    with imagined_gpu():
        *inputs, other = (torch.empty(2, heads, 50, size, dtype=dtype) for size in (width, width, width, 50))

        def three_layers() -> None:
            first, _ = make_map(*inputs, None, 0.3, 3)
            make_map(*inputs, first, 0.3, 3)
            make_map(*inputs, other, 0.3, 3)
            gradients(lambda *given: make_map(*given, 0.3, 3), [*inputs, other])

        launches = {launch.compiled_for: launch for launch in launches_of(three_layers)}
    assert len(launches) == 6
    for launch in launches.values():
        compiled = compile_launch(launch, capability)
        assert compiled.spilled <= 128 and compiled.shared <= 99 * 1024


@not_interpreted
def test_nothing_changes_on_a_cpu():
    with torch.no_grad():
        assert not makes_map(RefinerConfig(), *make_inputs(4, 7, 8))


class TestPackedMaps:
    """A view of packed maps is known again, and nothing else is."""

    @pytest.mark.parametrize("images, heads, tokens, kernel", [(2, 4, 5, 3), (1, 16, 1, 5), (3, 1, 4, 1)])
    def test_known(self, images, heads, tokens, kernel):
        packed = empty_packed(images, heads, tokens, kernel, like=torch.empty(0))
        maps = as_maps(packed, heads, kernel)
        assert maps.shape == (images, heads, tokens, tokens)
        found = packed_of(copy.copy(maps), kernel)
        assert found.shape == packed.shape and found.data_ptr() == packed.data_ptr() and found.is_contiguous()

    def test_not_known(self):
        maps = as_maps(empty_packed(3, 4, 5, 3, like=torch.empty(0)), 4, 3)
        for other in (
            maps.contiguous(),
            maps.clone(),
            maps + 1,
            maps[:2],
            maps.transpose(2, 3),
            torch.empty_like(maps),
        ):
            assert packed_of(other, 3) is None
        assert packed_of(maps, 5) is None
        assert packed_of(torch.empty(3, 5, 5, 16)[..., :4].permute(0, 3, 1, 2), 1) is None
