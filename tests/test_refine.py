"""Any encoder, refined in place."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from refiner_hf import native_library_refiner, refine
from refiner_hf.attention_refiner import REFINE_IMPLEMENTATIONS, RefinerMapRefinement
from refiner_hf.hub.code import REFINED_AUTO_MAP, add_code
from refiner_hf.normalization_refiner import RefinerBatchNorm2d
from refiner_hf.refinements_refiner import REFINEMENTS
from refiner_hf.utils.norm_statistics import reestimate_norm_statistics

from .conftest import assert_close
from .encoders import (
    ENCODERS,
    IMAGE,
    LENGTHS,
    TEXT,
    TEXT_ENCODERS,
    disturb,
    inputs_of,
    make_encoder,
    padded_texts,
    real_tokens,
)


def refinements_of(model) -> list[RefinerMapRefinement]:
    return [module for module in model.modules() if isinstance(module, RefinerMapRefinement)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ENCODERS)
class TestEveryFamily:
    def test_starts_as_the_same_function(self, family, attention):
        model, inputs = make_encoder(family, attention=attention), inputs_of(family)
        keep = real_tokens(inputs)
        with torch.no_grad():
            before = model(**inputs, output_hidden_states=True)
        assert refine(model, inputs) is model and len(refinements_of(model)) == 2
        with torch.no_grad():
            after = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert_close(after.last_hidden_state[keep], before.last_hidden_state[keep], 1e-5)
        for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
            assert_close(ours[keep], theirs[keep], 1e-5)
        assert len(after.attentions) == 2

    def test_learns_and_is_saved(self, family, attention, tmp_path):
        model, inputs = make_encoder(family, attention=attention), inputs_of(family)
        refine(model, inputs).train()
        model(**inputs).last_hidden_state[real_tokens(inputs)].square().mean().backward()
        for refinement in refinements_of(model):
            # The silent branch's norm learns first.
            for name in ("reduction_norm.weight", "output_norm.weight", "output_norm.bias"):
                assert refinement.get_parameter(name).grad.abs().sum() > 0, name
        disturb(model.eval())
        model.save_pretrained(tmp_path)
        loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info.values())
        with torch.no_grad():
            ours, theirs = (m(**inputs).last_hidden_state for m in (model, loaded))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "family, head",
    [(family, False) for family in ENCODERS]
    + [(f, True) for f, kinds in ENCODERS.items() if "For" in (kinds[3] or "")],
)
def test_loaded_from_files_of_older_names(family, head, tmp_path):
    """transformers saves a model under the names that it was loaded by; a refined one must be found again."""
    make_encoder(family, head).save_pretrained(tmp_path / "source")
    model = type(make_encoder(family, head)).from_pretrained(tmp_path / "source").eval()
    inputs = inputs_of(family)
    disturb(refine(model, inputs))
    model.save_pretrained(tmp_path / "refined")
    task = "Image" if "pixel_values" in inputs else "Sequence"
    auto = getattr(transformers, f"AutoModelFor{task}Classification" if head else "AutoModel")
    loaded, info = auto.from_pretrained(tmp_path / "refined", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


def test_dinov3_as_a_classifier(tmp_path):
    """transformers has none."""
    inputs = inputs_of("dinov3")
    make_encoder("dinov3").save_pretrained(tmp_path / "encoder")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "encoder", num_labels=3).eval()
    bare = AutoModel.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        tokens = bare(**inputs).last_hidden_state
        features = torch.cat((tokens[:, 0], tokens[:, 5:].mean(1)), 1)  # without four registers
        logits = model(**inputs).logits
        assert_close(logits, model.classifier(features), 1e-6)
        assert torch.equal(model(**inputs, return_dict=False)[0], logits)
    loss = model(**inputs, labels=torch.tensor([0, 1, 2])).loss
    assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])), 1e-6)
    model.save_pretrained(tmp_path / "classifier")
    for auto, answer in ((AutoModelForImageClassification, logits), (AutoModel, tokens)):
        with torch.no_grad():
            assert torch.equal(auto.from_pretrained(tmp_path / "classifier")(**inputs)[0], answer)
    refine(model, inputs)
    with torch.no_grad():
        assert_close(model(**inputs).logits, logits, 1e-5)
    model.save_pretrained(tmp_path / "refined")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "refined")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_map_that_weighted_the_values(family, monkeypatch):
    """`output_attentions` gives the refined maps, and what is no real pair is zero in them."""
    model, inputs = make_encoder(family), inputs_of(family)
    refine(model, inputs)
    disturb(model)
    made = []
    for refinement in refinements_of(model):
        refinement.register_forward_hook(lambda module, arguments, output: made.append(output))
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    assert len(maps) == 2 and all(torch.equal(ours, theirs) for ours, theirs in zip(maps, made, strict=True))
    keep = real_tokens(inputs)
    if not isinstance(keep, slice):
        nothing = ~(keep[:, None, :, None] & keep[:, None, None, :]).expand_as(maps[0])
        assert not maps[0][nothing].any()


@pytest.mark.parametrize("kind", REFINEMENTS)
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_every_kind(family, kind, tmp_path):
    model, inputs = make_encoder(family), inputs_of(family)
    keep = real_tokens(inputs)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state[keep]
    refine(model, inputs, refinement=kind, expansion_ratio=2, refinement_kernel_size=5)
    with torch.no_grad():
        assert_close(model(**inputs).last_hidden_state[keep], before, 1e-5)
    assert all(isinstance(each, REFINEMENTS[kind]) for each in refinements_of(model))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).last_hidden_state[keep], model(**inputs).last_hidden_state[keep])


def test_chosen_layers(tmp_path):
    model, inputs = make_encoder("bert"), inputs_of("bert")
    refine(model, inputs, layers=[1])
    assert [name for name, m in model.named_modules() if isinstance(m, RefinerMapRefinement)] == [
        "encoder.layer.1.attention.self.refinement"
    ]
    model.save_pretrained(tmp_path)
    assert len(refinements_of(AutoModel.from_pretrained(tmp_path))) == 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("family", ["vit", "dinov2", "bert", "modernbert"])
def test_half_precision(family, dtype, tolerance):
    model, inputs = make_encoder(family).to(dtype), inputs_of(family, dtype)
    keep = real_tokens(inputs)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state[keep]
        after = refine(model, inputs)(**inputs).last_hidden_state[keep]
    assert after.dtype == dtype
    assert_close(after.float(), before.float(), tolerance)


class TestPadding:
    """An example's answer doesn't depend on what else is in its batch."""

    @pytest.fixture(params=TEXT_ENCODERS)
    def model(self, request):
        model = make_encoder(request.param, **({"reference_compile": False} if request.param == "modernbert" else {}))
        refine(model, inputs_of(request.param))
        disturb(model)
        return model.double()

    @torch.no_grad()
    def test_alone_and_in_batches(self, model):
        alone = [model(**padded_texts(n, numbers=(i,))).last_hidden_state[0] for i, n in enumerate(LENGTHS)]
        for to in (9, 10, 30):
            together = model(**padded_texts(to)).last_hidden_state
            for ours, theirs in zip(together, alone):
                assert_close(ours[: len(theirs)], theirs, 1e-12)
        pair = model(**padded_texts(12, numbers=(2, 1))).last_hidden_state
        assert_close(pair[0, : LENGTHS[2]], alone[2], 1e-12)

    def test_trained_with_more_padding(self, model):
        """Gradients and running statistics, too."""
        results = []
        for to in (9, 17):
            twin, inputs = copy.deepcopy(model).train(), padded_texts(to)
            twin(**inputs).last_hidden_state[real_tokens(inputs)].pow(3).sum().backward()
            results.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
            results[-1] |= {name: buffer for name, buffer in twin.named_buffers() if "running" in name}
        ours, theirs = results
        assert ours.keys() == theirs.keys() and sum("running" in name for name in ours) == 16
        for name in ours:
            if "position_embeddings" not in name:
                assert_close(ours[name], theirs[name], 1e-10)

    @torch.no_grad()
    def test_on_the_left(self):
        model = make_encoder("bert")
        refine(model, inputs_of("bert"))
        disturb(model)
        model.double()
        alone = [model(**padded_texts(n, numbers=(i,))).last_hidden_state[0] for i, n in enumerate(LENGTHS)]
        inputs = padded_texts(14, "left")
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        together = model(**inputs, position_ids=positions).last_hidden_state
        for ours, theirs in zip(together, alone):
            assert_close(ours[-len(theirs) :], theirs, 1e-12)

    def test_it_is_the_mask_that_does_it(self, model, monkeypatch):
        monkeypatch.setattr("refiner_hf.encoder_attention_refiner.real_pairs", lambda mask, attention_map: None)
        with torch.no_grad():
            few, many = (model(**padded_texts(to)).last_hidden_state[:, :4] for to in (9, 30))
        assert (few - many).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_checkpointing(family):
    model, inputs = make_encoder(family), inputs_of(family)
    disturb(refine(model, inputs))
    results = []
    for checkpoints in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpoints:
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin(**inputs).last_hidden_state[real_tokens(inputs)].pow(2).sum().backward()
        results.append([p.grad for p in twin.parameters() if p.grad is not None] + list(twin.buffers()))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours.double(), theirs.double(), 1e-5)


def test_other_image_sizes():
    model, pixels = make_encoder("vit"), torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        before = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        refine(model, inputs_of("vit"))
        assert_close(model(pixels, interpolate_pos_encoding=True).last_hidden_state, before, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_compiled(family):
    model, inputs = make_encoder(family), inputs_of(family)
    disturb(refine(model, inputs))
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        assert_close(torch.compile(model)(**inputs).last_hidden_state, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "clip vision", "bert", "modernbert"])
def test_from_flex_attention(family):
    model, inputs = make_encoder(family, attention="flex_attention"), inputs_of(family)
    keep = real_tokens(inputs)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state[keep]
        assert_close(refine(model, inputs)(**inputs).last_hidden_state[keep], before, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vit", "dinov2", "bert", "roberta", "modernbert"])
def test_from_flash_attention(family):
    pytest.importorskip("flash_attn")
    model = make_encoder(family).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in inputs_of(family, torch.bfloat16).items()}
    keep = real_tokens(inputs)
    model.set_attn_implementation("flash_attention_2")
    with torch.no_grad():
        before = model(**inputs).last_hidden_state[keep]
        after = refine(model, inputs)(**inputs).last_hidden_state[keep]
    assert_close(after.float(), before.float(), 0.1)


class TestInputsOfADataSet:
    def statistics(self, model) -> list[torch.Tensor]:
        return [b for name, b in model.named_buffers() if "running" in name]

    def test_texts(self):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        texts = ["film " * 700, "a good film", "a very very very bad film", "bad", "very"] * 40
        rows = Dataset.from_dict({"text": texts, "labels": [0, 1, 1, 0, 1] * 40})
        refined = refine(make_encoder("bert"), rows, tokenizer)
        # Of texts as long as these, one batch spread over all of them is enough.
        some = [texts[i * 200 // 128] for i in range(0, 128, 16)]
        batch = tokenizer(some, padding=True, truncation=True, max_length=512, return_tensors="pt")
        by_hand = refine(make_encoder("bert"), batch)
        for ours, theirs in zip(self.statistics(refined), self.statistics(by_hand), strict=True):
            assert torch.equal(ours, theirs)

    def test_pairs(self):
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[SEP]"])})
        pairs = {"premise": ["a b"] * 4, "hypothesis": ["b"] * 4}
        refine(make_encoder("bert"), Dataset.from_dict(pairs), tokenizer)
        with pytest.raises(ValueError, match="3 columns of texts .premise, hypothesis, id.*select_columns"):
            refine(make_encoder("bert"), Dataset.from_dict({**pairs, "id": ["x"] * 4}), tokenizer)
        with pytest.raises(ValueError, match="0 columns of texts .none"):
            refine(make_encoder("bert"), Dataset.from_dict({"label": [1]}), tokenizer)

    def test_as_many_tokens_as_a_model_has_places_for(self):
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[SEP]"])})
        assert tokenizer.model_max_length > 1e20
        rows = Dataset.from_dict({"text": ["a " * 600]})
        refine(make_encoder("roberta", max_position_embeddings=20), rows, tokenizer)

    def test_pictures(self):
        pictures = [Image.effect_noise((40, 40), 90) for _ in range(6)]
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1] * 3})
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        refined = refine(make_encoder("vit"), rows, processor)
        inputs = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")
        by_hand = refine(make_encoder("vit"), inputs)
        for ours, theirs in zip(self.statistics(refined), self.statistics(by_hand), strict=True):
            assert_close(ours, theirs, 1e-5)
        with pytest.raises(ValueError, match="0 columns of pictures"):
            refine(make_encoder("vit"), rows.select_columns("label"), processor)
        with pytest.raises(ValueError, match="inputs are a data set .* got a generator"):
            refine(make_encoder("vit"), (row for row in rows), processor)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_statistics_while_it_is_trained(family):
    """They are those of one batch in training, of real places only, through all layers."""
    model, inputs = make_encoder(family).double(), inputs_of(family, torch.float64)
    disturb(refine(model, inputs))
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, RefinerBatchNorm2d):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        expected(**inputs)
    parts = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(3)]
    assert reestimate_norm_statistics(model, parts) == 3
    for (name, ours), theirs in zip(model.named_buffers(), expected.buffers(), strict=True):
        if "running" in name:
            assert_close(ours, theirs, 1e-10, name)


def test_several_batches_are_one(tmp_path):
    """The norms' statistics don't depend on how the inputs are divided, nor on padding."""
    whole = refine(make_encoder("bert").double(), padded_texts(9))
    parts = refine(make_encoder("bert").double(), [padded_texts(9, numbers=(0,)), padded_texts(20, numbers=(1, 2))])
    for (name, ours), theirs in zip(whole.state_dict().items(), parts.state_dict().values()):
        if ".refinement." in name and "norm" in name:
            assert_close(ours.double(), theirs.double(), 1e-9)
    norm = refinements_of(whole)[0].expansion_norm
    assert not torch.allclose(norm.running_var, torch.ones(()).double()), "they are measured"


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_two_towers(family, tmp_path):
    """Both where both are encoders; CLIP's text model is a decoder, and stays as it is."""
    text, image = getattr(transformers, f"{family}TextConfig"), getattr(transformers, f"{family}VisionConfig")
    config = getattr(transformers, f"{family}Config")(
        text_config=text(**TEXT).to_dict(), vision_config=image(**IMAGE).to_dict()
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    inputs = {**inputs_of("vit"), "input_ids": padded_texts(9)["input_ids"]}
    with torch.no_grad():
        before = model(**inputs).logits_per_image
    if family == "CLIP":
        with pytest.raises(ValueError, match="text_model.encoder.layers.0.self_attn can't be refined"):
            refine(model, inputs)
    refine(model, inputs, layers=[0, 1] if family == "CLIP" else None)
    assert len(refinements_of(model)) == (2 if family == "CLIP" else 4)
    with torch.no_grad():
        assert_close(model(**inputs).logits_per_image, before, 1e-5)
        disturb(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


class TestRefused:
    @pytest.mark.parametrize(
        "config, model",
        [("GPT2Config", "GPT2Model"), ("LlamaConfig", "LlamaModel"), ("CLIPTextConfig", "CLIPTextModel")],
    )
    def test_decoders(self, config, model):
        size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=100)
        ends = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        made = getattr(transformers, model)(getattr(transformers, config)(**size, **ends))
        with pytest.raises(ValueError, match="of .*attn can't be refined: it is a decoder's.*look ahead"):
            refine(made, padded_texts(9))
        assert not refinements_of(made) and type(made) is getattr(transformers, model)

    def test_outside_of_the_interface(self):
        config = transformers.DebertaV2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=100
        )
        with pytest.raises(ValueError, match="DebertaV2Model doesn't go through transformers' interface"):
            refine(transformers.DebertaV2Model(config), padded_texts(9))

    def test_what_could_not_be_loaded_again(self):
        class Own(transformers.ViTModel):
            pass

        with pytest.raises(ValueError, match="No Auto class loads a Own"):
            refine(Own(make_encoder("vit").config), inputs_of("vit"))

    def test_cross_attention(self):
        size = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=100)
        more = dict(decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0)
        ends = dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
        model = transformers.BartModel(transformers.BartConfig(**size, **more, **ends))
        inputs = {**padded_texts(9), "decoder_input_ids": torch.tensor([[2, 5]] * 3)}
        with pytest.raises(ValueError, match="decoder.layers.0.* can't be refined"):
            refine(model, inputs)
        refine(model, inputs, layers=[0])  # that of the encoder
        assert len(refinements_of(model)) == 1

    def test_what_makes_no_sense(self):
        model, inputs = make_encoder("vit"), inputs_of("vit")
        with pytest.raises(ValueError, match="layers 0 to 1, there is no layer 2"):
            refine(model, inputs, layers=[0, 2])
        with pytest.raises(ValueError, match="no inputs"):
            refine(model, [])
        with pytest.raises(ValueError, match="refinement is 'blur'"):
            refine(model, inputs, refinement="blur")
        with pytest.raises(ValueError, match="aren't finite"):
            refine(model, {"pixel_values": torch.full((1, 3, 32, 32), torch.nan)})
        assert type(model) is transformers.ViTModel and not refinements_of(model)
        refine(model, inputs)
        with pytest.raises(ValueError, match="refined already"):
            refine(model, inputs)
        with pytest.raises(ValueError, match="A Linear can't be refined"):
            refine(torch.nn.Linear(2, 2), inputs)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_another_attention_function(self, tmp_path, attention):
        refine(make_encoder("vit"), inputs_of("vit")).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="attention function of its own"):
            AutoModel.from_pretrained(tmp_path, attn_implementation=attention)


class TestWithAHead:
    def test_a_text_classifier_in_a_pipeline(self, tmp_path):
        model = make_encoder("bert", head=True, num_labels=3)
        before = model(**inputs_of("bert")).logits
        refine(model, inputs_of("bert"))
        assert_close(model(**inputs_of("bert")).logits, before, 1e-5)
        disturb(model)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
        tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        texts = ["a good film", "a very very very bad film"]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        expected = model(**inputs).logits.softmax(-1)
        classify = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
        for answers, scores in zip(classify(texts, batch_size=2), expected):
            given = {answer["label"]: answer["score"] for answer in answers}
            assert_close(torch.tensor([given[f"LABEL_{i}"] for i in range(3)]), scores, 1e-5)

    def test_words_are_classified_in_a_pipeline(self, tmp_path):
        config = make_encoder("bert", num_labels=3).config
        model = transformers.BertForTokenClassification(config).eval()
        inputs = inputs_of("bert")
        before = model(**inputs).logits
        refine(model, inputs)
        assert_close(model(**inputs).logits[real_tokens(inputs)], before[real_tokens(inputs)], 1e-5)
        disturb(model)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
        tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        tag = pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])
        texts = ["a good film", "a very very very bad film"]
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
        for found, scores, text in zip(tag(texts, batch_size=2), expected, texts):
            assert [each["word"] for each in found] == text.split()
            best = scores[1 : 1 + len(found)].max(-1).values
            assert_close(torch.tensor([float(each["score"]) for each in found]), best, 1e-5)

    def test_an_image_classifier_in_a_pipeline(self, tmp_path):
        model = make_encoder("dinov2", head=True, num_labels=3)
        disturb(refine(model, inputs_of("dinov2")))
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        image = Image.effect_noise((40, 40), 90).convert("RGB")
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
        answers = pipeline("image-classification", model=str(tmp_path), device="cpu")(image, top_k=3)
        assert_close(torch.tensor(sorted(a["score"] for a in answers)), expected.sort().values, 1e-5)

    def test_several_classes_of_one_configuration(self, tmp_path):
        """DeiT has two image classifiers; `architectures` says which it was."""
        for kind in (transformers.DeiTForImageClassification, transformers.DeiTForImageClassificationWithTeacher):
            model = kind(make_encoder("deit").config).eval()
            refine(model, inputs_of("deit")).save_pretrained(tmp_path / kind.__name__)
            loaded, info = AutoModelForImageClassification.from_pretrained(
                tmp_path / kind.__name__, output_loading_info=True
            )
            assert type(loaded) is type(model) and not any(info.values())
            assert torch.equal(loaded(**inputs_of("deit")).logits, model(**inputs_of("deit")).logits)

    def test_a_base_gets_a_head(self, tmp_path):
        """And the other way round."""
        base, inputs = make_encoder("bert"), inputs_of("bert")
        disturb(refine(base, inputs))
        base.save_pretrained(tmp_path / "base")
        headed, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=2, output_loading_info=True
        )
        assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
        assert torch.equal(headed.bert(**inputs).last_hidden_state, base(**inputs).last_hidden_state)
        headed.save_pretrained(tmp_path / "headed")
        again = AutoModel.from_pretrained(tmp_path / "headed")
        assert torch.equal(again(**inputs).last_hidden_state, base(**inputs).last_hidden_state)

    def test_the_stock_trainer(self, tmp_path):
        model = make_encoder("vit", head=True, num_labels=2)
        refine(model, inputs_of("vit"))
        rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
        args = TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=4, learning_rate=0.01,
            use_cpu=True, report_to="none",
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
        pixels = torch.stack([row["pixel_values"] for row in rows])
        with torch.no_grad():
            assert torch.equal(loaded(pixels).logits, model.eval()(pixels).logits)
        moved = refinements_of(loaded)[0].output_norm
        assert moved.num_batches_tracked == 2

    def test_lora_on_the_rest(self):
        from peft import LoraConfig, get_peft_model

        model, inputs = make_encoder("bert", head=True, num_labels=2), inputs_of("bert")
        refine(model, inputs)
        adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"], r=2))
        adapted(**inputs).logits.sum().backward()
        learned = [name for name, p in adapted.named_parameters() if p.grad is not None]
        assert learned and all("lora_" in name for name in learned)


class TestOtherProcesses:
    """A folder in a fresh process."""

    @pytest.fixture
    def folder(self, tmp_path):
        model = make_encoder("bert")
        disturb(refine(model, inputs_of("bert")))
        model.save_pretrained(tmp_path / "model")
        self.expected = model(**inputs_of("bert")).last_hidden_state
        return tmp_path / "model"

    def run(self, code: str, folder) -> subprocess.CompletedProcess:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True
        )

    def test_with_this_package(self, folder):
        torch.save(inputs_of("bert"), folder / "inputs.pt")
        code = (
            "import sys, torch, refiner_hf, transformers\n"
            "model = transformers.AutoModel.from_pretrained(sys.argv[1])\n"
            "answer = model(**torch.load(sys.argv[1] + '/inputs.pt')).last_hidden_state\n"
            "torch.save(answer.detach(), sys.argv[1] + '/answer.pt')"
        )
        done = self.run(code, folder)
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(folder / "answer.pt"), self.expected)

    @pytest.mark.parametrize("kind", ["AutoModel", "BertModel"])
    def test_without_it(self, folder, kind):
        code = f"import sys, transformers; transformers.{kind}.from_pretrained(sys.argv[1]); print('loaded')"
        done = self.run(code, folder)
        assert done.returncode != 0 and "loaded" not in done.stdout
        assert "refined" in done.stderr.strip().splitlines()[-1] or "refined" in done.stderr

    @pytest.mark.parametrize("task", ["text-classification", "image-classification"])
    def test_with_code_of_its_own(self, task, tmp_path):
        """Without this package, by `trust_remote_code=True`, also saved again; never without the code's consent."""
        family = "bert" if task.startswith("text") else "vit"
        model = make_encoder(family, head=True)
        disturb(refine(model, inputs_of(family)))
        model.save_pretrained(tmp_path / "model")
        add_code(tmp_path / "model")
        torch.save(inputs_of(family), tmp_path / "inputs.pt")
        auto = f"AutoModelFor{'Sequence' if family == 'bert' else 'Image'}Classification"
        code = (
            "import sys, torch, transformers\n"
            "class NotInstalled:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name.split('.')[0] == 'refiner_hf':\n"
            "            raise ImportError(name)\n"
            "sys.meta_path.insert(0, NotInstalled())\n"
            "folder = sys.argv[1]\n"
            f"load = transformers.{auto}.from_pretrained\n"
            "inputs = torch.load(folder + '/inputs.pt')\n"
            "load(folder + '/model', trust_remote_code=True).save_pretrained(folder + '/again')\n"
            "answer = load(folder + '/again', trust_remote_code=True)(**inputs).logits\n"
            "torch.save(answer.detach(), folder + '/answer.pt')\n"
            "try:\n"
            "    load(folder + '/model', trust_remote_code=False)\n"
            "except ValueError as error:\n"
            "    print(error)\n"
        )
        done = self.run(code, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "contains custom code" in done.stdout
        assert torch.equal(torch.load(tmp_path / "answer.pt"), model(**inputs_of(family)).logits)
        assert json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"] == REFINED_AUTO_MAP

    def test_as_a_class_of_the_library_with_this_package(self, folder):
        model = transformers.BertModel.from_pretrained(folder)
        with pytest.raises(RuntimeError, match="BertSelfAttention was loaded without its refinement.*Auto class"):
            model(**inputs_of("bert"))


class TestImplementations:
    @pytest.mark.parametrize("training", [True, False])
    def test_blocked_is_eager(self, training):
        model, inputs = make_encoder("vit").double(), inputs_of("vit", torch.float64)
        disturb(refine(model, inputs))
        results = []
        for name in ("eager", "blocked"):
            twin = copy.deepcopy(model).train(training)
            twin.set_refine_implementation(name)
            output = twin(**inputs).last_hidden_state
            output.square().sum().backward()
            results.append([output, *(p.grad for p in twin.parameters() if p.grad is not None), *twin.buffers()])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).abs().max() <= 1e-8 * max(1, theirs.abs().max())

    def test_it_is_what_runs(self, monkeypatch):
        ran = []
        for name, each in REFINE_IMPLEMENTATIONS.items():
            run = lambda *args, name=name, each=each: ran.append(name) or each.refine(*args)  # noqa: E731
            monkeypatch.setitem(REFINE_IMPLEMENTATIONS, name, each._replace(refine=run))
        model, inputs = make_encoder("vit"), inputs_of("vit")
        refine(model, inputs)
        ran.clear()
        with torch.no_grad():
            model(**inputs)
            model.set_refine_implementation("eager")
            model(**inputs)
            model.set_refine_implementation("blocked")
            model(**inputs)
        fastest = "blocked" if isinstance(native_library_refiner._loaded(), str) else "native"
        assert ran == 2 * [fastest] + 2 * ["eager"] + 2 * ["blocked"], '"auto" is the default'
        with pytest.raises(ValueError, match="'auto', 'eager'"):
            model.set_refine_implementation("fast")


def test_pushed_and_loaded_from_the_hub(hub, tmp_path):
    hub.add_user("alice")
    token = hub.add_token("alice")
    model = make_encoder("bert", head=True, num_labels=2)
    disturb(refine(model, inputs_of("bert")))
    model.push_to_hub("alice/refined", token=token)
    code = (
        "import sys, torch, refiner_hf, transformers\n"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained('alice/refined', token=sys.argv[1])\n"
        "torch.save(model(**torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    torch.save(inputs_of("bert"), tmp_path / "inputs.pt")
    words = [token, str(tmp_path / "inputs.pt"), str(tmp_path / "answer.pt")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "answer.pt"), model(**inputs_of("bert")).logits)


class TestConfiguration:
    def test_says_what_it_is(self, tmp_path):
        model = make_encoder("bert", head=True, num_labels=2)
        refine(model, inputs_of("bert"), layers=[1], expansion_ratio=2)
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        assert (content["model_type"], content["base_model_type"]) == ("refined", "bert")
        assert content["architectures"] == ["RefinedBertForSequenceClassification"]
        assert content["refinement_config"] == {
            "refinement": "expansion_convolution",
            "expansion_ratio": 2,
            "refinement_kernel_size": 3,
            "modules": {
                "bert.encoder.layer.0.attention.self": None,
                "bert.encoder.layer.1.attention.self": {"num_attention_heads": 4, "hidden_size": 32},
            },
        }
        config = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, transformers.BertConfig) and config.num_labels == 2
        config.output_attentions = True  # the maps are always there
        fresh = AutoModelForSequenceClassification.from_config(config)
        assert len(fresh(**inputs_of("bert")).attentions) == 2

    def test_new_weights_start_as_the_identity(self, tmp_path):
        model = make_encoder("vit")
        refine(model, inputs_of("vit"))
        fresh = AutoModel.from_config(model.config)
        for refinement in refinements_of(fresh):
            assert not refinement.reduction_norm.weight.any()
            assert refinement.expansion.weight.std() > 0.1, "PyTorch's own initialisation"

    @pytest.mark.parametrize("name", [None, "no_model"])
    def test_damaged(self, tmp_path, name):
        refine(make_encoder("vit"), inputs_of("vit")).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        content["base_model_type"] = name
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="base_model_type=.* transformers doesn't know"):
            AutoModel.from_pretrained(tmp_path)
