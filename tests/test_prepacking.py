"""Packed weights give the same answers, follow the weights they were made of, and go with them."""

import copy
import gc

import pytest
import torch
from torch import nn

from refiner_hf import inference_refiner, native_library_refiner, prepacking_refiner
from refiner_hf.inference_refiner import linear
from refiner_hf.prepacking_refiner import prepack, prepacked, prepacked_linear

from .compilers import Graphs
from .conftest import assert_close
from .test_native import needs_compiler


pytestmark = needs_compiler
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def products(monkeypatch):
    """The shapes of the packed weights that were multiplied with, also the smallest."""
    monkeypatch.setattr(inference_refiner, "_PAYS_FROM", 1)
    shapes, run = [], prepacked_linear
    monkeypatch.setattr(
        inference_refiner, "prepacked_linear", lambda *args: shapes.append(tuple(args[1].shape)) or run(*args)
    )
    return shapes


@pytest.fixture
def model(tiny_model, products):
    return tiny_model(use_dense_head=True).eval()


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).logits


def answers_of_modules(model) -> torch.Tensor:
    return model(IMAGES).logits.detach()  # with gradients nothing is packed


def layers_of(model) -> list[nn.Module]:
    projection = model.base_model.embeddings.patch_embeddings.projection
    return [projection, *(each for each in model.base_model.modules() if isinstance(each, nn.Linear))]


@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,), (2, 3), (197,), (3, 400)])
@pytest.mark.parametrize("inputs, outputs", [(384, 64), (17, 5), (32, 130), (2500, 70)])
@pytest.mark.parametrize("gelu", [False, True])
def test_product(rows, inputs, outputs, gelu):
    hidden, weight, bias = torch.randn(*rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    kept = prepack([weight])
    for each in (bias, None):
        exact = nn.functional.linear(hidden.double(), weight.double(), None if each is None else each.double())
        ours = prepacked_linear(hidden, weight, kept[0].packed, each, gelu)
        assert ours.shape == exact.shape
        if ours.numel():
            assert_close(ours.double(), nn.functional.gelu(exact) if gelu else exact, 3e-6)


@pytest.mark.usefixtures("four_threads")
def test_several_threads():
    hidden, weight, bias = torch.randn(2, 197, 384), torch.randn(100, 384), torch.randn(100)
    kept = prepack([weight])
    assert_close(prepacked_linear(hidden, weight, kept[0].packed, bias, False), hidden @ weight.mT + bias, 1e-6)


def test_gelu_from_end_to_end():
    hidden = torch.linspace(-12, 12, 4096)[:, None]
    weight = torch.ones(1, 1)
    kept = prepack([weight])
    ours = prepacked_linear(hidden, weight, kept[0].packed, None, True)
    torch.testing.assert_close(ours.double(), nn.functional.gelu(hidden.double()), rtol=1e-6, atol=4e-7)
    for value in (float("nan"), float("inf")):
        assert not prepacked_linear(torch.full((1, 1), value), weight, kept[0].packed, None, True).isfinite().any()


def test_a_model_answers_alike(model, products):
    expected = answers_of_modules(model)
    model.prepack_weights()
    assert not products
    assert_close(answers(model), expected, 1e-5)
    assert len(products) == len(layers_of(model))
    assert answers_of_modules(model).shape == expected.shape and len(products) == len(layers_of(model))


def test_with_gradients_nothing_is_packed(model, products):
    model.prepack_weights()
    model(IMAGES).logits.sum().backward()
    assert not products and all(layer.weight.grad is not None for layer in layers_of(model))


def test_compiled(model, products):
    model.prepack_weights()
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    assert_close(answers(compiled), answers_of_modules(model), 1e-5)
    assert len(products) == len(layers_of(model))
    model.base_model.layers[0].mlp.fc1.weight.data.mul_(-1)
    assert_close(answers(compiled), answers_of_modules(model), 1e-5)


@pytest.mark.parametrize("how", ["in place", "optimizer", "state", "data", "data in place", "moving average"])
def test_a_changed_weight_is_packed_again(model, products, how):
    model.prepack_weights()
    before = answers(model)
    weights = [layer.weight for layer in layers_of(model)]
    if how == "in place":
        with torch.no_grad():
            weights[1][2, 3] += 1.0
    elif how == "optimizer":
        model(IMAGES).logits.sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    elif how == "state":
        model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})
    elif how == "data":
        weights[1].data = torch.randn_like(weights[1])
    elif how == "data in place":
        weights[0].data += torch.randn_like(weights[0])
    else:
        for weight in weights:
            weight.data.lerp_(torch.randn_like(weight), 0.1)
    after = answers(model)
    assert_close(after, answers_of_modules(model), 1e-5)
    assert not torch.allclose(before, after, atol=1e-4)


def test_after_a_change_that_cannot_be_seen_it_is_called_again(model):
    model.prepack_weights()
    weight = model.base_model.layers[0].mlp.fc1.weight
    weight.data[:, 1:] = 0
    model.prepack_weights()
    assert_close(answers(model), answers_of_modules(model), 1e-5)


def test_copies_go_with_the_model(tiny_model, products):
    gc.collect()
    before = len(prepacking_refiner._kept)
    model = tiny_model().eval()
    model.prepack_weights()
    model.prepack_weights()
    assert len(prepacking_refiner._kept) >= before + len(layers_of(model))
    del model
    gc.collect()
    assert len(prepacking_refiner._kept) == before


def test_no_image(model):
    model.prepack_weights()
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    with torch.no_grad():
        for form in (model, compiled):
            assert form(IMAGES).logits.shape[0] == 3 and form(IMAGES[:0]).logits.shape[0] == 0


def test_packing_again_leaves_one_copy(model):
    gc.collect()
    before = len(prepacking_refiner._kept)
    for _ in range(3):
        model.prepack_weights()
        model.bfloat16().float()
    model.prepack_weights()
    gc.collect()
    assert len(prepacking_refiner._kept) - before <= sum(isinstance(each, nn.Linear) for each in model.modules()) + 1
    assert_close(answers(model), answers_of_modules(model), 1e-5)


def test_parameters_may_be_swapped(model):
    model.prepack_weights()
    expected = answers(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_close(answers(model), expected, 1e-5)


def test_weights_in_the_same_memory():
    first = nn.Parameter(torch.randn(8, 4))
    kept = prepack([first, first])
    assert len(kept) == 2
    with pytest.raises(ValueError, match="two different ones lie in the same memory"):
        prepack([nn.Parameter(first.data)])
    tied = first.detach()  # whose changes count for the other
    with torch.no_grad():
        first[2, 3] += 1
    assert_close(prepacked_linear(torch.eye(4), tied, prepacked(tied), None, False), first.detach().mT)


def test_a_weight_with_dead_inputs_is_watched_elsewhere_too():
    weight = torch.randn(130, 40)
    weight[:, 0] = 0
    weight[0] = 0
    kept = prepack([weight])
    weight.data.mul_(2)
    assert_close(prepacked_linear(torch.eye(40), weight, kept[0].packed, None, False), weight.mT)


def test_a_model_with_packed_weights_is_saved_and_copied(model, tmp_path):
    model.prepack_weights()
    torch.save(model, tmp_path / "whole.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert not any(other._prepacked_weights)
        assert_close(answers(other), answers(model), 1e-5)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_other_models_and_types_have_none(model, products):
    model.prepack_weights()
    other = copy.deepcopy(model)
    assert_close(answers(other), answers_of_modules(model), 1e-5)
    assert not products
    model.double()
    with torch.no_grad():
        model(IMAGES.double())
    assert not products
    model.float()
    assert_close(answers(model), answers_of_modules(model), 1e-5)


def test_made_in_inference_mode(tiny_model, products):
    with torch.inference_mode():
        weight, hidden = torch.randn(6, 8), torch.randn(4, 8)
        [kept] = prepack([weight])
        linear(hidden, weight, None)
        weight[3, 3] += 1
        assert_close(linear(hidden, weight, None), hidden @ weight.mT, 1e-6)
    assert prepacked(weight) is kept.packed
    assert len(products) == 2


def test_without_onednn(model, monkeypatch, products):
    monkeypatch.setattr(inference_refiner, "_product", None)
    expected = answers_of_modules(model)
    model.prepack_weights()
    assert_close(answers(model), expected, 1e-5)
    assert products


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda model: model.bfloat16(), "float32"),
        (lambda model: model.double(), "torch.float64"),
        (lambda model: model.to("meta"), "meta"),
    ],
)
def test_what_cannot_be_packed(model, change, reason):
    with pytest.raises(ValueError, match=f"can't be prepacked.*{reason}"):
        change(model).prepack_weights()


def test_without_a_compiler(model, monkeypatch):
    monkeypatch.setattr(native_library_refiner, "_loaded", lambda: "there is no C++ compiler")
    with pytest.raises(ValueError, match="there is no C\\+\\+ compiler"):
        model.prepack_weights()


def test_no_plain_weight():
    with pytest.raises(ValueError, match="no plain ones"):
        prepack([])
