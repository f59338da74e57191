import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from refiner_hf import RefinerConfig, RefinerForImageClassification


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
