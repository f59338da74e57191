"""Re-estimated statistics of batch norms: those of one batch of all images, however these are divided."""

import copy

import pytest
import torch
from torch import nn

from refiner_hf import RefinerForImageClassification, RefinerForMaskedImageModeling
from refiner_hf.normalization_refiner import RefinerBatchNorm2d
from refiner_hf.utils import norm_statistics
from refiner_hf.utils.norm_statistics import reestimate_norm_statistics

from ..conftest import LAYOUTS, assert_close


def statistics(model) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def of_one_batch(model, **inputs) -> dict[str, torch.Tensor]:
    """The naive reference: one training step's worth of all images at once, with momentum 1."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, RefinerBatchNorm2d):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        model(**inputs)
    return statistics(model)


def images(count: int = 13, side: int = 16) -> torch.Tensor:
    pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels[-1] = -1  # a black one, alone in a last batch: it must not weigh more than the others
    return pixels


@pytest.mark.parametrize("refinement", ["expansion_convolution", "expansion", "convolution"])
@pytest.mark.parametrize("layout", ["released", "refine_every_layer", "mixed"])
def test_equal_those_of_one_batch(layout, refinement, tiny_model):
    model = tiny_model(
        attention_types=LAYOUTS[layout], refinement=refinement, use_dense_head=True, layerscale_value=1.0
    ).double()  # fmt: skip
    expected = of_one_batch(model, pixel_values=images())
    for size in (1, 6, 12, 13):
        trial = copy.deepcopy(model).train()
        assert reestimate_norm_statistics(trial, images().split(size)) == 13
        for name, buffer in statistics(trial).items():
            # (torch adds the variance of one image up in another order than that of several.)
            assert_close(buffer, expected[name], 1e-6, f"{name}, batches of {size}")


def test_one_image_alone_in_the_last_batch_in_float32(tiny_model):
    """65 images, the last of them black: in batches of 64 the logits were 0.42 off those of one batch."""
    model, pixels = tiny_model(layerscale_value=1.0), images(65).float()
    logits = []
    for size in (65, 64, 7, 1):
        trial = copy.deepcopy(model)
        reestimate_norm_statistics(trial, pixels.split(size))
        with torch.no_grad():
            logits.append(trial.eval()(pixels).logits)
    for other in logits[1:]:
        assert_close(other, logits[0], 1e-4)


@pytest.mark.parametrize(
    "options", [{"use_conv_stem": False}, {"attention_types": LAYOUTS["plain"]}, {"image_size": [16, 24]}]
)
def test_other_networks(options, tiny_model):
    model = tiny_model(**options).double()
    pixels = torch.randn(5, 3, 16, 24 if "image_size" in options else 16, dtype=torch.float64)
    expected = of_one_batch(model, pixel_values=pixels)
    reestimate_norm_statistics(model, pixels.split(2))
    for name, buffer in statistics(model).items():
        assert_close(buffer, expected[name], 1e-6, name)


def test_with_masks_and_labels(tiny_config):
    model = RefinerForMaskedImageModeling(tiny_config()).double()
    pixels, masks = images(), torch.rand(13, 16) < 0.5
    expected = of_one_batch(model, pixel_values=pixels, bool_masked_pos=masks)
    pieces = [{"pixel_values": p, "bool_masked_pos": m} for p, m in zip(pixels.split(4), masks.split(4))]
    assert reestimate_norm_statistics(model, pieces) == 13
    for name, buffer in statistics(model).items():
        assert_close(buffer, expected[name], 1e-6, name)


def test_a_module_that_is_no_transformer():
    """Without layers there is nothing to keep: every norm is run up to from the beginning."""
    norm = nn.BatchNorm2d
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1), norm(2), nn.Flatten(), nn.BatchNorm1d(392)
    )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.unused = network.double(), norm(2).double()

        def forward(self, pixel_values):
            return self.network(pixel_values)

    model = Model()
    expected = copy.deepcopy(model).train()
    for module in expected.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    expected(images())
    reestimate_norm_statistics(model, images().split(5))
    for name, buffer in statistics(model).items():
        assert_close(buffer, statistics(expected)[name], 1e-6, name)


def test_half_precision(tiny_model):
    model = tiny_model()
    expected = of_one_batch(model, pixel_values=images().float())
    half = copy.deepcopy(model).bfloat16()
    reestimate_norm_statistics(half, images().bfloat16().split(4))
    for name, buffer in statistics(half).items():
        assert buffer.dtype == torch.bfloat16 and buffer.isfinite().all()
        if "convolution1_norm" in name:  # further on the rounding of what comes before adds up
            assert_close(buffer.float(), expected[name], 2e-2, name)


def test_what_is_kept_beyond_a_limit_waits_in_the_machines_memory(tiny_model, monkeypatch):
    """On a CPU that is the same place, so here it is seen by who is asked to move."""
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.nbytes) or cpu(tensor))
    model = tiny_model()
    reestimate_norm_statistics(model, images(32).float().split(8))
    assert not moved
    monkeypatch.setattr(norm_statistics, "_ON_DEVICE", 100_000)
    reestimate_norm_statistics(model, images(32).float().split(8))
    assert moved and sum(moved) < 3 * 32 * 4 * (17 * 24 + 4 * 17**2)


def test_layers_compute_again_afterwards(tiny_model):
    model = tiny_model()
    for batches in (images().float().split(4), [torch.randn(2, 3, 16, 16), torch.randn(2, 1, 16, 16)]):
        try:
            reestimate_norm_statistics(model, batches)
        except ValueError:
            pass
        assert not [module for module in model.modules() if "forward" in module.__dict__]
        assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    with torch.no_grad():
        one, other = model.eval()(images().float()).logits, model(torch.zeros(13, 3, 16, 16)).logits
    assert (one - other).abs().max() > 1e-6


def test_no_random_numbers_and_no_weights(tiny_model):
    model = tiny_model(drop_path_rate=0.5, hidden_dropout_prob=0.5, token_mixing=True, use_dense_head=True).train()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tracked = {name: buffer.clone() for name, buffer in model.named_buffers() if "num_batches" in name}
    state = torch.random.get_rng_state()
    reestimate_norm_statistics(model, images().float().split(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(model.get_buffer(name), count) for name, count in tracked.items())
    assert isinstance(model, RefinerForImageClassification) and model.training


def test_an_offloaded_forward_comes_back(tiny_model):
    """accelerate puts a `forward` of its own into modules whose weights it keeps elsewhere."""
    model = tiny_model()
    layer = model.refiner.layers[0]
    own, calls = layer.forward, []
    layer.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    wrapped = layer.forward
    reestimate_norm_statistics(model, images().float().split(4))
    assert layer.forward is wrapped and calls
