"""Images become the same patches as one operation, some images at a time, as they do module by module."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from refiner_hf import (
    embeddings_refiner,
    native_convolution_refiner,
    stem_inference_refiner,
)
from refiner_hf.native_convolution_refiner import convolves, native_convolve

from .conftest import assert_close
from .test_native import needs_compiler


def make_convolution(channels: int = 32, filters: int = 64) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, filters, 3, padding=1).requires_grad_(False)


@pytest.fixture
def patch_embeddings(tiny_model):
    """With statistics that norms can't be without."""
    module = tiny_model(image_size=(32, 48)).refiner.embeddings.patch_embeddings.eval()
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            for vector, low in ((each.weight, 0.5), (each.bias, -1), (each.running_mean, -1), (each.running_var, 0.5)):
                vector.data.uniform_(low, low + 1)
    return module


@pytest.fixture
def calls(monkeypatch):
    """What the operation and the C++ function were called with; the function also with the smallest images."""
    monkeypatch.setattr(native_convolution_refiner, "_PAYS_FROM", 1)
    names = []
    for module, name in ((embeddings_refiner, "embed_patches"), (stem_inference_refiner, "native_convolve")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, run=run: names.append(name) or run(*args))
    return names


def images(batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 48, generator=torch.Generator().manual_seed(0)).to(dtype)


@needs_compiler
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (5, 4), (13, 17), (40, 33)])
@pytest.mark.parametrize("channels, filters", [(32, 64), (64, 128), (16, 48), (48, 16)])
def test_convolution(size, channels, filters):
    convolution = make_convolution(channels, filters)
    inputs = torch.randn(2, channels, *size)
    exact = nn.functional.relu(convolution.double()(inputs.double()))
    convolution.float()
    for given in (inputs, inputs.contiguous(memory_format=torch.channels_last)):
        ours = native_convolve(given, convolution.weight, convolution.bias)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours.double(), exact, 1e-5)


@needs_compiler
@pytest.mark.usefixtures("four_threads")
def test_convolution_by_several_threads():
    convolution, inputs = make_convolution(), torch.randn(3, 32, 30, 41)
    ours = native_convolve(inputs, convolution.weight, convolution.bias)
    assert_close(ours, nn.functional.relu(convolution(inputs)), 1e-5)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_seen(value):
    convolution, inputs = make_convolution(), torch.randn(2, 32, 8, 8)
    inputs[0, 3, 4, 4] = value
    ours = native_convolve(inputs, convolution.weight, convolution.bias)
    assert not ours[0].isfinite().all() and ours[1].isfinite().all()


@needs_compiler
def test_rounding_errors_are_of_the_size_of_a_plain_convolution():
    # As a convolution gets them of the one before.
    convolution, inputs = make_convolution(64, 128), torch.randn(1, 64, 56, 56).relu()
    exact = nn.functional.relu(convolution.double()(inputs.double()))
    convolution.float()
    ours = native_convolve(inputs, convolution.weight, convolution.bias)
    plain = nn.functional.relu(convolution(inputs))
    assert (ours - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


@needs_compiler
def test_what_the_function_leaves_to_torch():
    def asked(batch=1, channels=32, filters=64, kernel=3, side=64, dtype=torch.float32) -> bool:
        weight = torch.randn(filters, channels, kernel, kernel, dtype=dtype)
        return convolves(torch.randn(batch, channels, side, side, dtype=dtype), weight)

    assert asked() and asked(batch=8, side=16)
    assert not asked(side=7)  # too little
    assert not asked(kernel=5) and not asked(channels=3) and not asked(filters=40) and not asked(dtype=torch.bfloat16)


@pytest.mark.parametrize("at_once", [1, 32 * 48, 2 * 32 * 48, 10**6])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_operation(patch_embeddings, calls, monkeypatch, batch, at_once):
    monkeypatch.setattr(stem_inference_refiner, "_PIXELS", at_once)
    expected = patch_embeddings(images(batch))  # with gradients, module by module
    assert not calls
    with torch.no_grad():
        ours = patch_embeddings(images(batch))
    assert calls[0] == "embed_patches" and calls.count("embed_patches") == 1
    assert_close(ours, expected, 1e-5)


def test_no_image(patch_embeddings):
    with torch.no_grad():
        assert patch_embeddings(images(0)).shape == patch_embeddings(images(1))[:0].shape


@needs_compiler
def test_some_images_at_a_time(patch_embeddings, calls, monkeypatch):
    monkeypatch.setattr(stem_inference_refiner, "_PIXELS", 2 * 32 * 48)
    with torch.no_grad():
        patch_embeddings(images(5))
    assert calls.count("native_convolve") == 2 * 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_other_types(patch_embeddings, calls, dtype, tolerance):
    patch_embeddings.to(dtype)
    expected = patch_embeddings(images(dtype=dtype))
    with torch.no_grad():
        ours = patch_embeddings(images(dtype=dtype))
    assert calls == ["embed_patches"] and ours.dtype == dtype
    assert_close(ours, expected, tolerance)


def test_a_changed_weight_is_seen(patch_embeddings, calls):
    with torch.no_grad():
        before = patch_embeddings(images())
        for each in (patch_embeddings.stem.convolution2.weight, patch_embeddings.stem.convolution3_norm.bias):
            each.data.add_(0.1)
        after = patch_embeddings(images())
    assert_close(after, patch_embeddings(images()), 1e-5)
    assert not torch.allclose(before, after, atol=1e-3) and calls.count("embed_patches") == 2


@pytest.mark.parametrize("module", ["stem", "stem.convolution3", "stem.convolution1_norm", "projection"])
def test_hooks_are_called(patch_embeddings, calls, module):
    seen = []
    patch_embeddings.get_submodule(module).register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        ours = patch_embeddings(images())
    assert len(seen) == 1 and not calls
    assert_close(ours, patch_embeddings(images()), 1e-5)


@pytest.mark.parametrize("padding, settings", [(2, dict(dilation=2)), (1, dict(padding_mode="circular")), (0, {})])
def test_convolutions_of_another_kind(patch_embeddings, calls, padding, settings):
    """One without padding makes smaller images."""
    stem = patch_embeddings.stem
    stem.convolution3 = nn.Conv2d(64, 128, 3, padding=padding, bias=False, **settings)
    pixels = torch.randn(2, 3, 36, 36) if padding == 0 else images(2)
    expected = patch_embeddings(pixels)
    with torch.no_grad():
        assert_close(patch_embeddings(pixels), expected, 1e-5)
    assert not calls


def test_weights_that_are_divided_among_devices(patch_embeddings, calls):
    class Divided(nn.Parameter):
        pass

    stem = patch_embeddings.stem
    stem.convolution2.weight = Divided(stem.convolution2.weight.data)
    with torch.no_grad():
        patch_embeddings(images())
    assert not calls


@pytest.mark.parametrize("what", ["training", "autocast", "gradients"])
def test_module_by_module(patch_embeddings, calls, what):
    patch_embeddings.train(what == "training")
    before = patch_embeddings.stem.convolution1_norm.running_mean.clone()
    with torch.set_grad_enabled(what == "gradients"), torch.autocast("cpu", torch.bfloat16, what == "autocast"):
        ours = patch_embeddings(images())
    assert not calls and ours.dtype == (torch.bfloat16 if what == "autocast" else torch.float32)
    assert torch.equal(before, patch_embeddings.stem.convolution1_norm.running_mean) == (what != "training")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_compilers_are_told(patch_embeddings, calls, dtype):
    stem = patch_embeddings.to(dtype).stem
    weights = [*(convolution.weight for convolution, _ in stem.steps), patch_embeddings.projection.weight]
    biases = [*(norm.bias for _, norm in stem.steps), patch_embeddings.projection.bias]
    weights, biases = ([each.detach() for each in some] for some in (weights, biases))
    arguments = (images(dtype=dtype), weights, biases, [2, 1, 1])
    torch.library.opcheck(torch.ops.refiner_hf.embed_patches, arguments)


def test_operations_are_counted(patch_embeddings):
    counted = []
    for inference in (True, False):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(not inference):
            patch_embeddings(images())
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
