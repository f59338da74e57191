"""What is shown of layers at work, beside what the networks give themselves when asked for all maps and tokens."""

import weakref

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    YolosConfig,
    YolosModel,
)

from refiner_hf import (
    RefinerBackbone,
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerImageProcessor,
    RefinerModel,
)
from refiner_hf.inspection.layer_views import LayerView, refined_maps, watch_layers
from refiner_hf.inspection.networks import Network, classes_of_layers, open_network

from ..conftest import LAYOUTS, assert_close, save_with_processor


SMALL = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
REFINEMENTS = ("expansion_convolution", "expansion", "convolution")
REFINERS = (RefinerModel, RefinerForImageClassification, RefinerForMaskedImageModeling, RefinerBackbone)
TINY_VIT = dict(
    image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
)
OTHERS = {
    "ViT": (ViTModel, ViTConfig, {}),
    "ViT with classifier": (ViTForImageClassification, ViTConfig, {}),
    "DeiT": (DeiTModel, DeiTConfig, {}),
    "DINOv2": (Dinov2Model, Dinov2Config, {}),
    "DINOv2 with registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {}),
    "BEiT": (BeitModel, BeitConfig, dict(use_relative_position_bias=True)),
    "SigLIP": (SiglipVisionModel, SiglipVisionConfig, {}),
}


def other(name: str = "ViT", attention: str = "eager", **fields) -> PreTrainedModel:
    model_class, config_class, more = OTHERS[name]
    torch.manual_seed(0)
    return model_class._from_config(
        config_class(**{**TINY_VIT, **more, **fields}), attn_implementation=attention
    ).eval()


def watch(model: PreTrainedModel) -> list[LayerView]:
    views = []
    watch_layers(model, IMAGES, views.append)
    return views


def hooks_of(model: nn.Module) -> list[int]:
    return [
        number
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for number in hooks
    ]


def check_against_outputs(model: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = model(IMAGES, output_attentions=True, output_hidden_states=True)
    views = watch(model)
    assert len(views) == len(expected.attentions) == len(expected.hidden_states) - 1
    for i, view in enumerate(views):
        assert view.index == i
        assert_close(view.applied, expected.attentions[i], what=f"map {i}")
        assert_close(view.entering, expected.hidden_states[i], what=f"entering {i}")
        assert_close(view.leaving, expected.hidden_states[i + 1], what=f"leaving {i}")
        assert not view.applied.requires_grad and not view.leaving.requires_grad
        if i > 0:
            assert torch.equal(view.entering, views[i - 1].leaving)


class TestRefiner:
    @pytest.fixture
    def make(self, tiny_config):
        def make(model_class: type = RefinerModel, **fields) -> PreTrainedModel:
            torch.manual_seed(0)
            return model_class(tiny_config(**fields)).eval()

        return make

    @pytest.mark.parametrize("model_class", REFINERS)
    @pytest.mark.parametrize("refinement", REFINEMENTS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equals_outputs(self, make, layout, refinement, model_class):
        check_against_outputs(make(model_class, attention_types=LAYOUTS[layout], refinement=refinement))

    @pytest.mark.parametrize("fields", [dict(accumulate_attention=False), dict(expansion_ratio=1)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equals_outputs_of_other_variants(self, make, layout, fields):
        check_against_outputs(make(attention_types=LAYOUTS[layout], **fields))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_before_and_refinement(self, make, layout):
        model = make(attention_types=LAYOUTS[layout])
        for view, layer, kind in zip(watch(model), model.layers, LAYOUTS[layout]):
            if kind == "plain":
                assert view.before is None and view.refinement is None
            else:
                assert view.refinement is layer.attention.refinement
                scale = layer.attention.scaling if kind == "shared_refined" else 1
                with torch.no_grad():
                    assert_close(view.refinement(view.before, scale), view.applied)

    def test_maps_before_are_softmaxes(self, make):
        views = watch(make(attention_types=LAYOUTS["refine_every_layer"], accumulate_attention=False))
        for view in views:
            assert_close(view.before.sum(-1), torch.ones(2, 4, 17))

    def test_shared_maps_are_those_of_the_layer_before(self, make):
        views = watch(make())
        assert torch.equal(views[1].before, views[0].applied) and torch.equal(views[3].before, views[2].applied)

    @pytest.mark.parametrize("ratio", [1, 3])
    @pytest.mark.parametrize("layout", ["released", "refine_every_layer", "mixed"])
    def test_middle_maps_are_what_the_modules_see(self, make, layout, ratio):
        model = make(attention_types=LAYOUTS[layout], expansion_ratio=ratio)
        model.set_refine_implementation("eager")
        seen = []
        hooks = [
            module.register_forward_hook(lambda module, args, output: seen.append(nn.functional.relu6(output)))
            for name, module in model.named_modules()
            if name.endswith("local_attention_norm")
        ]
        views = watch(model)
        for hook in hooks:
            hook.remove()
        refining = [view for view in views if view.refinement is not None]
        assert len(refining) == len(seen) > 0
        for view, expected in zip(refining, seen):
            assert expected.shape == (2, 4 * ratio, 17, 17)
            assert_close(view.middle_maps()[1], expected)

    def test_without_convolution_it_is_what_expansion_gives(self, make):
        model = make(refinement="expansion")
        view = watch(model)[1]
        refinement = model.layers[1].attention.refinement
        with torch.no_grad():
            expected = nn.functional.relu6(refinement.expansion_norm(refinement.expansion(view.before)))
        assert_close(view.middle_maps()[1], expected)

    def test_where_there_are_no_middle_maps(self, make):
        assert [view.middle_maps() for view in watch(make(attention_types=LAYOUTS["plain"]))] == [None] * 4
        assert [view.middle_maps() for view in watch(make(refinement="convolution"))] == [None] * 4

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_network_is_as_it_was(self, make, layout):
        model = make(RefinerForImageClassification, attention_types=LAYOUTS[layout])
        with torch.no_grad():
            before = model(IMAGES)
        watch(model)
        assert hooks_of(model) == []
        with torch.no_grad():
            after = model(IMAGES)
        assert after.attentions is None and torch.equal(after.logits, before.logits)

    def test_hooks_are_gone_after_an_error(self, make):
        model = make(RefinerForImageClassification)
        seen = []

        def look(view: LayerView) -> None:
            seen.append(view.index)
            if view.index == 2:
                raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            watch_layers(model, IMAGES, look)
        assert seen == [0, 1, 2] and hooks_of(model) == []
        with pytest.raises(ValueError, match="channels"):
            watch_layers(model, IMAGES[:, :2], look)
        assert hooks_of(model) == []
        assert len(watch(model)) == 4


@pytest.mark.parametrize("name", OTHERS)
class TestOtherTransformers:
    def test_equals_outputs(self, name):
        check_against_outputs(other(name))

    def test_nothing_is_refined(self, name):
        for view in watch(other(name)):
            assert view.before is None and view.refinement is None and view.middle_maps() is None

    def test_hooks_are_gone(self, name):
        model = other(name)
        model(IMAGES, output_attentions=True, output_hidden_states=True)  # transformers keeps some of its own
        before = hooks_of(model)
        watch(model)
        assert hooks_of(model) == before
        with pytest.raises(ZeroDivisionError):
            watch_layers(model, IMAGES, lambda view: 1 / view.index)
        assert hooks_of(model) == before


class TestNothingIsKept:
    """Maps of a deep network would fill the memory if they were all alive at once."""

    def check(self, model: PreTrainedModel, passed_on: list[int | None]) -> None:
        """`passed_on`: for each layer the one whose map it may still need."""
        maps, tokens = [], []

        def look(view: LayerView) -> None:
            assert {i for i, ref in enumerate(maps) if ref() is not None} <= {passed_on[view.index]}
            assert {i for i, ref in enumerate(tokens) if ref() is not None} <= {view.index - 1}
            maps.append(weakref.ref(view.applied))
            tokens.append(weakref.ref(view.leaving))

        watch_layers(model, IMAGES, look)
        assert len(maps) == len(passed_on)
        assert [ref() for ref in maps] == [None] * len(maps)

    @pytest.mark.parametrize(
        "layout, passed_on",
        [
            ("released", [None, 0, 0, 2]),
            ("refine_every_layer", [None, 0, 1, 2]),
            ("plain", [None, 0, 1, 2]),
            ("mixed", [None, 0, 0, 0]),
        ],
    )
    def test_by_a_refiner(self, tiny_config, layout, passed_on):
        model = RefinerModel(tiny_config(attention_types=LAYOUTS[layout])).eval()
        self.check(model, passed_on)
        model.config.output_attentions = model.config.output_hidden_states = True  # which would keep them
        self.check(model, passed_on)

    def test_by_a_vit(self):
        self.check(other(num_hidden_layers=5), [None] * 5)


class TestModelsWithoutMaps:
    @pytest.mark.parametrize(
        "model",
        [
            SwinModel(SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=2)),
            ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
            # Tokens of its own come after the patches.
            YolosModel(YolosConfig(image_size=[16, 16], patch_size=4, num_detection_tokens=2, **SMALL)),
        ],
        ids=["Swin", "ResNet", "YOLOS"],
    )
    def test_are_refused(self, model):
        for refuse in (classes_of_layers, lambda model: watch_layers(model, IMAGES, print)):
            with pytest.raises(ValueError, match=f"{type(model).__name__} isn't a transformer over patches.*ViT"):
                refuse(model)
        assert hooks_of(model) == []

    def test_fewer_tokens_than_patches(self):
        model = ViTMAEModel(ViTMAEConfig(image_size=16, patch_size=4, attn_implementation="eager", **SMALL)).eval()
        with pytest.raises(ValueError, match="ViTMAEModel has fewer tokens than patches"):
            watch(model)

    def test_attention_that_makes_no_map(self):
        model = other(attention="sdpa")
        with pytest.raises(ValueError, match="ViTModel show no maps.*attn_implementation='eager'"):
            watch(model)
        assert hooks_of(model) == []


class TestOpenNetwork:
    @pytest.mark.parametrize("model_class", REFINERS[:3])
    def test_a_refiner(self, tiny_config, tmp_path, model_class):
        torch.manual_seed(0)
        model = model_class(tiny_config()).train()
        save_with_processor(model, tmp_path / "mine")
        network = open_network(str(tmp_path / "mine"))
        assert network.name == "mine" and network.device.type == "cpu"
        assert not network.model.training and network.grid(IMAGES) == (4, 4)
        assert isinstance(network.processor, RefinerImageProcessor)
        assert isinstance(network.model, model_class) or model_class is RefinerForMaskedImageModeling
        for view, expected in zip(watch(network.model), watch(model.eval()), strict=True):
            assert_close(view.applied, expected.applied)

    @pytest.mark.parametrize("name", ["ViT", "ViT with classifier"])
    def test_a_vit(self, tmp_path, name):
        model = other(name, attention="sdpa")
        model.save_pretrained(tmp_path / "vit")
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
        network = open_network(f"{tmp_path / 'vit'}/")
        assert network.name == "vit" and type(network.model) is type(model) and not network.model.training
        for view, expected in zip(watch(network.model), watch(other(name)), strict=True):
            assert_close(view.applied, expected.applied)

    def test_a_network_of_another_kind(self, tmp_path):
        config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=2)
        SwinModel(config).save_pretrained(tmp_path / "swin")
        ViTImageProcessor().save_pretrained(tmp_path / "swin")
        with pytest.raises(ValueError, match="SwinModel isn't a transformer over patches"):
            open_network(str(tmp_path / "swin"))

    def test_no_network(self, tmp_path):
        with pytest.raises(ValueError, match="config.json of .* can't be used"):
            open_network(str(tmp_path))

    @pytest.mark.parametrize("patch, grid", [(4, (3, 6)), ([4, 8], (3, 3)), ((6, 4), (2, 6))])
    def test_grid(self, tiny_config, patch, grid):
        model = RefinerModel(tiny_config(patch_size=patch, image_size=[12, 24]))
        assert Network("a", model, None).grid(torch.zeros(1, 3, 12, 24)) == grid


class TestRefinedMaps:
    def test_are_those_before_and_after(self, tiny_model):
        model = tiny_model().eval()
        attentions = model(IMAGES, output_attentions=True).attentions
        maps = refined_maps(model, IMAGES)
        assert sorted(maps) == [1, 3]
        for layer, (before, after) in maps.items():
            assert_close(before, attentions[layer - 1])
            assert_close(after, attentions[layer])

    def test_own_maps(self, tiny_model):
        model = tiny_model(attention_types=LAYOUTS["refine_every_layer"]).eval()
        attentions = model(IMAGES, output_attentions=True).attentions
        maps = refined_maps(model, IMAGES)
        assert sorted(maps) == [0, 1, 2, 3]
        for layer, (before, after) in maps.items():
            assert_close(after, attentions[layer])
            with torch.no_grad():
                assert_close(model.refiner.layers[layer].attention.refinement(before), after)

    def test_nothing_to_see(self, tiny_model):
        model = tiny_model(attention_types=LAYOUTS["plain"]).eval()
        with pytest.raises(ValueError, match="No layer"):
            refined_maps(model, IMAGES)
        with pytest.raises(ValueError, match="No layer"):
            refined_maps(other(), IMAGES)


@pytest.mark.parametrize("layout", ["released", "refine_every_layer", "plain"])
def test_the_module_for_grad_cam(layout, tiny_model):
    """docs/look_inside.md: patches reach the class token from the last layer's first norm, from its second no more."""
    model = tiny_model(attention_types=LAYOUTS[layout], layerscale_value=1.0).eval()
    kept = {}
    for name in ("layernorm_before", "layernorm_after"):
        getattr(model.refiner.layers[-1], name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: output})
        )
    logits = model(torch.randn(2, 3, 16, 16)).logits
    before, after = torch.autograd.grad(logits[:, 1].sum(), [kept["layernorm_before"], kept["layernorm_after"]])
    assert (before[:, 1:].abs().amax(-1) > 0).all() and (after[:, 1:] == 0).all()
