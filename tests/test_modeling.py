import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForImageClassification

from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerModel
from refiner_hf.attention_refiner import REFINE_IMPLEMENTATIONS, RefinerMapRefinement
from refiner_hf.normalization_refiner import RefinerBatchNorm2d

from .conftest import LAYOUTS, assert_close


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("refinement", ["expansion_convolution", "convolution", "expansion"])
class TestEveryKind:
    def test_trains_and_round_trips(self, tiny_model, layout, refinement, tmp_path):
        model = tiny_model(attention_types=LAYOUTS[layout], refinement=refinement, use_dense_head=True)
        outputs = model.train()(IMAGES, labels=torch.tensor([0, 1, 2]))
        outputs.loss.backward()
        assert outputs.patch_logits.shape == (3, 16, 5)
        for name, parameter in model.named_parameters():
            # A shared layer hands the map before it on; the last plain layers' maps all weight values.
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

        model.eval().save_pretrained(tmp_path)
        loaded, info = RefinerForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)

    def test_outputs_have_the_documented_shapes(self, tiny_model, layout, refinement):
        model = tiny_model(attention_types=LAYOUTS[layout], refinement=refinement).eval()
        outputs = model(IMAGES, output_hidden_states=True, output_attentions=True)
        assert outputs.logits.shape == (3, 5)
        assert [h.shape for h in outputs.hidden_states] == [(3, 17, 24)] * 5
        assert [a.shape for a in outputs.attentions] == [(3, 4, 17, 17)] * 4


def test_attentions_are_the_maps_that_weight_the_values(tiny_model):
    model = tiny_model(attention_types=LAYOUTS["mixed"]).eval()
    inputs = {}
    for i, layer in enumerate(model.refiner.layers):
        layer.attention.v_proj.register_forward_hook(lambda m, a, o, i=i: inputs.setdefault(("v", i), o))
        layer.attention.o_proj.register_forward_hook(lambda m, a, o, i=i: inputs.setdefault(("o", i), a[0]))
    attentions = model(IMAGES, output_attentions=True).attentions
    for i, attention_map in enumerate(attentions):
        value = inputs["v", i].reshape(3, 17, 4, 6).transpose(1, 2)
        assert_close((attention_map @ value).transpose(1, 2).reshape(3, 17, 24), inputs["o", i])


def test_a_layers_output_is_the_next_hidden_state(tiny_model):
    model = tiny_model().eval().refiner
    outputs = model(IMAGES, output_hidden_states=True)
    assert_close(model.norm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert_close(outputs.last_hidden_state[:, 0], outputs.pooler_output)


def test_dense_head_joins_in_evaluation_and_comes_apart_in_training(tiny_model):
    model = tiny_model(use_dense_head=True, dense_logits_weight=0.25).eval()
    tokens = model.refiner(IMAGES).last_hidden_state
    patches = model.dense_classifier(tokens[:, 1:])
    outputs = model(IMAGES)
    assert outputs.patch_logits is None
    assert_close(outputs.logits, model.classifier(tokens[:, 0]) + 0.25 * patches.max(1).values)
    assert model.train()(IMAGES).patch_logits.shape == (3, 16, 5)


def test_initialisation(tiny_config):
    config = tiny_config(hidden_size=120, num_attention_heads=12, layerscale_value=1e-5)
    torch.manual_seed(0)
    model = RefinerForImageClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lambda1"):
            assert (parameter == 1e-5).all()
        elif "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif parameter.ndim == 4:
            # PyTorch's default: uniform within 1 / sqrt(inputs).
            bound = parameter[0].numel() ** -0.5
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name
        elif name.endswith("bias") and "projection" not in name:
            assert (parameter == 0).all(), name
        elif parameter.ndim >= 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
    # The 1x1 convolution over 12 heads is the one that matters.
    assert model.refiner.layers[1].attention.refinement.expansion.weight.std().item() == pytest.approx(0.17, rel=0.1)


def test_drop_path_grows_linearly(tiny_config):
    model = RefinerModel(tiny_config(drop_path_rate=0.3))
    rates = [getattr(layer.drop_path, "p", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("image_size, patch_size", [((16, 24), 4), (20, (4, 10)), ((8, 12), (2, 6))])
@pytest.mark.parametrize("stem", [True, False])
def test_other_image_and_patch_sizes(tiny_model, image_size, patch_size, stem):
    model = tiny_model(image_size=image_size, patch_size=patch_size, use_conv_stem=stem, num_channels=2).eval()
    height, width = model.config.image_height_width
    outputs = model(torch.randn(1, 2, height, width), output_attentions=True)
    tokens = 1 + math.prod(model.config.patch_grid)
    assert outputs.attentions[0].shape == (1, 4, tokens, tokens)


class TestBadInput:
    def test_wrong_size(self, tiny_model):
        with pytest.raises(ValueError, match="16x20.*takes 16x16"):
            tiny_model()(torch.randn(1, 3, 16, 20))

    def test_wrong_channels(self, tiny_model):
        with pytest.raises(ValueError, match="1 channels, the model takes 3"):
            tiny_model()(torch.randn(1, 1, 16, 16))

    def test_wrong_rank(self, tiny_model):
        with pytest.raises(ValueError, match="shape"):
            tiny_model()(torch.randn(3, 16, 16))

    @pytest.mark.parametrize(
        "images", [IMAGES.mul(255).byte(), IMAGES.tolist(), "photo.jpg"], ids=["bytes", "list", "text"]
    )
    def test_no_floating_point_numbers(self, tiny_model, images):
        with pytest.raises(ValueError, match="pixel_values must be a floating point tensor"):
            tiny_model()(images)

    def test_no_labels(self, tiny_config):
        with pytest.raises(ValueError, match="at least one label"):
            RefinerForImageClassification(tiny_config(num_labels=0))

    def test_no_images(self, tiny_model):
        with pytest.raises(ValueError, match="pixel_values"):
            tiny_model()()

    def test_size_that_is_no_multiple_of_the_patch(self, tiny_model):
        with pytest.raises(ValueError, match="multiples"):
            tiny_model()(torch.randn(1, 3, 18, 16), interpolate_pos_encoding=True)


class TestPositions:
    def embedded(self, golden):
        config = RefinerConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=(14 * 4, 14 * 4), patch_size=4
        )
        model = RefinerModel(config)
        model.embeddings.position_embeddings.data = golden("position_embeddings")["position_embeddings_14x14"].clone()
        return model

    @pytest.mark.parametrize("grid", [(24, 24), (28, 20)])
    def test_interpolated_in_forward_as_the_reference_does(self, golden, grid):
        model = self.embedded(golden).eval()
        expected = golden("position_embeddings")[f"forward_resize_bilinear_align_corners.{grid[0]}x{grid[1]}"]
        images = torch.zeros(1, 3, grid[0] * 4, grid[1] * 4)
        patches = model.embeddings.patch_embeddings(images)
        tokens = torch.cat([model.embeddings.cls_token, patches], 1)
        assert_close(model.embeddings(images, interpolate_pos_encoding=True) - tokens, expected)

    def test_interpolation_at_the_own_size_changes_nothing(self, tiny_model):
        model = tiny_model().eval()
        assert torch.equal(model(IMAGES, interpolate_pos_encoding=True).logits, model(IMAGES).logits)

    @pytest.mark.parametrize("side", [10, 24, 28])
    @pytest.mark.parametrize("how", ["keyword", "config", "auto class"])
    def test_resized_when_loading(self, golden, tmp_path, side, how):
        self.embedded(golden).save_pretrained(tmp_path)
        if how == "keyword":
            model = RefinerModel.from_pretrained(tmp_path, image_size=4 * side)
        elif how == "config":
            config = RefinerConfig.from_pretrained(tmp_path)
            config.image_size = 4 * side
            model = RefinerModel.from_pretrained(tmp_path, config=config)
        else:
            model = AutoModel.from_pretrained(tmp_path, image_size=4 * side)
        expected = golden("position_embeddings")[f"checkpoint_resize_bicubic.{side}x{side}"]
        assert_close(model.embeddings.position_embeddings, expected)
        assert model.config.image_size == 4 * side
        assert not model.training
        with torch.no_grad():
            model(torch.zeros(1, 3, 4 * side, 4 * side))
        model.save_pretrained(tmp_path / "resized")
        assert RefinerModel.from_pretrained(tmp_path / "resized").config.image_size == 4 * side

    def test_with_the_configuration_of_another_folder(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path / "a")
        tiny_model(image_size=24).config.save_pretrained(tmp_path / "b")
        loaded = RefinerForImageClassification.from_pretrained(tmp_path / "a", config=str(tmp_path / "b"))
        assert loaded.config.image_size == 24 and loaded.refiner.embeddings.position_embeddings.shape[1] == 37

    def test_what_is_given_is_kept(self, tiny_model, tiny_config, tmp_path):
        """The caller's configuration, and whether positions are trained."""
        tiny_model().save_pretrained(tmp_path)
        config = tiny_config(image_size=24)
        model = RefinerForImageClassification.from_pretrained(tmp_path, config=config)
        assert config.image_size == 24 and model.config.image_size == 24
        model.refiner.embeddings.position_embeddings.requires_grad_(False)
        model.set_image_size(16)
        assert not model.refiner.embeddings.position_embeddings.requires_grad

    def test_it_says_so(self, tiny_model, monkeypatch):
        from refiner_hf import modeling_refiner

        said = []
        monkeypatch.setattr(modeling_refiner.logger, "warning", said.append)
        model = tiny_model()
        model.set_image_size(16)
        assert not said
        model.set_image_size((24, 32))
        assert "4x4 to 6x8" in said[0]
        assert model(torch.randn(1, 3, 24, 32)).logits.shape == (1, 5)

    def test_a_size_that_does_not_fit_changes_nothing(self, tiny_model):
        model = tiny_model().eval()
        before = model(IMAGES).logits
        with pytest.raises(StrictDataclassError, match="multiple"):
            model.set_image_size(18)
        assert torch.equal(model(IMAGES).logits, before)


class TestRefineImplementation:
    def test_by_configuration_and_keyword(self, tiny_model, tiny_config, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        given = tiny_config()
        for model in (
            RefinerForImageClassification(tiny_config(refine_implementation="eager")),
            RefinerForImageClassification.from_pretrained(tmp_path, refine_implementation="eager"),
            RefinerForImageClassification.from_pretrained(tmp_path, config=given, refine_implementation="eager"),
            RefinerForImageClassification.from_pretrained(tmp_path, image_size=32, refine_implementation="eager"),
            AutoModelForImageClassification.from_pretrained(tmp_path, refine_implementation="eager"),
            AutoModel.from_pretrained(tmp_path, refine_implementation="eager"),
            AutoModel.from_config(given, refine_implementation="eager"),
            copy.deepcopy(tiny_model(refine_implementation="eager")),
        ):
            chosen = [m.config.refine_implementation for m in model.modules() if isinstance(m, RefinerMapRefinement)]
            assert chosen == ["eager"] * 2
        assert given.refine_implementation == "auto"  # of the caller, and not changed

    def test_it_is_what_runs(self, tiny_model, monkeypatch):
        ran = []
        for name, each in REFINE_IMPLEMENTATIONS.items():
            refine = lambda *args, name=name, each=each: ran.append(name) or each.refine(*args)  # noqa: E731
            monkeypatch.setitem(REFINE_IMPLEMENTATIONS, name, each._replace(refine=refine))
        model = tiny_model(refine_implementation="eager").eval()
        with torch.no_grad():
            model(IMAGES)
            model.set_refine_implementation("blocked")
            model(IMAGES)
        assert ran == ["eager", "eager", "blocked", "blocked"]

    def test_auto_is_the_default_and_nothing_is_saved(self, tiny_model, tmp_path):
        model = tiny_model()
        assert model.config.refine_implementation == "auto"
        model.set_refine_implementation("eager")
        assert model.config.refine_implementation == model.refiner.config.refine_implementation == "eager"
        model.save_pretrained(tmp_path)
        assert "refine_implementation" not in (tmp_path / "config.json").read_text()

    def test_unknown_names_are_refused(self, tiny_model, tiny_config):
        with pytest.raises(ValueError, match="'auto', 'eager'"):
            tiny_model().set_refine_implementation("fast")
        with pytest.raises(ValueError, match="'auto', 'eager'"):
            RefinerModel(tiny_config(refine_implementation="fast"))


class TestAttnImplementation:
    def test_sdpa_is_eager(self, tiny_model, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr("refiner_hf.modeling_refiner.logger.warning_once", said.append)
        model = tiny_model().eval()
        model.save_pretrained(tmp_path)
        sdpa = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert "the same as 'eager'" in said[0]
        assert (model.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
        ours, theirs = (m(IMAGES, output_attentions=True) for m in (model, sdpa))
        assert_close(ours.logits, theirs.logits)
        assert_close(ours.attentions[-1], theirs.attentions[-1])
        sdpa.set_attn_implementation("eager")
        sdpa.config.output_attentions = True
        assert len(sdpa(IMAGES).attentions) == len(model.config.attention_types)

    @pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
    def test_others_make_no_map(self, tiny_model, tmp_path, name):
        tiny_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="take 'eager' or 'sdpa'"):
            AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation=name)


class TestCheckpointing:
    """Recomputing a layer in the backward pass changes nothing: loss, gradients, running statistics."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_same_step(self, tiny_model, layout, reentrant):
        plain = tiny_model(attention_types=LAYOUTS[layout]).train()
        checkpointed = copy.deepcopy(plain)
        checkpointed.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        results = []
        for model in (plain, checkpointed):
            # With reentrant checkpointing some input must require a gradient.
            model.enable_input_require_grads() if reentrant else None
            loss = model(IMAGES, labels=torch.tensor([0, 1, 2])).loss
            loss.backward()
            results.append((loss, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
        (loss, gradients, buffers), (other_loss, other_gradients, other_buffers) = results
        assert torch.equal(loss, other_loss)
        for name, gradient in gradients.items():
            assert_close(other_gradients[name], gradient, 1e-5, name)
        assert buffers
        for name, buffer in buffers.items():
            assert torch.equal(other_buffers[name], buffer), name


class TestNorms:
    def test_frozen_norms_stay_in_evaluation(self, tiny_model):
        model = tiny_model()
        model.freeze_norms()
        model.train()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(IMAGES)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        assert model.refiner.layers[0].training
        model.freeze_norms(False)
        assert all(m.training for m in model.modules() if isinstance(m, RefinerBatchNorm2d))

    def test_batch_norm_equals_torchs(self):
        torch.manual_seed(0)
        ours, theirs = RefinerBatchNorm2d(4), torch.nn.BatchNorm2d(4)
        for mode in (True, False):
            ours.train(mode), theirs.train(mode)
            x = torch.randn(2, 4, 5, 5)
            assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.running_var, theirs.running_var)


class TestRandomness:
    """Stochastic depth and dropout: where the reference has them, and in training only."""

    def branches(self, model):
        seen = []
        model.refiner.layers[1].drop_path.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
        torch.manual_seed(0)
        model(torch.randn(64, 3, 16, 16))
        return seen

    def test_drop_path_drops_whole_branches_of_single_images(self, tiny_model):
        model = tiny_model(drop_path_rate=0.9).train()
        branches = self.branches(model)
        assert len(branches) == 2  # attention and MLP
        rate = model.refiner.layers[1].drop_path.p
        for before, after in branches:
            dropped = (after == 0).flatten(1).all(1)
            assert 0 < dropped.sum() < 64
            assert_close(after[~dropped], before[~dropped] / (1 - rate))
        before, after = self.branches(model.eval())[-1]
        assert torch.equal(before, after)

    @pytest.mark.parametrize("attention_type", ["plain", "refined"])
    def test_attention_dropout_comes_before_the_refinement(self, tiny_model, attention_type):
        model = tiny_model(attention_types=[attention_type] * 4, attention_probs_dropout_prob=0.5).train()
        dropped = []
        model.refiner.layers[0].attention.dropout.register_forward_hook(lambda m, a, output: dropped.append(output))
        attentions = model(IMAGES, output_attentions=True).attentions
        assert 0.3 < (dropped[0] == 0).float().mean() < 0.7
        if attention_type == "plain":
            assert torch.equal(attentions[0], dropped[0])
        else:
            assert (attentions[0] == 0).float().mean() < 0.05

    def test_hidden_dropout_is_on_embeddings_and_both_branches(self, tiny_model):
        model = tiny_model(hidden_dropout_prob=0.5).train()
        shares = []
        for module in (model.refiner.embeddings, model.refiner.layers[0]):
            module.dropout.register_forward_hook(lambda m, a, output: shares.append((output == 0).float().mean()))
        model(IMAGES)
        assert len(shares) == 3 and all(0.3 < share < 0.7 for share in shares)


def test_options_that_change_the_network(tiny_model):
    with_sum, without = (
        tiny_model(attention_types=LAYOUTS["plain"], accumulate_attention=flag)
        .eval()(IMAGES, output_attentions=True)
        .attentions
        for flag in (True, False)
    )
    assert_close(without[1].sum(-1), torch.ones(3, 4, 17))
    assert_close(with_sum[1].sum(-1), torch.full((3, 4, 17), 1 + 6**-0.5))
    attention = tiny_model(qkv_bias=False).refiner.layers[0].attention
    assert attention.q_proj.bias is None and attention.v_proj.bias is None and attention.o_proj.bias is not None


def test_fields_changed_after_construction_are_checked(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for wrong, says in (
        (dict(num_hidden_layers=6), "4 entries for num_hidden_layers=6"),
        (dict(attention_types=["shared_refined"] * 4), "before it"),
        (dict(image_size=18), "multiple"),
    ):
        with pytest.raises(StrictDataclassError, match=says):
            RefinerForImageClassification.from_pretrained(tmp_path, **wrong)


class TestLabels:
    def test_reset_classifier(self, tiny_model):
        model = tiny_model(use_dense_head=True)
        model.reset_classifier(["cat", "dog"])
        assert model.config.num_labels == 2 and model.config.label2id == {"cat": 0, "dog": 1}
        outputs = model.train()(IMAGES, labels=torch.tensor([0, 1, 1]))
        assert outputs.logits.shape == (3, 2) and outputs.patch_logits.shape == (3, 16, 2)
        assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.4)
        assert (model.classifier.bias == 0).all()
        for wrong in ([], ["cat", "cat"]):
            with pytest.raises(ValueError, match="different names"):
                model.reset_classifier(wrong)


def test_autocast_trains(tiny_model):
    model = tiny_model(use_dense_head=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IMAGES, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(tiny_model, training):
    """Through dynamo and autograd; what the code generator then makes of it is torch's own business."""
    types = ["plain", "shared_refined", "refined"]
    model = tiny_model(num_hidden_layers=3, attention_types=types, use_dense_head=True, token_mixing=True)
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    expected = model(IMAGES, labels=labels).loss
    torch.manual_seed(0)
    loss = compiled(IMAGES, labels=labels).loss
    assert_close(loss, expected)
    loss.backward()


def test_copies_and_pickles(tiny_model, tmp_path):
    model = tiny_model(use_dense_head=True).eval()
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(IMAGES).logits, model(IMAGES).logits)
