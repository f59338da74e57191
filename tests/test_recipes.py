"""The recipes: what they say they train, and that they run."""

import itertools
import json
import re

import pytest
import yaml

from refiner_hf import RefinerConfig
from refiner_hf.commands.parsing import RECIPES, parse_arguments, recipe_names
from refiner_hf.commands.train import main
from refiner_hf.training.optimization import scaled_learning_rate

from .images import write_folder


PUBLISHED = [name for name in recipe_names() if name.startswith("imagenet_")]
SCRATCH = [name for name in PUBLISHED if "_224" in name]
SIZES = {"s": ("small", 0.9, 0.1, 0.2), "m": ("medium", 1.0, 0.2, 0.25), "l": ("large", 1.13, 0.2, 0.25)}


def content(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def test_each_published_row_has_one():
    rows = {f"imagenet_{size}_224{labels}" for size in "sml" for labels in ("", "_token_labels")}
    assert set(PUBLISHED) == rows | {"imagenet_s_384", "imagenet_m_384", "imagenet_l_384", "imagenet_l_448"}


@pytest.mark.parametrize("name", recipe_names())
def test_opens_with_its_own_command(name):
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert re.findall(r"(?:refiner-train|scripts/train\.py) (\w+)", comment) == [name]


@pytest.mark.parametrize("name", SCRATCH)
def test_the_papers_recipe(name, tmp_path):
    size, crop_pct, drop_path, drop_path_labelled = SIZES[name.split("_")[1]]
    model, _, augmentation, training = parse_arguments([name, "--output_dir", str(tmp_path), "--use_cpu"])
    labelled = "token_labels" in name
    config = getattr(RefinerConfig, model.model_size)(**model.overrides)
    assert model.model_size == size and model.crop_pct == crop_pct
    assert config.drop_path_rate == (drop_path_labelled if labelled else drop_path)
    assert config.token_mixing == labelled and config.cosine_regularizer_weight == 0.1 and config.use_dense_head
    assert (augmentation.auto_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.repeated_augmentation) == (0.8, 1.0, 1)
    assert training.num_train_epochs == 310 and training.get_cooldown_steps(3100) == 100
    assert training.get_warmup_steps(3000) == pytest.approx(50, abs=1)
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5, "warmup_lr_rate": 0.002}
    assert training.learning_rate * training.lr_scheduler_kwargs["warmup_lr_rate"] == pytest.approx(1e-6)
    assert (training.weight_decay, training.label_smoothing_factor) == (0.05, 0.1)
    assert training.ema_decay == 0.99996 and not training.ema_warmup and training.per_device_train_batch_size == 32
    assert scaled_learning_rate(training.learning_rate, 8 * 32, training.learning_rate_batch_size) == 5e-4


def test_plain_and_token_labelled_differ_in_that_alone():
    for size in "sml":
        plain, labelled = content(f"imagenet_{size}_224"), content(f"imagenet_{size}_224_token_labels")
        overrides = labelled.pop("config_overrides") | plain.pop("config_overrides")
        assert plain == labelled and overrides["token_mixing"]


# What lets a recipe for many GPUs run here, in a moment.
SMALL = [
    "--config_overrides", json.dumps(dict(
        image_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        attention_types=["plain", "shared_refined"], drop_path_rate=0.2,
    )),
    "--image_size", "32", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8",
    "--max_steps", "2",
    "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False", "--eval_strategy", "no",
    "--save_strategy", "no", "--load_best_model_at_end", "False", "--use_cpu", "--report_to", "none",
    "--disable_tqdm", "True", "--logging_steps", "1", "--norm_statistics_images", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "digits"])
def test_runs(name, photos, tmp_path):
    start = []
    if name == "fine_tune" or name in PUBLISHED and name not in SCRATCH:
        main(["from_scratch", "--train_dir", str(photos), "--output_dir", str(tmp_path / "base"), *SMALL])
        start = ["--model_name_or_path", str(tmp_path / "base")]
    out = tmp_path / "out"
    result = main([name, "--train_dir", str(photos), "--output_dir", str(out), *SMALL, *start])
    assert result.trained and (out / "README.md").exists()
    assert ("eval_ema_accuracy" in result.metrics) == (name in PUBLISHED)
