"""The refinement in pieces equals the one module by module: outputs, gradients, buffers, and whatever may happen."""

import copy
import pickle

import pytest
import torch
from torch import nn

from refiner_hf import blocked_refiner
from refiner_hf.attention_refiner import eager_refine
from refiner_hf.blocked_refiner import blocked_refine

from .conftest import assert_close
from .refinements import assert_exact, assert_no_further, differences, exact_step, make_maps, make_refinement, step


@pytest.fixture(params=["whole images", "rows"])
def pieces(request, monkeypatch):
    """Once with a piece for each image, once with pieces of eight rows."""
    if request.param == "rows":
        monkeypatch.setattr(blocked_refiner, "_PIECE", 1)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("tokens", [5, 17, 26])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("ratio", [1, 2, 3])
class TestEqualsEager:
    @pytest.mark.parametrize("training", [True, False])
    def test_forward_backward_and_buffers(self, training, ratio, kernel, tokens):
        refinement, maps = make_refinement(ratio=ratio, kernel=kernel).train(training), make_maps(tokens=tokens)
        # In float64 the two agree to its precision, so the formulas are the same.
        ours = step(blocked_refine, copy.deepcopy(refinement).double(), maps.double())
        exact = exact_step(refinement, maps)
        assert max(differences(ours, exact).values()) < 1e-9
        # A 1 x 1 kernel's gradient is all but 0, since the norm behind it takes out its size: rounding is large in it.
        if kernel > 1:
            assert_exact(step(blocked_refine, refinement, maps), exact)

    def test_inference(self, ratio, kernel, tokens):
        refinement, maps = make_refinement(ratio=ratio, kernel=kernel).eval(), make_maps(tokens=tokens)
        with torch.no_grad():
            assert_close(blocked_refine(refinement, maps, 0.7), eager_refine(refinement, maps, 0.7))


@pytest.mark.parametrize("heads, ratio", [(2, 1), (1, 3), (12, 3), (16, 6)])
def test_numbers_of_heads(heads, ratio):
    refinement, maps = make_refinement(heads, ratio), make_maps(heads=heads)
    assert_exact(step(blocked_refine, refinement, maps), exact_step(refinement, maps))
    with torch.no_grad():
        assert_close(blocked_refine(refinement.eval(), maps), eager_refine(refinement, maps))


def test_expansion_alone_in_evaluation():
    refinement, maps = make_refinement(refinement="expansion").eval(), make_maps()
    with torch.no_grad():
        assert_close(blocked_refine(refinement, maps), eager_refine(refinement, maps))


def test_maps_that_are_not_contiguous():
    refinement, maps = make_refinement(), make_maps(tokens=11).transpose(2, 3)
    assert_exact(step(blocked_refine, refinement, maps), exact_step(refinement, maps))
    with torch.no_grad():
        assert_close(blocked_refine(refinement.eval(), maps), eager_refine(refinement, maps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_no_further_from_the_truth_than_eager(dtype, training):
    # Enough maps, and enough channels of each tensor, that neither is better by chance.
    refinement = make_refinement(heads=8).train(training).to(dtype)
    maps = make_maps(images=8, heads=8, tokens=24, dtype=dtype)
    exact = exact_step(refinement, maps)
    assert_no_further(step(blocked_refine, refinement, maps), step(eager_refine, refinement, maps), exact)


def test_autocast():
    refinement, maps = make_refinement(), make_maps(dtype=torch.bfloat16)

    def autocast(refinement, maps, scale):
        with torch.autocast("cpu", torch.bfloat16):
            return blocked_refine(refinement, maps, scale)

    ours, exact = step(autocast, refinement, maps), exact_step(refinement, maps)
    assert ours["output"].dtype == ours["gradient of the maps"].dtype == torch.bfloat16
    assert ours["gradient of reduction.weight"].dtype == torch.float32
    assert max(differences(ours, exact).values()) < 0.02  # the output's gradient and map's are in bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = blocked_refine(refinement.eval(), maps)
    assert output.dtype == torch.bfloat16
    assert_close(output, eager_refine(refinement, maps.float()), 0.01)


def test_saves_the_map_its_reduction_and_short_vectors_alone():
    refinement, maps = make_refinement(), make_maps(tokens=26).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        blocked_refine(refinement, maps)
    large = [tensor for tensor in saved if tensor.numel() >= maps.numel()]
    assert [tensor.shape for tensor in large] == [maps.shape] * 2
    assert sum(tensor.numel() for tensor in saved if tensor.numel() < maps.numel()) < 1500


@pytest.mark.parametrize("loss", [torch.square, lambda output: 3 * output])  # of the second, eager's isn't 0 either
def test_second_derivative_is_refused(loss):
    refinement, maps = make_refinement(), make_maps().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(blocked_refine(refinement, maps)).sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_a_number_comes_out(training):
    refinement, maps = make_refinement().train(training), make_maps()
    maps[1, 2, 3, 4] = float("nan")
    ours, theirs = step(blocked_refine, refinement, maps), step(eager_refine, refinement, maps)
    assert torch.equal(ours["output"].isnan(), theirs["output"].isnan())
    for name in theirs:
        if name.startswith("gradient") and "reduction_norm.bias" not in name:
            assert ours[name].isnan().any() or not theirs[name].isnan().any(), name


def test_gradients_where_only_some_are_wanted():
    refinement, maps = make_refinement(), make_maps()
    exact = exact_step(refinement, maps)
    refinement.requires_grad_(False)
    inputs = maps.clone().requires_grad_()
    output = blocked_refine(refinement, inputs, 0.7)
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape))
    assert_close(inputs.grad, exact["gradient of the maps"], 1e-4)
    refinement.reduction.weight.requires_grad_(True)
    blocked_refine(refinement, maps).sum().backward()
    assert [name for name, p in refinement.named_parameters() if p.grad is not None] == ["reduction.weight"]


def test_weights_and_norms_of_different_types():
    refinement, maps = make_refinement(), make_maps(dtype=torch.bfloat16)
    for convolution in (refinement.expansion, refinement.local_attention, refinement.reduction):
        convolution.to(torch.bfloat16)
    refinement.reduction_norm.double()
    ours, exact = step(blocked_refine, refinement, maps), exact_step(refinement, maps)
    assert ours["gradient of expansion.weight"].dtype == torch.bfloat16
    assert ours["gradient of reduction_norm.weight"].dtype == torch.float64
    assert ours["gradient of output_norm.weight"].dtype == torch.float32
    assert max(differences(ours, exact).values()) < 0.02


def test_weights_more_exact_than_the_maps():
    refinement, maps = make_refinement().eval().double().requires_grad_(False), make_maps()
    assert_close(blocked_refine(refinement, maps), eager_refine(refinement, maps.double()))


def test_momenta_of_their_own():
    results = []
    for refine in (eager_refine, blocked_refine):
        refinement = make_refinement()
        refinement.reduction_norm.momentum, refinement.output_norm.momentum = 0.5, None
        with torch.no_grad():
            refine(refinement, make_maps(1))
            refine(refinement, make_maps(4))
        results.append(list(refinement.buffers()))
    for ours, theirs in zip(*results):
        assert_close(ours, theirs)


def test_momentum_none_averages():
    """As re-estimating the statistics does."""
    results = []
    for refine in (eager_refine, blocked_refine):
        refinement = make_refinement()
        for module in refinement.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        with torch.no_grad():
            for images in (1, 4, 2):
                refine(refinement, make_maps(images))
        results.append(list(refinement.buffers()))
    for ours, theirs in zip(*results):
        assert_close(ours, theirs)


class TestFoldingSeesEveryChange:
    """Inference after a change of weights equals module by module, however the change was made."""

    def check(self, refinement):
        maps = make_maps(dtype=refinement.reduction.weight.dtype)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_close(blocked_refine(refinement, maps), eager_refine(refinement, maps), 1e-5)

    @pytest.fixture
    def refinement(self):
        refinement = make_refinement().eval().requires_grad_(False)
        self.check(refinement)
        return refinement

    @pytest.mark.parametrize("tensor", ["expansion.weight", "local_attention_norm.running_var", "output_norm.bias"])
    @pytest.mark.parametrize("how", ["in place", "data", "data assigned", "detached", "numpy", "in inference mode"])
    def test_edits(self, refinement, tensor, how):
        value = refinement.state_dict(keep_vars=True)[tensor]
        if how == "in place":
            value.mul_(2)
        elif how == "data":
            value.data.mul_(2)
        elif how == "data assigned":
            value.data = value.data * 2
        elif how == "detached":
            value.detach().mul_(2)
        elif how == "numpy":
            value.numpy()[:] *= 2
        else:
            with torch.inference_mode():
                value.mul_(2)
        self.check(refinement)

    def test_loading_moving_copying(self, refinement):
        refinement.load_state_dict({k: v * 1.5 for k, v in refinement.state_dict().items()})
        self.check(refinement)
        with torch.no_grad():
            blocked_refine(refinement.train(), make_maps())
        self.check(refinement.eval())
        for copied in (copy.deepcopy(refinement), pickle.loads(pickle.dumps(refinement))):
            copied.output_norm.weight.mul_(3)
            self.check(copied)
        self.check(refinement)
        self.check(refinement.double())
        refinement.float().load_state_dict(make_refinement(ratio=3).state_dict(), assign=True)
        self.check(refinement.requires_grad_(False))

    def test_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            refinement = make_refinement().eval()
        with torch.inference_mode():
            maps = make_maps()
            before = blocked_refine(refinement, maps)
            refinement.reduction.weight.mul_(2)
            after = blocked_refine(refinement, maps)
            assert_close(after, eager_refine(refinement, maps))
        assert not torch.equal(before, after)
