"""A network with a distillation token beside the class token, and with a head on it."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from refiner_hf import (
    RefinerBackbone,
    RefinerConfig,
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerImageProcessor,
)
from refiner_hf.inspection.attention_views import APPLIED, view_attention
from refiner_hf.inspection.networks import Network
from refiner_hf.training.arguments import RefinerTrainingArguments
from refiner_hf.training.trainer import RefinerTrainer

from .conftest import assert_close
from .every_class import config_of, every_class, inputs_of, make, results


TOKENS = dict(use_distillation_token=True)
HEAD = TOKENS | dict(use_distillation_head=True)


@every_class
def test_saved_and_loaded(cls, tmp_path):
    overrides = HEAD if cls is RefinerForImageClassification else TOKENS
    model = make(cls, **overrides)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for ours, theirs in zip(results(loaded(**inputs_of(cls))), results(model(**inputs_of(cls))), strict=True):
        assert torch.equal(ours, theirs)


def test_the_logits_are_the_mean_of_both_tokens():
    model = make(RefinerForImageClassification, use_dense_head=False, **HEAD)
    pixels = inputs_of(RefinerForImageClassification)["pixel_values"]
    tokens = model.refiner(pixels).last_hidden_state
    expected = (model.classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2
    assert tokens.shape[1] == 2 + 16
    assert_close(model(pixels).logits, expected)
    assert_close(model.train()(pixels).logits, (model.classifier((t := model.refiner(pixels).last_hidden_state)[:, 0])
                 + model.distillation_classifier(t[:, 1])) / 2)  # fmt: skip


def test_the_dense_head_sees_patches_only():
    model = make(RefinerForImageClassification, token_mixing=True, **HEAD)
    inputs = inputs_of(RefinerForImageClassification, labels=True)
    with torch.no_grad():
        tokens = model.refiner(inputs["pixel_values"]).last_hidden_state
        both = (model.classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2
        dense = model.dense_classifier(tokens[:, 2:]).amax(1)
        assert_close(model(**inputs).logits, both + model.config.dense_logits_weight * dense)
    model.train()
    outputs = model(**inputs)
    assert outputs.patch_logits.shape == (3, 16, 5)
    outputs.loss.backward()
    assert model.refiner.embeddings.distillation_token.grad.abs().max() > 0


def test_feature_maps_and_reconstructions_leave_both_tokens_out():
    backbone = make(RefinerBackbone, **TOKENS)
    outputs = backbone(**inputs_of(RefinerBackbone), output_hidden_states=True)
    last = backbone.norm(outputs.hidden_states[-1])
    assert_close(outputs.feature_maps[-1].flatten(2).transpose(1, 2), last[:, 2:])
    painter = make(RefinerForMaskedImageModeling, **TOKENS)
    inputs = inputs_of(RefinerForMaskedImageModeling)
    assert painter(**inputs).reconstruction.shape == inputs["pixel_values"].shape


def test_both_tokens_keep_their_positions_at_another_size():
    model = make(RefinerForImageClassification, **HEAD)
    before = model.refiner.embeddings.position_embeddings.clone()
    model.set_image_size((24, 32))
    after = model.refiner.embeddings.position_embeddings
    assert after.shape[1] == 2 + 6 * 8
    assert torch.equal(after[:, :2], before[:, :2])
    assert model(torch.randn(2, 3, 24, 32)).logits.shape == (2, 5)
    assert model(torch.randn(2, 3, 16, 16), interpolate_pos_encoding=True).logits.shape == (2, 5)


def test_other_labels_replace_both_heads():
    model = make(RefinerForImageClassification, **HEAD)
    model.reset_classifier(["a", "b"])
    assert model.distillation_classifier.out_features == model.classifier.out_features == 2
    assert model(**inputs_of(RefinerForImageClassification)).logits.shape == (3, 2)


def test_the_token_does_not_decay(tmp_path):
    model = make(RefinerForImageClassification, **HEAD)
    decayed = RefinerTrainer(model, RefinerTrainingArguments(str(tmp_path))).get_decay_parameter_names(model)
    assert not any(name.endswith("_token") for name in decayed)
    assert "distillation_classifier.weight" in decayed


def test_looking_inside():
    model = make(RefinerForImageClassification, **HEAD)
    processor = RefinerImageProcessor(size={"height": 16, "width": 16})
    image = Image.radial_gradient("L").convert("RGB")
    sight = view_attention(Network("with distillation", model, processor), image, [(1, 2)])
    maps = model(processor(image, return_tensors="pt").pixel_values, output_attentions=True).attentions
    for layer, attention_map in zip(sight.layers, maps, strict=True):
        expected = attention_map[0, :, [0, 2 + 4 + 2], 2:].transpose(0, 1).reshape(2, 4, 4, 4)
        assert_close(torch.from_numpy(layer.stages[APPLIED]), expected.detach())


def test_a_head_needs_the_token():
    with pytest.raises(StrictDataclassError, match="use_distillation_token"):
        RefinerConfig(use_distillation_head=True)
    assert config_of().num_prefix_tokens == 1 and config_of(**TOKENS).num_prefix_tokens == 2
