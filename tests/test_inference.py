"""What a CPU computes in another way without gradients is the same; a module that must be called is."""

import pytest
import torch
from torch import nn

from refiner_hf import inference_refiner
from refiner_hf.inference_refiner import call_linear, call_linear_and_activation, linear

from .conftest import LAYOUTS, assert_close


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def products(monkeypatch):
    """How often oneDNN's product ran, also with the smallest matrices."""
    monkeypatch.setattr(inference_refiner, "_PAYS_FROM", 1)
    ran, run = [], inference_refiner._product
    if run is None:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(inference_refiner, "_product", lambda *args: ran.append(args[3]) or run(*args))
    return ran


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 3])
def test_a_model_answers_alike_with_and_without_gradients(tiny_model, layout, images, products):
    model = tiny_model(attention_types=LAYOUTS[layout], use_dense_head=True).eval()
    with torch.inference_mode():
        fast = model(IMAGES[:images]).logits
    assert {"gelu", "none"} == set(products)
    products.clear()
    assert_close(fast, model(IMAGES[:images]).logits, 1e-5)
    assert not products


def test_shapes_and_types(products):
    weight, bias = torch.randn(5, 7), torch.randn(5)
    with torch.no_grad():
        assert linear(torch.randn(2, 0, 7), weight, bias).shape == (2, 0, 5) and not products
    for shape in [(7,), (2, 7), (2, 3, 7)]:
        inputs = torch.randn(shape)
        for each in (bias, None):
            with torch.no_grad():
                expected = nn.functional.linear(inputs, weight, each)
                assert_close(linear(inputs, weight, each), expected)
                assert_close(linear(inputs, weight, each, gelu=True), nn.functional.gelu(expected))
    assert len(products) == 12
    products.clear()
    inputs = torch.randn(2, 7)
    with torch.no_grad():
        assert_close(linear(inputs.mT.contiguous().mT, weight.mT.contiguous().mT, bias), inputs @ weight.mT + bias)
        assert linear(inputs.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(inputs, weight, bias).dtype == torch.bfloat16
    assert linear(inputs, weight.requires_grad_(), bias).requires_grad
    assert not products


def test_small_products_are_left_to_torch(products, monkeypatch):
    monkeypatch.undo()
    ran, run = [], inference_refiner._product
    monkeypatch.setattr(inference_refiner, "_product", lambda *args: ran.append(args[0].shape) or run(*args))
    with torch.no_grad():
        for tokens in (17, 400):
            linear(torch.randn(1, tokens, 96), torch.randn(300, 96), None)
    assert ran == [(1, 400, 96)]


@pytest.mark.parametrize("how", ["hook", "pre-hook", "wrapped", "subclass", "other activation"])
def test_modules_that_must_be_called(how, products):
    module, activation = nn.Linear(4, 4), inference_refiner.GELUActivation()
    inputs = torch.randn(2, 4)
    if how == "hook":
        module.register_forward_hook(lambda module, args, output: 2 * output)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif how == "wrapped":
        forward = module.forward
        module.forward = lambda hidden: 2 * forward(hidden)
    elif how == "subclass":
        module = type("Adapted", (nn.Linear,), {"forward": lambda self, hidden: 2 * hidden})(4, 4)
    else:
        activation = nn.SiLU()
    with torch.no_grad():
        assert torch.equal(call_linear_and_activation(module, activation, inputs), activation(module(inputs)))
        assert not products
        if how != "other activation":
            assert torch.equal(call_linear(module, inputs), module(inputs)) and not products


def test_without_onednn(tiny_model, monkeypatch):
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(IMAGES).logits
        monkeypatch.setattr(inference_refiner, "_product", None)
        assert_close(model(IMAGES).logits, expected, 1e-5)
