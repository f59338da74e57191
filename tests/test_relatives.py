"""Relatives of the refinement: each against its formula, with padding, as an adapter and in a Refiner."""

import copy

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModel

from refiner_hf import RefinementAdapterConfig, RefinerConfig, RefinerForImageClassification, RefinerModel, refine
from refiner_hf.demo.rendering import VisitorState, weights_of
from refiner_hf.encoder_attention_refiner import attend
from refiner_hf.inspection.analysis import analyze
from refiner_hf.inspection.attention_views import APPLIED, BEFORE, view_attention
from refiner_hf.inspection.map_metrics import layer_similarity
from refiner_hf.inspection.networks import Network
from refiner_hf.inspection.pictures import plot_heads, plot_overview, plot_weights
from refiner_hf.refinements_refiner import make_refinement
from refiner_hf.relatives_refiner import RefinerFeatureConvolution, RefinerNoReduction, RefinerTalkingHeads

from .conftest import assert_close
from .encoders import LENGTHS, disturb, inputs_of, make_encoder, padded_texts, real_tokens
from .test_adapter import adapted, answers, train


KINDS = {
    "no_reduction": RefinerNoReduction,
    "talking_heads": RefinerTalkingHeads,
    "feature_convolution": RefinerFeatureConvolution,
}
HEADS, WIDTH, TOKENS, RATIO = 4, 6, 7, 2


@pytest.fixture
def attention():
    """An attention module's query, key and value, and its bias of positions."""
    torch.manual_seed(4)
    query, key, value = (torch.randn(3, HEADS, TOKENS, WIDTH, dtype=torch.float64) for _ in range(3))
    return query, key, value, torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)


def randomised(kind: str, **fields) -> torch.nn.Module:
    config = RefinerConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, expansion_ratio=RATIO, refinement=kind,
        num_hidden_layers=1, attention_types=["refined"], accumulate_attention=False, **fields,
    )  # fmt: skip
    torch.manual_seed(5)
    refinement = make_refinement(config)
    assert type(refinement) is KINDS[kind]
    for parameter in refinement.parameters():
        torch.nn.init.normal_(parameter)
    return refinement.double().eval()


class TestFormulas:
    def attend(self, refinement, attention, **options):
        query, key, value, bias = attention
        return attend(torch.nn.Identity().eval(), refinement, query, key, value, None, position_bias=bias, **options)

    def plain_scores(self, attention):
        query, key, _, bias = attention
        return torch.einsum("bhqd,bhkd->bhqk", query, key) / WIDTH**0.5 + bias

    def test_talking_heads(self, attention):
        refinement = randomised("talking_heads")
        mixed = torch.einsum("gh,bhqk->bgqk", refinement.scores_mixing, self.plain_scores(attention)).softmax(-1)
        maps = torch.einsum("gh,bhqk->bgqk", refinement.maps_mixing, mixed)
        output, attentions = self.attend(refinement, attention)
        assert_close(attentions, maps, 1e-12)
        assert_close(output, torch.einsum("bhqk,bhkd->bqhd", maps, attention[2]), 1e-12)

    @pytest.mark.parametrize("kernel", [3, 5])
    def test_feature_convolution(self, attention, kernel):
        refinement = randomised("feature_convolution", refinement_kernel_size=kernel)
        weight = refinement.kernels.view(HEADS, WIDTH, kernel)
        value, reach = attention[2], kernel // 2
        convolved = torch.zeros_like(value)
        for token in range(TOKENS):
            for offset in range(-reach, reach + 1):
                if 0 <= token + offset < TOKENS:
                    convolved[:, :, token] += weight[:, :, offset + reach] * value[:, :, token + offset]
        output, attentions = self.attend(refinement, attention)
        assert_close(attentions, self.plain_scores(attention).softmax(-1), 1e-12)
        assert_close(output, torch.einsum("bhqk,bhkd->bqhd", attentions, convolved), 1e-12)

    @pytest.mark.parametrize("training", [True, False])
    def test_no_reduction(self, attention, training):
        """An expanded head weights its share of the values of the head that it belongs to."""
        refinement = randomised("no_reduction").train(training)
        plain = self.plain_scores(attention).softmax(-1)
        twin = copy.deepcopy(refinement)
        hidden = twin.expansion_norm(twin.expansion(plain)).clamp(0, 6)
        hidden = twin.local_attention_norm(twin.local_attention(hidden)).clamp(0, 6)
        expanded = twin.reduction_norm(hidden)
        for number in range(HEADS * RATIO):
            expanded[:, number] += plain[:, number // RATIO]
        expanded = twin.output_norm(expanded)
        output, attentions = self.attend(refinement, attention)
        assert attentions.shape == (3, HEADS * RATIO, TOKENS, TOKENS)
        assert_close(attentions, expanded, 1e-12)
        share = WIDTH // RATIO
        for number in range(HEADS * RATIO):
            places = slice(number % RATIO * share, (number % RATIO + 1) * share)
            theirs = expanded[:, number] @ attention[2][:, number // RATIO, :, places]
            assert_close(output[:, :, number // RATIO, places], theirs, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
class TestPadding:
    def model(self, kind):
        model = make_encoder("bert")
        disturb(refine(model, inputs_of("bert"), refinement=kind, expansion_ratio=2))
        return model.double()

    @torch.no_grad()
    def test_alone_and_in_batches(self, kind):
        model = self.model(kind)
        alone = [model(**padded_texts(n, numbers=(i,))).last_hidden_state[0] for i, n in enumerate(LENGTHS)]
        for to in (9, 30):
            for ours, theirs in zip(model(**padded_texts(to)).last_hidden_state, alone):
                assert_close(ours[: len(theirs)], theirs, 1e-12)

    def test_trained_with_more_padding(self, kind):
        model, results = self.model(kind), []
        for to in (9, 17):
            twin, inputs = copy.deepcopy(model).train(), padded_texts(to)
            twin(**inputs).last_hidden_state[real_tokens(inputs)].pow(3).sum().backward()
            results.append({name: p.grad for name, p in twin.named_parameters() if ".refinement." in name})
            results[-1] |= {name: buffer for name, buffer in twin.named_buffers() if "running" in name}
        ours, theirs = results
        assert ours and all(gradient is not None for gradient in ours.values())
        for name in ours:
            assert_close(ours[name], theirs[name], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
class TestAdapter:
    def test_learns_and_becomes_a_model_of_its_own(self, kind, tmp_path):
        base = make_encoder("vit", head=True)
        expected = answers("vit", base)
        model = adapted("vit", base, refinement=kind, expansion_ratio=4)
        assert_close(answers("vit", model), expected, 1e-5)
        train("vit", model)
        trained = answers("vit", model)
        assert (trained - expected).abs().max() > 1e-3
        whole = model.merge_and_unload()
        assert torch.equal(answers("vit", whole), trained)
        whole.save_pretrained(tmp_path)
        again = type(whole).from_pretrained(tmp_path).eval()
        assert torch.equal(answers("vit", again), trained)

    def test_beside_half_precision(self, kind):
        model = adapted("bert", make_encoder("bert", head=True).bfloat16(), refinement=kind, expansion_ratio=2)
        assert answers("bert", model).dtype == torch.bfloat16


def test_after_maps_without_reduction_comes_no_other_adapter():
    model = adapted("bert", modules_to_save=None)
    expected = answers("bert", model)
    unreduced = dict(inputs=inputs_of("bert"), refinement="no_reduction", expansion_ratio=2)
    model.add_adapter("more maps", RefinementAdapterConfig(**unreduced))
    model.base_model.set_adapter(["default", "more maps"])
    assert_close(answers("bert", model), expected, 1e-5)
    model.base_model.set_adapter(["more maps", "default"])
    with pytest.raises(ValueError, match="Make it the last of the active adapters"):
        answers("bert", model)
    model.base_model.set_adapter("more maps")
    with pytest.raises(ValueError, match="Make it the last of the active adapters"):
        model.add_adapter("third", RefinementAdapterConfig(inputs=inputs_of("bert")))
    assert_close(answers("bert", model), expected, 1e-5)


class TestRefiner:
    """As a Refiner's own refinement."""

    def config(self, kind, tiny_config, **fields):
        layers = dict(num_hidden_layers=3, attention_types=["refined", "plain", "refined"])
        options = layers | dict(refinement=kind, expansion_ratio=2, accumulate_attention=False) | fields
        return tiny_config(**options)

    @pytest.mark.parametrize("kind", KINDS)
    def test_learns_and_is_saved(self, kind, tiny_config, tmp_path):
        torch.manual_seed(0)
        model = RefinerForImageClassification(self.config(kind, tiny_config))
        pixels = torch.randn(3, 3, *model.config.image_height_width)
        model.train()(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
        own = [parameter for name, parameter in model.named_parameters() if ".refinement." in name]
        assert own and all(parameter.grad.abs().sum() > 0 for parameter in own)
        disturb(model.eval())
        model.save_pretrained(tmp_path)
        again, info = RefinerForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            assert torch.equal(again(pixels).logits, model(pixels).logits)

    @pytest.mark.parametrize("kind", ["talking_heads", "feature_convolution"])
    def test_starts_plain(self, kind, tiny_config):
        """Without a norm, random weights would begin with scores or values of another size."""
        torch.manual_seed(0)
        model = RefinerModel(self.config(kind, tiny_config)).eval()
        plain = RefinerModel(self.config(kind, tiny_config, attention_types=["plain"] * 3)).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        pixels = torch.randn(2, 3, *model.config.image_height_width)
        with torch.no_grad():
            assert_close(model(pixels).last_hidden_state, plain(pixels).last_hidden_state, 1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_has_only_its_modules(self, kind, tiny_config):
        torch.manual_seed(0)
        model = RefinerModel(self.config(kind, tiny_config)).eval()
        disturb(model)
        pixels = torch.randn(2, 3, *model.config.image_height_width)
        with torch.no_grad():
            expected = model(pixels).last_hidden_state
            for name in ("eager", "blocked", "triton"):
                model.set_refine_implementation(name)
                assert torch.equal(model(pixels).last_hidden_state, expected)

    def test_refused(self, tiny_config):
        with pytest.raises(StrictDataclassError, match="mixes scores.*'shared_refined' layers have none"):
            tiny_config(refinement="talking_heads")
        with pytest.raises(StrictDataclassError, match="more maps than there are heads.*accumulate_attention=False"):
            self.config("no_reduction", tiny_config, accumulate_attention=True)
        with pytest.raises(StrictDataclassError, match="cosine_regularizer_weight=0"):
            self.config("no_reduction", tiny_config, cosine_regularizer_weight=0.1)
        with pytest.raises(StrictDataclassError, match="expansion_ratio must divide it, got 5"):
            self.config("no_reduction", tiny_config, expansion_ratio=5)

    def test_refused_for_an_encoder(self):
        model = make_encoder("vit")
        with pytest.raises(ValueError, match="a head's width .8. among its expanded maps"):
            refine(model, inputs_of("vit"), refinement="no_reduction")
        assert type(model).__name__ == "ViTModel"


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_looked_at(kind, layer, tmp_path):
    """Beside layers with fewer maps, too."""
    from transformers import ViTImageProcessorPil

    model = make_encoder("vit")
    disturb(refine(model, inputs_of("vit"), refinement=kind, expansion_ratio=2, layers=[layer]))
    network = Network(kind, model, ViTImageProcessorPil(size={"height": 32, "width": 32}))
    pictures = [Image.effect_noise((40, 40), 60).convert("RGB") for _ in range(4)]
    found = analyze(network, pictures, batch_size=4)
    assert np.isfinite(np.array(found["layers"]["cosine"]["mean"])).all()
    entropies = found["before"]["entropy"]["mean"]
    assert entropies[1 - layer] is None and entropies[layer] > 0
    views = view_attention(network, pictures[0])
    heads = 8 if kind == "no_reduction" else 4
    stages = views.layers[layer].stages
    assert stages[APPLIED].shape[1] == heads and stages[BEFORE].shape[1] == 4 == views.num_heads
    plot_heads(views, layer, 0, tmp_path / "heads.png")
    plot_overview(views, 0, tmp_path / "overview.png")
    plot_weights(views.layers[layer].refinement, layer, tmp_path / "weights.png")
    state = VisitorState(None, views, views)
    for head in (0, 3):
        own = stages[APPLIED][-1, head * heads // 4 : (head + 1) * heads // 4].mean(0)
        np.testing.assert_array_equal(weights_of(state, APPLIED, layer, head), own)


def test_an_expanded_head_is_compared_with_its_own():
    torch.manual_seed(0)
    few = torch.rand(2, 3, 5, 5).softmax(-1)
    for maps in ([few, few.repeat_interleave(4, 1)], [few.repeat_interleave(4, 1), few]):
        cosines, _ = layer_similarity(maps)
        assert_close(cosines, torch.ones(2, 2, 2), 1e-5)


def test_weights_that_are_not_finite():
    model = make_encoder("vit")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="answers to these inputs aren't finite"):
        refine(model, inputs_of("vit"), refinement="talking_heads")
    assert type(model).__name__ == "ViTModel"


def test_loaded_by_an_auto_class(tmp_path):
    model = make_encoder("bert")
    disturb(refine(model, inputs_of("bert"), refinement="talking_heads"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        ours, theirs = (
            each(**inputs_of("bert")).last_hidden_state for each in (model, AutoModel.from_pretrained(tmp_path))
        )
    assert torch.equal(ours, theirs)
