"""A kind of refinement is one class: whatever asks about refinements asks it."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from refiner_hf import (
    RefinerConfig,
    RefinerForImageClassification,
    RefinerImageProcessor,
    configuration_refiner,
    refine,
)
from refiner_hf.attention_refiner import REFINE_IMPLEMENTATIONS, RefinerMapRefinement, WeightsPanel
from refiner_hf.benchmarking.contenders import contender_names
from refiner_hf.cards.architecture import describe_network
from refiner_hf.choices_refiner import REFINE_IMPLEMENTATION_CHOICES, REFINEMENT_NAMES
from refiner_hf.inspection.attention_views import APPLIED, BEFORE, view_attention
from refiner_hf.inspection.networks import Network
from refiner_hf.inspection.pictures import plot_weights
from refiner_hf.refinements_refiner import REFINEMENTS, make_refinement

from .conftest import assert_close


class Scaled(RefinerMapRefinement):
    """A new kind, as a reader would write one: each head times a number."""

    @classmethod
    def describe(cls, config):
        return f"scaled, {config.num_attention_heads} numbers"

    def build(self, config):
        self.scale = nn.Conv2d(config.num_attention_heads, config.num_attention_heads, 1, bias=False, groups=4)

    def refine(self, attention_map, mask=None):
        return self.scale(attention_map)

    def start_as_identity(self):
        nn.init.ones_(self.scale.weight)

    def middle_maps(self, attention_map):
        return "after nothing", attention_map

    def weights_panels(self):
        return [WeightsPanel("scales", self.scale.weight[:, :, 0, 0], "", "head")]


@pytest.fixture
def scaled(monkeypatch):
    """The two places where a new kind is named."""
    monkeypatch.setitem(REFINEMENTS, "scaled", Scaled)
    monkeypatch.setattr(configuration_refiner, "REFINEMENT_NAMES", [*REFINEMENT_NAMES, "scaled"])


@pytest.fixture
def model(scaled, tiny_config):
    torch.manual_seed(0)
    return RefinerForImageClassification(tiny_config(refinement="scaled"))


def test_every_name_has_its_class():
    assert list(REFINEMENTS) == REFINEMENT_NAMES


def test_every_implementation_can_be_chosen():
    assert REFINE_IMPLEMENTATION_CHOICES == ("auto", *REFINE_IMPLEMENTATIONS)


def test_a_new_kind_learns_and_is_saved(model, tmp_path):
    pixels = torch.randn(3, 3, *model.config.image_height_width)
    refinement = next(module for module in model.modules() if isinstance(module, Scaled))
    before = refinement.scale.weight.detach().clone()
    model.train()(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(refinement.scale.weight, before)
    model.eval().save_pretrained(tmp_path)
    loaded = RefinerForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.refinement == "scaled"
    assert_close(loaded(pixels).logits, model(pixels).logits)


def test_a_new_kind_runs_eagerly(model):
    """It has no faster form, and nothing breaks."""
    refinement = next(module for module in model.modules() if isinstance(module, Scaled)).eval()
    maps = torch.rand(2, 4, 5, 5)
    expected = refinement.output_norm(refinement.scale(maps))
    for name in ("auto", "blocked", "triton", "eager"):
        refinement.config.refine_implementation = name
        torch.testing.assert_close(refinement(maps), expected)


def test_a_new_kind_is_described_and_drawn(model, tmp_path, monkeypatch):
    assert "| refinement | scaled, 4 numbers |" in describe_network(model)
    height, width = model.config.image_height_width
    processor = RefinerImageProcessor(size={"height": height, "width": width})
    views = view_attention(Network("scaled", model.eval(), processor), Image.new("RGB", (20, 20), "red"))
    assert views.stages == [BEFORE, "after nothing", APPLIED]
    seen = views.layers[views.refining_layers[0]]
    np.testing.assert_array_equal(seen.stages["after nothing"], seen.stages[BEFORE])
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    plot_weights(seen.refinement, 1, tmp_path / "weights.png")
    shown = figures[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, seen.refinement.scale.weight.detach()[:, :, 0, 0])


def test_an_encoder_gets_a_new_kind(scaled):
    torch.manual_seed(0)
    size = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    vit = ViTForImageClassification(ViTConfig(**size, intermediate_size=32, num_labels=3)).eval()
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before = vit(images).logits
        refine(vit, {"pixel_values": images}, refinement="scaled")
        torch.testing.assert_close(vit(images).logits, before, atol=1e-5, rtol=1e-4)
    assert sum(isinstance(module, Scaled) for module in vit.modules()) == 2


def test_re_attention():
    """DeepViT's Norm(Theta^T A), the heads mixed by a matrix, is one convolution that looks at no neighbour."""
    config = RefinerConfig(
        hidden_size=16, num_attention_heads=4, refinement="convolution", refinement_kernel_size=1
    )  # fmt: skip
    refinement = make_refinement(config).train()
    maps = torch.randn(3, 4, 7, 7).softmax(-1)
    theta = refinement.convolution.weight[:, :, 0, 0].T
    mixed = torch.einsum("hg,bhqk->bgqk", theta, maps)
    norm = nn.BatchNorm2d(4, eps=config.batch_norm_eps)
    torch.testing.assert_close(refinement(maps), norm(mixed), atol=1e-5, rtol=1e-4)


def test_a_kind_that_is_not_listed_is_refused():
    with pytest.raises(Exception, match="refinement is 'scaled'; choose among expansion_convolution, convolution, ex"):
        RefinerConfig(refinement="scaled")


def test_the_benchmark_has_the_implementations_of_the_registry(monkeypatch):
    implementation = REFINE_IMPLEMENTATIONS["blocked"]._replace(devices=("cuda",), fastest_from={})
    monkeypatch.setitem(REFINE_IMPLEMENTATIONS, "new", implementation)
    assert "new" in contender_names("op", "cuda") and "new" not in contender_names("op", "cpu")
    assert contender_names("op", "cpu") == ["eager", "native", "blocked", "auto"]
