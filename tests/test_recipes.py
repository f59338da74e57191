"""The recipes: what they say they train, what they have from their bases, and that they run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from refiner_hf import RefinerConfig
from refiner_hf.commands.recipes import RECIPES, load_recipe, recipe_names
from refiner_hf.commands.train import main
from refiner_hf.commands.training_options import parse_arguments
from refiner_hf.training.optimization import scaled_learning_rate

from .images import write_folder


PUBLISHED = [name for name in recipe_names() if name.startswith("imagenet_")]
SCRATCH = [name for name in PUBLISHED if "_224" in name]
FINE_TUNED = [name for name in PUBLISHED if name not in SCRATCH]
SIZES = {"s": ("small", 0.9, 0.1, 0.2), "m": ("medium", 1.0, 0.2, 0.25), "l": ("large", 1.13, 0.2, 0.25)}


def test_each_published_row_has_one():
    rows = {f"imagenet_{size}_224{labels}" for size in "sml" for labels in ("", "_token_labels")}
    assert set(PUBLISHED) == rows | {"imagenet_s_384", "imagenet_m_384", "imagenet_l_384", "imagenet_l_448"}


@pytest.mark.parametrize("name", recipe_names())
def test_the_command_at_the_head_starts_it(name, tmp_path, monkeypatch):
    """Its options are ours, it names this recipe, and a network is given where one is needed."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "imagenet/train", "imagenet/val"):
        Path(folder).mkdir(parents=True)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    command = re.search(r"^#   .*?(?:refiner train|scripts/train\.py)(.*)", text, re.MULTILINE)
    words = shlex.split(command[1], comments=True)
    assert words[:1] == ([name] if name != "digits" else [])
    model, *_, training = parse_arguments([*words, "--use_cpu"])
    assert (model.model_name_or_path is not None) == (name == "fine_tune" or name in FINE_TUNED)
    assert training.output_dir


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


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_at_a_higher_resolution(name, tmp_path):
    size, crop_pct, _, drop_path = SIZES[name.split("_")[1]]
    model, _, augmentation, training = parse_arguments([name, "--output_dir", str(tmp_path), "--use_cpu"])
    assert model.image_size == int(name.split("_")[2]) and model.crop_pct == crop_pct
    assert model.overrides == {"drop_path_rate": drop_path}
    assert (augmentation.auto_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.repeated_augmentation) == (0, 0, 1)
    assert training.num_train_epochs == 30 and training.get_cooldown_steps(300) == 0
    assert training.lr_scheduler_type == "cosine" and not training.lr_scheduler_kwargs
    assert training.get_warmup_steps(300) == 30
    assert (training.weight_decay, training.label_smoothing_factor, training.max_grad_norm) == (1e-8, 0.1, 1)
    assert training.ema_decay == 0.9999 and training.ema_warmup
    images = 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert scaled_learning_rate(training.learning_rate, images, training.learning_rate_batch_size) == 2e-5


def test_plain_and_token_labelled_differ_in_that_alone():
    for size in "sml":
        plain = load_recipe(f"imagenet_{size}_224").options
        labelled = load_recipe(f"imagenet_{size}_224_token_labels").options
        overrides = labelled.pop("config_overrides") | plain.pop("config_overrides")
        assert plain == labelled and overrides["token_mixing"]


def differing(own: dict, base: dict) -> dict:
    """What of a recipe isn't as its base has it."""
    return {
        name: differing(value, base.get(name, {})) if isinstance(value, dict) else value
        for name, value in own.items()
        if name not in base or value != base[name]
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_none_repeats_its_base(path, tmp_path):
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    if base := own.pop("base", None):
        (tmp_path / "base.yaml").write_text(f"base: {base}")
        assert differing(own, load_recipe(str(tmp_path / "base.yaml")).options) == own


class TestBase:
    """A recipe of one's own on a base."""

    @pytest.fixture
    def write(self, tmp_path, monkeypatch):
        """Writes files of `NAME=content`, in a folder that isn't the current one."""
        monkeypatch.chdir(RECIPES.parent)

        def write(**contents):
            for name, content in contents.items():
                (tmp_path / f"{name}.yaml").write_text(content)
            return str(tmp_path / f"{next(iter(contents))}.yaml")

        return write

    def test_nearest_wins_mappings_merge_and_null_takes_out(self, write):
        path = write(
            mine="{base: middle.yaml, learning-rate: 3, lr_scheduler_kwargs: {x: 1}, config_overrides: {a: 1}}",
            middle="""{base: ./far.yaml, mixup: null, lr_scheduler_kwargs: null, config_overrides: '{"a":2,"b":2}'}""",
            far="{learning_rate: 1, mixup: 1, cutmix: 1, lr_scheduler_kwargs: {y: 1}, config_overrides: {b: 3, c: 3}}",
        )
        recipe = load_recipe(path)
        assert recipe.options == {
            "learning_rate": 3,
            "cutmix": 1,
            "lr_scheduler_kwargs": {"x": 1},
            "config_overrides": {"a": 1, "b": 2, "c": 3},
        }
        assert recipe.origin == "mine.yaml on middle.yaml on far.yaml"

    @pytest.mark.parametrize("base", ["imagenet_s_224", "imagenet_s_224.yaml"])
    def test_a_recipe_of_the_package(self, write, base, tmp_path):
        path = write(mine=f"{{base: {base}, seed: 3}}")
        words = ["--output_dir", str(tmp_path / "out"), "--use_cpu"]
        assert parse_arguments([path, *words]) == parse_arguments(["imagenet_s_224", "--seed", "3", *words])

    def test_a_json_file(self, tmp_path):
        (tmp_path / "mine.json").write_text('{"base": "digits", "seed": 3}')
        assert load_recipe(str(tmp_path / "mine.json")).options == load_recipe("digits").options | {"seed": 3}

    @pytest.mark.parametrize(
        "contents, message",
        [
            (
                {"mine": "base: none.yaml"},
                r"mine.yaml has the base none.yaml. There is no file .*none.yaml, .*there are defaults, digits",
            ),
            ({"mine": "base: [digits]"}, r"has the base \['digits'\]. There is no"),
            ({"mine": "base: mine.yaml"}, "own base: mine.yaml on mine.yaml"),
            ({"mine": "base: a.yaml", "a": "base: mine.yaml"}, "own base: mine.yaml on a.yaml on mine.yaml"),
            ({"mine": "base: a.yaml", "a": "- digits"}, r"a.yaml must hold option names"),
            ({"mine": "base: a.yaml", "a": "x: [y"}, r"a.yaml isn't a YAML"),
            ({"mine": "base: a.yaml", "a": "speed: 3"}, "mine.yaml on a.yaml has speed, which"),
            ({"mine": "base: digits\nshow_recipe: digits"}, "mine.yaml on digits.yaml has show_recipe, which"),
        ],
    )
    @pytest.mark.parametrize("option", [[], ["--show_recipe"]], ids=["train", "show"])
    def test_what_is_wrong_is_said(self, write, contents, message, option):
        with pytest.raises(SystemExit, match=f"(?s)Error: .*{message}"):
            main([*option, write(**contents)])


BASES = ["_imagenet", "_imagenet_fine_tune", "_imagenet_from_scratch"]


class TestWhatIsOnlyABase:
    def test_these_are(self):
        assert [path.stem for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in recipe_names()] == BASES

    @pytest.mark.parametrize("name", BASES)
    def test_it_is_not_run(self, name):
        for given in (name, str(RECIPES / f"{name}.yaml")):
            with pytest.raises(SystemExit, match=f"{name}.yaml is only a base.* digits, .*imagenet_s_224"):
                main([given])

    def test_help_lists_all_others(self, capsys):
        with pytest.raises(SystemExit):
            parse_arguments(["--help"])
        text = "".join(capsys.readouterr().out.split())
        assert f"Recipes:auto,{','.join(recipe_names())}," in text and not any(f"{name}," in text for name in BASES)


class TestShowRecipe:
    def show(self, capsys, *words):
        with pytest.raises(SystemExit) as ended:
            main([*words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    # Each kind of value: text that YAML would read as something else, numbers, lists, mappings, flags either way.
    OPTIONS = [
        "--eval_strategy", "no", "--load_best_model_at_end", "False", "--run_name=1e-3", "--learning-rate", "1e-7",
        "--report_to", "none", "--seed", "7", "--label_names", "a", "b", "--no_horizontal_flip", "--freeze_norms",
        "--config_overrides", '{"drop_path_rate": 0.3, "attention_types": ["plain"]}', "--do_eval",
        "--hub_model_id", "Jos\u00e9/x: #y",
    ]  # fmt: skip

    @pytest.mark.parametrize("name", recipe_names())
    @pytest.mark.parametrize("options", [[], OPTIONS], ids=["as it is", "with options"])
    def test_given_back_it_gives_the_same_arguments(self, name, options, capsys, tmp_path):
        text = self.show(capsys, "--show_recipe", name, *options)
        (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
        assert "base" not in yaml.safe_load(text)
        words = ["--output_dir", str(tmp_path / "out"), "--use_cpu"]
        assert parse_arguments([str(tmp_path / "shown.yaml"), *words]) == parse_arguments([name, *options, *words])

    def test_it_says_where_it_comes_from_and_applies_options_wherever_they_are(self, capsys):
        for words in (
            ["--show_recipe", "imagenet_s_224", "--seed", "3"],
            ["--seed=3", "--show-recipe=imagenet_s_224"],
        ):
            text = self.show(capsys, *words)
            assert text.splitlines()[:2] == [
                "# imagenet_s_224.yaml on _imagenet_from_scratch.yaml on _imagenet.yaml",
                "# From the command line: seed",
            ]
            assert yaml.safe_load(text) == load_recipe("imagenet_s_224").options | {"seed": 3}

    def test_a_file_of_ones_own(self, capsys, tmp_path):
        (tmp_path / "mine.yaml").write_text("base: fine_tune\nseed: 3")
        text = self.show(capsys, "--show_recipe", str(tmp_path / "mine.yaml"))
        assert text.startswith("# mine.yaml on fine_tune.yaml\n")
        assert yaml.safe_load(text) == load_recipe("fine_tune").options | {"seed": 3}

    @pytest.mark.parametrize("words", [["--sead"], ["--seed", "x"], ["digits"]])
    def test_what_is_no_option_is_an_error_here_too(self, words, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["--show_recipe", "digits", *words])
        said = capsys.readouterr()
        assert ended.value.code == 2 and words[-1] in said.err and not said.out

    def test_without_a_name(self, capsys):
        with pytest.raises(SystemExit):
            main(["--show_recipe"])
        assert "--show-recipe: expected one argument" in capsys.readouterr().err


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
    if name == "fine_tune" or name in FINE_TUNED:
        main(["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "base"), *SMALL])
        start = ["--model_name_or_path", str(tmp_path / "base")]
    out = tmp_path / "out"
    result = main([name, "--train_dir", str(photos), "--output_dir", str(out), *SMALL, *start])
    assert result.trained and (out / "README.md").exists()
    assert ("eval_ema_accuracy" in result.metrics) == (name in PUBLISHED)
