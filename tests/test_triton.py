"""The kernels equal the refinement module by module."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch

from refiner_hf import RefinerConfig, RefinerForImageClassification, refine, triton_kernels_refiner, triton_refiner
from refiner_hf.attention_refiner import REFINE_IMPLEMENTATIONS, eager_refine
from refiner_hf.benchmarking.on_paper import compile_launch, imagined_gpu, launches_of
from refiner_hf.folding_refiner import operands_of
from refiner_hf.triton_refiner import triton_refine

from .compilers import Graphs
from .conftest import assert_close
from .encoders import disturb, inputs_of, make_encoder, real_tokens
from .kernels import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    kernels_run,
    not_interpreted,
    poison,
    refinement_tiles,
    run_interpreted,
)
from .refinements import (
    assert_exact,
    assert_exact_but_for_kinks,
    assert_no_further,
    differences,
    exact_step,
    make_maps,
    make_refinement,
    step,
)


pytest.importorskip("triton")
# (heads, ratio, kernel, tokens): with and without expansion, more expanded heads than a tile holds, sizes that no tile
# divides. The interpreter takes seconds for each.
FEW = [(4, 3, 3, 9), (3, 1, 5, 7), (12, 2, 3, 5)]
GRID = [(h, r, k, n) for h in (2, 5, 12, 16) for r in (1, 2, 3, 6) for k in (3, 5) for n in (2, 7, 26)]
ON_GPU = [(12, 3, 3, 197), (12, 3, 3, 577), (16, 3, 3, 785), (12, 6, 5, 197), (12, 1, 3, 197), (5, 2, 5, 63)]


def check(
    heads: int, ratio: int, kernel: int, tokens: int, training: bool = True, images: int = 1,
    equal: Callable = assert_exact,
) -> None:  # fmt: skip
    refinement = make_refinement(heads, ratio, kernel).train(training).to(DEVICE)
    maps = make_maps(images, heads, tokens).to(DEVICE)
    assert REFINE_IMPLEMENTATIONS["triton"].why_not(refinement, maps) is None
    equal(step(triton_refine, refinement, maps), exact_step(refinement, maps))
    with torch.no_grad():
        refinement.eval()
        exact = eager_refine(copy.deepcopy(refinement).double(), maps.double(), 0.7)
        assert_close(triton_refine(refinement, maps, 0.7), exact)


def check_half(dtype: torch.dtype, training: bool, tokens: int = 10) -> None:
    """No further from float64 than module by module in the same type."""
    refinement = make_refinement(8).train(training).to(DEVICE, dtype)
    maps = make_maps(2, 8, tokens, dtype).to(DEVICE)
    exact = exact_step(refinement, maps)
    assert_no_further(step(triton_refine, refinement, maps), step(eager_refine, refinement, maps), exact)


def lengths(images: int, tokens: int) -> torch.Tensor:
    """A mask of texts of different lengths, the last of padding alone."""
    real = torch.arange(tokens) < torch.linspace(tokens, 0, images).long()[:, None]
    return (real[:, :, None] & real[:, None, :])[:, None]


def band(images: int, tokens: int) -> torch.Tensor:
    """A mask of neighbours, with holes."""
    place = torch.arange(tokens)
    real = torch.rand(images, tokens, generator=torch.Generator().manual_seed(4)) > 0.3
    return ((real[:, :, None] & real[:, None, :]) & ((place[:, None] - place).abs() <= 3))[:, None]


def check_masked(
    mask: torch.Tensor, heads: int, ratio: int, kernel: int, training: bool, equal: Callable = assert_exact
) -> None:
    refinement = make_refinement(heads, ratio, kernel).train(training).to(DEVICE)
    maps, mask = make_maps(len(mask), heads, mask.shape[-1]).to(DEVICE), mask.to(DEVICE)

    def masked(refine: Callable) -> Callable:
        def call(refinement, maps, scale):
            return refine(refinement, maps.masked_fill(~mask, 0), scale, mask).masked_fill(~mask, 0)

        return call

    exact = step(masked(eager_refine), copy.deepcopy(refinement).double(), maps.double())
    equal(step(masked(triton_refine), refinement, maps), exact)
    with torch.no_grad():
        refinement.eval()
        exact = masked(eager_refine)(copy.deepcopy(refinement).double(), maps.double(), 0.7)
        assert_close(masked(triton_refine)(refinement, maps, 0.7), exact)


@kernels_run
class TestKernels:
    @pytest.mark.parametrize("make_mask", [lengths, band])
    @pytest.mark.parametrize("heads, ratio, kernel, training", [(4, 3, 3, True), (3, 1, 5, True), (4, 2, 3, False)])
    def test_masked(self, heads, ratio, kernel, training, make_mask):
        with refinement_tiles(lanes=16, rows=5):
            check_masked(make_mask(3, 8), heads, ratio, kernel, training)

    @pytest.mark.parametrize("heads, ratio, kernel, tokens", FEW)
    def test_equal_eager(self, heads, ratio, kernel, tokens):
        check(heads, ratio, kernel, tokens)

    @pytest.mark.parametrize("family", ["vit", "bert"])
    def test_in_a_refined_encoder(self, family):
        """With the padding of its texts; in training, with gradients and running statistics."""
        model = make_encoder(family).to(DEVICE)
        inputs = {name: value.to(DEVICE) for name, value in inputs_of(family).items()}
        disturb(refine(model, inputs))
        found = []
        for name in ("eager", "triton"):
            twin = copy.deepcopy(model).train()
            twin.set_refine_implementation(name)
            output = twin(**inputs).last_hidden_state[real_tokens(inputs)]
            torch.manual_seed(3)
            (output * torch.randn(output.shape).to(output)).sum().backward()
            refined = {n: p.grad for n, p in twin.named_parameters() if ".refinement." in n}
            found.append({"output": output.detach(), **refined, **dict(twin.named_buffers())})
        # Next to what is large: some gradients are nothing but rounding, as those of a bias before a norm.
        largest = max(each.abs().max().item() for each in found[0].values())
        for name, expected in found[0].items():
            difference = (found[1][name].float() - expected.float()).abs().max().item()
            assert difference <= 1e-3 * expected.abs().max().item() + 1e-6 * largest, name

    def test_in_evaluation_with_gradients(self):
        check(4, 3, 3, 7, training=False)

    def test_half_precision(self):
        check_half(torch.float16, training=True)  # the interpreter has no products of bfloat16

    def test_an_exchange_for_each_image(self, monkeypatch):
        monkeypatch.setattr(triton_refiner, "_EXCHANGE", 1)
        check(4, 2, 3, 5, images=3)

    @pytest.mark.parametrize("lanes, channels, rows, steps", [(16, 16, 2, 1), (64, 32, 5, 3)])
    def test_other_tiles(self, monkeypatch, lanes, channels, rows, steps):
        monkeypatch.setattr(triton_refiner, "_STEPS", steps)
        with refinement_tiles(lanes=lanes, channels=channels, rows=rows):
            check(2, 2, 3, 9)

    @pytest.mark.parametrize("heads, ratio, kernel", [(12, 2, 5), (3, 1, 5), (16, 2, 3)])
    def test_several_strips(self, heads, ratio, kernel):
        with refinement_tiles(lanes=16, rows=3):
            check(heads, ratio, kernel, 7, images=2)

    def test_a_kernel_that_looks_at_no_neighbour(self):
        check(4, 3, 1, 7)

    def test_a_single_token(self):
        """Its map is constant, so that only running statistics make sense of it."""
        refinement, maps = make_refinement().eval().to(DEVICE), make_maps(2, tokens=1).to(DEVICE)
        with torch.no_grad():
            assert_close(triton_refine(refinement, maps), eager_refine(refinement, maps))

    def test_maps_that_are_nearly_uniform(self):
        """As at the start of a training: their values differ by far less than they are."""
        refinement = make_refinement().to(DEVICE)
        maps = (0.01 * torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))).softmax(-1).to(DEVICE)
        ours, eager, exact = (
            step(triton_refine, refinement, maps), step(eager_refine, refinement, maps), exact_step(refinement, maps)
        )  # fmt: skip
        of_ours, of_eager = differences(ours, exact), differences(eager, exact)
        assert all(of_ours[name] <= max(3 * of_eager[name], 1e-5) for name in of_ours), (of_ours, of_eager)

    def test_vectors_that_are_not_contiguous(self):
        refinement, maps = make_refinement().eval().to(DEVICE), make_maps(1, tokens=5).to(DEVICE)
        refinement.local_attention_norm.running_var = torch.full((1,), 2.0, device=DEVICE).expand(12)
        refinement.output_norm.weight.data = torch.arange(8.0, device=DEVICE)[::2]
        with torch.no_grad():
            assert_close(triton_refine(refinement, maps), eager_refine(refinement, maps))

    @pytest.mark.parametrize("ratio", [1, 3])
    def test_sound_operations(self, ratio):
        refinement, maps = make_refinement(ratio=ratio).to(DEVICE), make_maps(1, tokens=5).to(DEVICE)
        operands, eps = operands_of(refinement.requires_grad_(False))
        torch.library.opcheck(torch.ops.refiner_hf.triton_refine, (maps, None, operands, eps, 0.7))
        operands, _ = operands_of(refinement.requires_grad_(), statistics=False)
        weights = [each for each in operands if each is not None]
        arguments = (maps.requires_grad_(), None, weights, 0.7, True, False, 1e-5)
        torch.library.opcheck(torch.ops.refiner_hf.triton_forward, arguments)

    @pytest.mark.parametrize("training", [True, False])
    def test_compilers_keep_them(self, training):
        refinement, maps, graphs = make_refinement().train(training), make_maps(2, tokens=7).to(DEVICE), Graphs()
        refinement.to(DEVICE).config.refine_implementation = "triton"
        twin = copy.deepcopy(refinement)
        compiled = torch.compile(refinement, fullgraph=True, dynamic=True, backend=graphs.backend)
        with torch.set_grad_enabled(training):
            assert_close(compiled(maps), twin(maps), 1e-6)
        names = ["triton_forward", "triton_backward"] if training else ["triton_refine"]
        if training:
            compiled(maps).square().sum().backward(), twin(maps).square().sum().backward()
            assert_close(refinement.reduction.weight.grad, twin.reduction.weight.grad, 1e-6)
        assert [sum(graphs.count(name)) for name in names] == [1] * len(names)

    def test_autocast(self):
        refinement, maps = make_refinement().to(DEVICE), make_maps(1, tokens=7, dtype=torch.float16).to(DEVICE)

        def autocast(refinement, maps, scale):
            with torch.autocast(DEVICE, torch.float16):
                return triton_refine(refinement, maps, scale)

        ours, exact = step(autocast, refinement, maps), exact_step(refinement, maps)
        assert ours["output"].dtype == torch.float16 and ours["gradient of reduction.weight"].dtype == torch.float32
        assert max(differences(ours, exact).values()) < 0.02

    def test_what_is_not_a_number_comes_out(self):
        refinement, maps = make_refinement().to(DEVICE), make_maps(2, tokens=7).to(DEVICE)
        maps[1, 2, 3, 4] = float("nan")
        with torch.no_grad():
            ours, theirs = (refine(copy.deepcopy(refinement), maps) for refine in (triton_refine, eager_refine))
            assert torch.equal(ours.isnan(), theirs.isnan())
            refinement.eval()
            assert torch.equal(triton_refine(refinement, maps).isnan(), eager_refine(refinement, maps).isnan())

    def test_maps_that_are_not_contiguous(self):
        refinement, maps = make_refinement().to(DEVICE), make_maps(2, tokens=7).transpose(2, 3).to(DEVICE)
        with torch.no_grad():
            assert_close(triton_refine(refinement.eval(), maps), eager_refine(refinement, maps))


@kernels_run
@pytest.mark.slow
class TestWholeGrid:
    @pytest.mark.parametrize("heads, ratio, kernel, tokens", GRID)
    def test_equal_eager(self, heads, ratio, kernel, tokens):
        check(heads, ratio, kernel, tokens, images=2)

    @pytest.mark.parametrize("ratio", [1, 3])
    @pytest.mark.parametrize("kernel", [3, 5])
    def test_in_evaluation_with_gradients(self, ratio, kernel):
        check(5, ratio, kernel, 26, training=False)

    @pytest.mark.parametrize("training", [True, False])
    def test_half_precision(self, training):
        check_half(torch.float16, training, tokens=26)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("heads, ratio, kernel, tokens", ON_GPU)
    def test_equal_eager(self, heads, ratio, kernel, tokens):
        check(heads, ratio, kernel, tokens, equal=assert_exact_but_for_kinks)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("make_mask", [lengths, band])
    @pytest.mark.parametrize("ratio, tokens", [(3, 128), (1, 61), (3, 512)])
    def test_masked(self, ratio, tokens, make_mask, training):
        check_masked(make_mask(4, tokens), 12, ratio, 3, training, assert_exact_but_for_kinks)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("training", [True, False])
    def test_half_precision(self, dtype, training):
        check_half(dtype, training, tokens=197)

    @pytest.mark.parametrize("training", [True, False])
    def test_cuda_graphs(self, training):
        """`mode="reduce-overhead"`: the results are those without a compiler, step after step."""
        torch._dynamo.reset()
        config = RefinerConfig.small(
            num_hidden_layers=3, num_labels=8, drop_path_rate=0.0, refine_implementation="triton"
        )
        theirs = RefinerForImageClassification(config).train(training).cuda()
        ours = copy.deepcopy(theirs)
        compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        for _ in range(4):
            pixels, labels = torch.randn(4, 3, 224, 224, device="cuda"), torch.arange(4, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            losses = []
            for model, call in ((theirs, theirs), (ours, compiled)):
                with torch.set_grad_enabled(training):
                    losses.append(call(pixels, labels=labels).loss.clone())
                if training:
                    model.zero_grad()
                    losses[-1].backward()
            assert_close(losses[1].detach(), losses[0].detach(), 1e-4)
            if training:
                gradients = [model.refiner.embeddings.cls_token.grad for model in (ours, theirs)]
                assert_close(*gradients, 1e-3)
        for name, buffer in theirs.named_buffers():
            assert_close(ours.get_buffer(name).double(), buffer.double(), 1e-4, name)

    def test_many_positions(self):
        """More than 2^31 elements of maps, where 32-bit offsets would wrap around."""
        refinement = make_refinement(12).eval().cuda().requires_grad_(False)
        maps = make_maps(1, 12, 577, torch.bfloat16).cuda().expand(560, -1, -1, -1).contiguous()
        output = triton_refine(refinement, maps)
        assert torch.equal(output[-1], output[0])


@pytest.mark.parametrize("part", ["TestKernels", pytest.param("TestWholeGrid", marks=pytest.mark.slow)])
@not_interpreted
def test_in_the_interpreter(part):
    """All of the above, interpreted."""
    run_interpreted(__file__, part)


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel can't be compiled")
@pytest.mark.parametrize(
    "capability, dtype, heads, ratio, kernel",
    [
        (90, torch.bfloat16, 12, 3, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (80, torch.float32, 12, 3, 3),
                (90, torch.float16, 16, 6, 5),
                (80, torch.bfloat16, 1, 1, 3),
                (90, torch.float32, 16, 6, 5),
            ]
        ),
    ],
)
def test_compiles_for_gpus(capability, dtype, heads, ratio, kernel):
    """All that is launched in evaluation and in training, with and without a mask, down to machine code."""
    launches = {}
    with torch.device("meta"):
        refinements = [make_refinement(heads, ratio, kernel).train(training) for training in (True, False)]
    with imagined_gpu():
        for refinement in refinements:
            refinement.to_empty(device="cpu")  # only there torch knows backward without a GPU
            for mask in (None, torch.ones(2, 1, 50, 50, dtype=torch.bool)):
                found = launches_of(partial(call, refinement, torch.empty(2, heads, 50, 50, dtype=dtype), mask))
                launches |= {launch.compiled_for: launch for launch in found}
    kernels = {name for name in vars(triton_kernels_refiner) if name.endswith("_kernel")}
    assert {launch.name for launch in launches.values()} == kernels and len(kernels) == 13
    for launch in launches.values():
        assert compile_launch(launch, capability).shared <= 99 * 1024  # what any GPU from Ampere on grants a program


def call(refinement, maps, mask) -> None:
    with torch.set_grad_enabled(refinement.training):
        output = triton_refine(refinement, maps.requires_grad_(refinement.training), 0.7, mask)
    if refinement.training:
        output.backward(torch.empty_like(output))


def test_says_what_stands_against_it():
    refinement, maps = make_refinement(), make_maps()
    why_not = REFINE_IMPLEMENTATIONS["triton"].why_not
    if DEVICE == "cpu" and not INTERPRETED:
        assert "NVIDIA GPU" in why_not(refinement, maps)
        return
    maps = maps.to(DEVICE)
    refinement = refinement.to(DEVICE)
    assert "float64" in why_not(refinement.double(), maps.double())
    assert "16 heads" in why_not(make_refinement(17).to(DEVICE), make_maps(heads=17).to(DEVICE))
    assert "65536" in why_not(make_refinement().to(DEVICE), maps[:1].expand(2**16, -1, -1, -1))
    assert "distributed local attention" in why_not(make_refinement(refinement="expansion").to(DEVICE), maps)
