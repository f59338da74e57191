import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from refiner_hf import RefinerConfig, RefinerForImageClassification

from .conftest import TINY


@pytest.mark.parametrize(
    "make, parameters",
    [(RefinerConfig.small, 25_408_656), (RefinerConfig.medium, 55_450_932), (RefinerConfig.large, 81_150_192)],
    ids=["small", "medium", "large"],
)
def test_published_networks_have_the_published_size(make, parameters):
    config = make()

    with torch.device("meta"):
        model = RefinerForImageClassification(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.num_labels == 1000 and config.use_dense_head
    assert config.attention_types[:4] == ["plain", "shared_refined"] * 2


def test_overrides_of_a_published_network():
    config = RefinerConfig.small(image_size=384, num_labels=7, use_dense_head=False, drop_path_rate=0.2)
    assert (config.image_size, config.num_labels, config.use_dense_head, config.drop_path_rate) == (384, 7, False, 0.2)
    assert RefinerConfig.small(id2label={0: "cat", 1: "dog"}).num_labels == 2


def test_round_trip(tmp_path, tiny_config):
    config = tiny_config(attention_types=["refined"] * 4, image_size=[16, 24], id2label={0: "a", 1: "b"})
    config.save_pretrained(tmp_path)
    loaded = RefinerConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.image_height_width == (16, 24) and loaded.patch_grid == (4, 6)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "refiner"


def test_published_training_settings():
    assert [make().drop_path_rate for make in (RefinerConfig.small, RefinerConfig.medium, RefinerConfig.large)] == [
        0.1, 0.2, 0.2,
    ]  # fmt: skip
    config = RefinerConfig()
    assert (config.layerscale_value, config.layer_norm_eps, config.batch_norm_eps) == (1e-5, 1e-6, 1e-5)
    assert (config.dense_loss_weight, config.dense_logits_weight, config.expansion_ratio) == (0.5, 0.5, 3)
    assert RefinerConfig(num_hidden_layers=2, attention_types=("plain", "refined")).attention_types[1] == "refined"


def test_defaults_follow_other_fields():
    config = RefinerConfig(hidden_size=96, num_hidden_layers=5, num_attention_heads=4)
    assert config.intermediate_size == 288
    assert config.attention_types == ["plain", "shared_refined", "plain", "shared_refined", "plain"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(image_size=225), "multiple"),
        (dict(image_size=[224, 230]), "width"),
        (dict(image_size=[224]), "pair"),
        (dict(image_size=0), "positive"),
        (dict(patch_size=15, image_size=225), "even"),
        (dict(num_channels=0), "num_channels"),
        (dict(hidden_size=100), "num_attention_heads"),
        (dict(num_hidden_layers=0), "at least 1"),
        (dict(attention_types=["plain"]), "entries"),
        (dict(num_hidden_layers=2, attention_types=["plain", "shared"]), "shared_refined"),
        (dict(num_hidden_layers=2, attention_types=["shared_refined", "plain"]), "before it"),
        (dict(refinement="conv"), "expansion_convolution"),
        (dict(refinement_kernel_size=4), "odd"),
        (dict(expansion_ratio=0), "expansion_ratio"),
        (dict(drop_path_rate=1.5), "drop_path_rate"),
        (dict(residual_scale=0.0), "residual_scale"),
        (dict(batch_norm_momentum=0.0), "momentum"),
        (dict(hidden_size="wide"), "hidden_size"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        RefinerConfig(**fields)


def test_odd_patches_are_fine_without_the_stem():
    assert RefinerConfig(image_size=225, patch_size=15, use_conv_stem=False).patch_grid == (15, 15)


NAMES = ["w", "x", "y", "z"]


def test_labels_by_number_however_they_are_given(tmp_path):
    """As transformers' own run_image_classification.py gives them: numbers as text, both ways round."""
    as_text = {str(i): name for i, name in enumerate(NAMES)}, {name: str(i) for i, name in enumerate(NAMES)}
    constructed = RefinerConfig(**TINY | {"num_labels": 4}, id2label=as_text[0], label2id=as_text[1])
    assigned = RefinerConfig(**TINY)
    assigned.id2label, assigned.label2id = as_text
    RefinerForImageClassification(RefinerConfig(**TINY)).save_pretrained(tmp_path)
    options = dict(num_labels=4, id2label=as_text[0], label2id=as_text[1])
    loaded = RefinerConfig.from_pretrained(tmp_path, **options)
    model = RefinerForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **options)
    assert model.classifier.out_features == 4
    for config in (constructed, assigned, loaded, model.config):
        assert config.label_names == NAMES and config.num_labels == 4
        assert config.id2label == dict(enumerate(NAMES)) and config.label2id == {n: i for i, n in enumerate(NAMES)}


@pytest.mark.parametrize(
    "id2label, says",
    [
        (["w", "x"], "must be a dict, got a list"),
        ({"first": "w"}, "must map each label's number to its name"),
        ({0: "w", 2: "x"}, "must number its 2 labels from 0 to 1, each once; its numbers go from 0 to 2"),
        ({1: "w", 2: "x"}, "from 0 to 1"),
        ({"0": "w", 0: "x"}, "each once"),
    ],
)
def test_labels_that_are_none(id2label, says, tmp_path):
    says += "|Field 'id2label' with value"  # older libraries look at the types first
    with pytest.raises((ValueError, StrictDataclassError), match=says):
        RefinerConfig(**{**TINY, "num_labels": None}, id2label=id2label)
    RefinerConfig(**TINY).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"id2label": id2label}))
    if {"0": "w", 0: "x"} != id2label:  # JSON can't hold these two
        with pytest.raises((ValueError, StrictDataclassError), match=says):
            RefinerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(num_hidden_layers=10**6), "at most 10,000, got 1000000"),
        (dict(num_hidden_layers=-1), "at least 1"),
        (dict(layer_norm_eps=-1e-6), "layer_norm_eps must not be negative"),
        (dict(residual_scale=float("nan")), "residual_scale must be a finite number"),
        (dict(layerscale_value=float("inf")), "layerscale_value must be a finite number"),
        (dict(patch_size=0), "patch_size must be a positive"),
        (dict(hidden_size="24"), "hidden_size"),
    ],
)
def test_numbers_out_of_range(fields, says):
    with pytest.raises(StrictDataclassError, match=says):
        RefinerConfig(**TINY | fields)
