"""`torch.compile` keeps the fast implementations, as operations in one graph."""

import copy
import math

import pytest
import torch
from torch import nn

from refiner_hf import attention_refiner, inference_refiner
from refiner_hf.folding_refiner import operands_of

from .compilers import Graphs
from .conftest import assert_close
from .refinements import make_maps, make_refinement
from .test_fast_paths import assert_same, gradients_and_buffers
from .test_native import compiled as compiled_function
from .test_native import needs_compiler


OPERATIONS = torch.ops.refiner_hf
needs_onednn = pytest.mark.skipif(inference_refiner._product is None, reason="this torch has no oneDNN")
implementations = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=needs_compiler), "blocked", "auto"]
)


def refinements_of(model) -> int:
    return sum("refined" in each for each in model.config.attention_types)


@implementations
def test_evaluation(tiny_model, implementation):
    """With the number of images left open."""
    model, graphs = tiny_model().eval(), Graphs()
    model.set_refine_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    with torch.no_grad():
        for images in (2, 5):
            pixels = torch.randn(images, 3, 16, 16)
            assert_close(compiled(pixels).logits, model(pixels).logits, 1e-5)
    fastest = "native" if compiled_function() else "blocked"
    name = fastest if implementation == "auto" else implementation
    assert graphs.count(f"{name}_refine") == [refinements_of(model)]


@needs_onednn
def test_linear_layers(tiny_model, monkeypatch):
    """Those that are large enough for one image are oneDNN's products, with their activation."""
    model, graphs = tiny_model().eval(), Graphs()
    tokens, width = model.config.num_prefix_tokens + math.prod(model.config.patch_grid), model.config.hidden_size
    layers = [each for each in model.modules() if isinstance(each, nn.Linear)]
    large = [each for each in layers if each.weight.numel() > width**2]
    monkeypatch.setattr(inference_refiner, "_PAYS_FROM", tokens * width * model.config.intermediate_size)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    with torch.no_grad():
        for images in (2, 5):
            pixels = torch.randn(images, 3, 16, 16)
            assert_close(compiled(pixels).logits, model(pixels).logits, 1e-5)
    assert graphs.count("linear") == [len(large)] and len(layers) > len(large) >= 2 * model.config.num_hidden_layers
    assert graphs.count("embed_patches") == [1]  # which is one on patches
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    assert compiled(pixels).logits.requires_grad
    assert graphs.count("linear")[1:] == (len(graphs.count("linear")) - 1) * [0]


@pytest.mark.parametrize("norms", ["training", "frozen"])
def test_training(tiny_model, norms):
    """Loss, gradients and running statistics are those of the modules; with the number of images left open."""
    ours, graphs = tiny_model(num_hidden_layers=4).train(), Graphs()
    if norms == "frozen":
        ours.freeze_norms()
    ours.set_refine_implementation("blocked")
    theirs = copy.deepcopy(ours)
    theirs.set_refine_implementation("eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=graphs.backend)
    for images in (7, 5):  # not as many as something else has
        inputs = {"pixel_values": torch.randn(images, 3, 16, 16).double(), "labels": torch.arange(images) % 4}
        found = gradients_and_buffers(compiled, **inputs)
        found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
        assert_same(found, gradients_and_buffers(theirs, **inputs))
    assert graphs.count("blocked_forward") == [refinements_of(ours), 0]
    assert graphs.count("blocked_backward") == [0, refinements_of(ours)]


@pytest.mark.parametrize("pays_from, taken", [(0, True), (2**40, False)])
def test_auto_goes_by_size_in_training_as_without_a_compiler(tiny_model, monkeypatch, pays_from, taken):
    blocked = attention_refiner.REFINE_IMPLEMENTATIONS["blocked"]._replace(fastest_from={"cpu": pays_from})
    monkeypatch.setitem(attention_refiner.REFINE_IMPLEMENTATIONS, "blocked", blocked)
    model, graphs = tiny_model().train(), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    compiled(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    assert graphs.count("blocked_forward") == [taken * refinements_of(model), 0]


def test_a_refinement_by_one_convolution_is_left_to_the_compiler(tiny_model):
    model, graphs = tiny_model(refinement="convolution").train(), Graphs()
    model.set_refine_implementation("blocked")
    torch.compile(model, fullgraph=True, backend=graphs.backend)(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    assert len(graphs.operations) == 2 and "refiner_hf" not in str(graphs.operations)


class TestOperations:
    """Each is what it says to compilers: shapes, layouts and types, what it changes, gradients."""

    def check(self, operation, *arguments) -> None:
        torch.library.opcheck(operation, arguments)

    @needs_compiler
    @pytest.mark.parametrize("ratio", [1, 3])
    def test_native(self, ratio):
        operands, eps = operands_of(make_refinement(ratio=ratio).requires_grad_(False))
        maps, (query, key, value) = make_maps(), torch.randn(3, 3, 9, 20).unbind()
        self.check(OPERATIONS.native_refine, maps, None, operands, eps, 0.7)
        self.check(OPERATIONS.native_refine, maps, value, operands, eps, 0.7)
        self.check(OPERATIONS.native_attend, query, key, value, None, 4, 0.7)
        self.check(OPERATIONS.native_attend, query, key, value, maps, 4, 0.7)

    @needs_onednn
    @pytest.mark.parametrize("gelu", [False, True])
    def test_linear(self, gelu):
        inputs, weight, bias = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(3)
        self.check(OPERATIONS.linear, inputs, weight, bias, gelu)
        self.check(OPERATIONS.linear, inputs[0], weight, None, gelu)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("ratio", [1, 3])
    def test_blocked(self, ratio, masked):
        operands, eps = operands_of(make_refinement(ratio=ratio).requires_grad_(False))
        self.check(OPERATIONS.blocked_refine, make_maps(), self.mask() if masked else None, operands, eps, 0.7)

    @pytest.mark.parametrize("batch_statistics", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("ratio", [1, 3])
    def test_forward_and_backward(self, ratio, masked, batch_statistics):
        operands, _ = operands_of(make_refinement(ratio=ratio), statistics=not batch_statistics)
        weights = [each for each in operands if each is not None]
        maps, mask = make_maps().requires_grad_(), self.mask() if masked else None
        setting = (0.7, batch_statistics, False, 1e-5)
        self.check(OPERATIONS.blocked_forward, maps, mask, weights, *setting)
        output, reduced, statistics = OPERATIONS.blocked_forward(maps, mask, weights, *setting)
        gradient = torch.randn_like(output)
        with torch.no_grad():
            kept = [each.detach() for each in weights]
            self.check(OPERATIONS.blocked_backward, maps.detach(), mask, kept, reduced, statistics, gradient, *setting)

    def mask(self) -> torch.Tensor:
        return torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.3


@pytest.mark.slow
def test_without_checks(tiny_model):
    """As docs/speed.md says: weights may change, and a batch of another size is an error."""
    model = tiny_model().eval()
    compiled = torch.compile(model, dynamic=False, options={"guard_filter_fn": lambda guards: [False] * len(guards)})
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = compiled(pixels).logits
        assert_close(before, model(pixels).logits, 1e-5)
        model.classifier.weight.mul_(2)
        assert_close(compiled(pixels).logits, model(pixels).logits, 1e-5)
        assert (compiled(pixels).logits - before).abs().max() > 1e-3
        with pytest.raises(AssertionError, match="expected size 1==2"):
            compiled(pixels[:1])
