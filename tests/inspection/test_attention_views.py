import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTImageProcessorPil, ViTModel

from refiner_hf import RefinerImageProcessor
from refiner_hf.inspection.attention_views import (
    APPLIED,
    BEFORE,
    CLASS_TOKEN,
    name_of,
    view_attention,
)
from refiner_hf.inspection.layer_views import refined_maps
from refiner_hf.inspection.networks import Network

from ..conftest import LAYOUTS, assert_close


EXPANDED, LOCAL = "after attention expansion", "after distributed local attention"


GRID = (4, 6)  # patches of the tiny network at 16 x 24
PATCHES = [(0, 0), (2, 5)]
PLACES = [0, 1, 1 + 2 * 6 + 5]  # of the class token and of those patches among the tokens
SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, patch_size=4)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))


@pytest.fixture
def network(tiny_model):
    def make(**overrides) -> Network:
        model = tiny_model(image_size=[16, 24], **overrides).eval()
        return Network("tiny", model, RefinerImageProcessor(size={"height": 16, "width": 24}, crop_pct=1.0))

    return make


def pixels_of(network, image):
    return network.processor(image, return_tensors="pt").pixel_values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_the_maps(network, image, layout):
    network = network(attention_types=LAYOUTS[layout])
    views = view_attention(network, image, PATCHES)
    assert views.queries == [CLASS_TOKEN, *PATCHES] and views.grid == GRID
    maps = network.model(pixels_of(network, image), output_attentions=True).attentions
    for seen, attention_map in zip(views.layers, maps, strict=True):
        expected = attention_map[0, :, PLACES, 1:].transpose(0, 1).reshape(3, 4, *GRID)
        assert_close(torch.from_numpy(seen.stages[APPLIED]), expected.detach())
    assert views.refining_layers == [i for i, kind in enumerate(LAYOUTS[layout]) if kind != "plain"]


def test_stages_of_a_refinement(network, image):
    network = network()
    views = view_attention(network, image, PATCHES)
    for layer, (before, _) in refined_maps(network.model, pixels_of(network, image)).items():
        seen = views.layers[layer]
        assert list(seen.stages) == [BEFORE, LOCAL, APPLIED]
        expected = before[0, :, PLACES, 1:].transpose(0, 1).reshape(3, 4, *GRID)
        assert_close(torch.from_numpy(seen.stages[BEFORE]), expected)
        with torch.no_grad():
            expanded = seen.refinement.expanded_maps(before)
        expected = expanded[0, :, PLACES, 1:].transpose(0, 1).reshape(3, 12, *GRID)
        assert_close(torch.from_numpy(seen.stages[LOCAL]), expected)
    assert list(views.layers[0].stages) == [APPLIED]


@pytest.mark.parametrize(
    "refinement, stages", [("convolution", [BEFORE, APPLIED]), ("expansion", [BEFORE, EXPANDED, APPLIED])]
)
def test_other_refinements(network, image, refinement, stages):
    assert list(view_attention(network(refinement=refinement), image).layers[1].stages) == stages


def test_rollout(network, image):
    network = network()
    for layer in (1, 3):  # as after training, when refined weights have either sign
        torch.nn.init.normal_(network.model.refiner.layers[layer].attention.refinement.output_norm.bias, std=0.1)
    views = view_attention(network, image, PATCHES)
    through = np.eye(25)
    for seen, attention_map in zip(
        views.layers, network.model(pixels_of(network, image), output_attentions=True).attentions
    ):
        weights = attention_map[0].detach().abs().mean(0).numpy()
        through = (0.5 * weights / weights.sum(1, keepdims=True) + 0.5 * np.eye(25)) @ through
        assert np.allclose(through.sum(1), 1)
        np.testing.assert_allclose(seen.rollout[0], through[0, 1:].reshape(GRID), atol=1e-6)
        for shown, place, patch in zip(seen.rollout[1:], PLACES[1:], PATCHES):
            expected = through[place, 1:].reshape(GRID).copy()
            expected[patch] = 0
            expected[patch] = expected.max()  # else a patch would see nothing but itself
            np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_the_picture_is_what_the_network_got(network, image):
    picture = view_attention(network(), image).picture
    assert picture.shape == (16, 24, 3)
    np.testing.assert_allclose(picture, np.asarray(image) / 255, atol=1e-5)


def test_a_vit(image):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=16, **SMALL), add_pooling_layer=False)
    model.set_attn_implementation("eager")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    views = view_attention(Network("vit", model.eval(), processor), image, [(1, 2)])
    pixels = processor(image, return_tensors="pt").pixel_values
    expected = (
        model(pixels, output_attentions=True).attentions[1][0, :, [0, 7], 1:].transpose(0, 1).reshape(2, 3, 4, 4)
    )
    assert_close(torch.from_numpy(views.layers[1].stages[APPLIED]), expected.detach())
    assert views.refining_layers == [] and list(views.layers[1].stages) == [APPLIED]


def test_without_a_class_token_the_middle_looks(image):
    model = SiglipVisionModel(SiglipVisionConfig(image_size=16, attn_implementation="eager", **SMALL)).eval()
    network = Network("siglip", model, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    assert view_attention(network, image).queries == [(2, 2)]
    assert view_attention(network, image, [(0, 3)]).queries == [(0, 3)]


@pytest.mark.parametrize("patch", [(4, 0), (0, 6), (-1, 0)])
def test_a_patch_that_is_not_there(network, image, patch):
    with pytest.raises(ValueError, match=rf"no patch {patch[0] + 1},{patch[1] + 1}; there are 4 rows and 6 columns"):
        view_attention(network(), image, [patch])


def test_names():
    assert [name_of(CLASS_TOKEN), name_of((0, 4))] == ["the class token", "patch 1,5"]


def test_many_threads_at_once(tiny_model):  # noqa: C901 - the functions inside count
    """Some look, some use the network as it is: everybody gets what they would get alone, and no hook is left."""
    processor = RefinerImageProcessor(size={"height": 16, "width": 16})
    network = Network("tiny", tiny_model(layerscale_value=1.0).eval(), processor)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in range(4)]
    pixels = [processor(image, return_tensors="pt").pixel_values for image in images]
    with torch.no_grad():
        logits = [network.model(each).logits for each in pixels]
    alone = [view_attention(network, image) for image in images]
    wrong = []

    def look(number: int) -> None:
        for _ in range(8):
            views = view_attention(network, images[number])
            for layer, expected in zip(views.layers, alone[number].layers, strict=True):
                for stage, maps in layer.stages.items():
                    np.testing.assert_allclose(maps, expected.stages[stage], atol=1e-6)
            torch.testing.assert_close(views.logits, logits[number][0])

    def use(number: int) -> None:
        for _ in range(25):
            with torch.no_grad():
                torch.testing.assert_close(network.model(pixels[number]).logits, logits[number])

    def kept(task, number):
        try:
            task(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=kept, args=(task, number)) for task in (look, look, use) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong, wrong[0]
    assert not [m for m in network.model.modules() if m._forward_hooks or m._forward_pre_hooks]
