"""The recipe `auto`, as a user starts it: looked at, timed, trained, repeated and continued."""

import re

import pytest
import yaml

from refiner_hf.auto.look import look
from refiner_hf.auto.options import to_arguments
from refiner_hf.auto.timing import measure_speed
from refiner_hf.commands.auto_recipe import seconds_of
from refiner_hf.commands.train import main
from refiner_hf.commands.training_options import parse_arguments
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.sources import load_image_data
from refiner_hf.hub.publish import public_files
from refiner_hf.training.trainer import RefinerTrainer
from refiner_hf.utils.loading import load_classifier_and_processor

from ..conftest import load_json
from ..images import write_folder


QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos", 30)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """One command without a recipe, and what it says."""
    out = tmp_path_factory.mktemp("runs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        result = main(["--train_dir", str(photos), "--output_dir", str(out), "--time_budget", "8s", *QUIET])
    return out, result, "\n".join(lines)


def load(folder, **fields):
    return load_image_data(
        DataArguments(train_dir=str(folder), **fields), need_train=True, need_evaluation=True, seed=0
    )


class TestOneCommand:
    def test_learns_what_is_to_be_learned(self, trained):
        assert trained[1].metrics["eval_accuracy"] > 0.9

    def test_says_what_it_saw_and_chose_and_why(self, trained):
        _, result, said = trained
        count = len(result.data.train)
        assert f"Seen: {count} training images of 3 labels" in said and "30 x 24 pixels (median), coloured" in said
        assert re.search(r"image_size +24 +the images have 30 x 24 pixels", said)
        assert re.search(r"num_train_epochs +\d+ +[\d.e-]+ s for a step", said)
        assert re.search(r"use_cpu", said) is None and re.search(r"horizontal_flip +False +\S+", said)

    def test_its_recipe_repeats_it(self, trained, photos, tmp_path):
        out, result, _ = trained
        again = main([str(out / "recipe.yaml"), "--train_dir", str(photos), "--output_dir", str(tmp_path / "out")])
        assert again.metrics["eval_loss"] == result.metrics["eval_loss"]
        first, second = (load_json(folder / "config.json") for folder in (out, tmp_path / "out"))
        assert first == second

    def test_the_recipe_has_no_places_and_stays_here(self, trained, photos):
        text = (trained[0] / "recipe.yaml").read_text()
        assert str(photos) not in text and "output_dir" not in yaml.safe_load(text)
        assert "model.safetensors" in public_files(trained[0]) and "recipe.yaml" not in public_files(trained[0])

    def test_it_loads(self, trained):
        model, processor = load_classifier_and_processor(str(trained[0]))
        assert model.config.image_size == 24 and model.config.num_hidden_layers == 2


def test_goes_on_with_what_was_chosen(photos, tmp_path, capsys, monkeypatch):
    """The second time, a step takes another time; still the run is the same."""
    words = ["auto", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--time_budget", "8s", *QUIET]
    save = RefinerTrainer._save_checkpoint

    def stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RefinerTrainer, "_save_checkpoint", stop)
        with pytest.raises(SystemExit):
            main(words)
    chosen = (tmp_path / "out" / "recipe.yaml").read_text()
    capsys.readouterr()
    monkeypatch.setattr("refiner_hf.auto.run.measure_speed", None)  # it isn't called
    result = main(words)
    assert "goes on with them" in capsys.readouterr().out
    assert result.trained and (tmp_path / "out" / "recipe.yaml").read_text() == chosen


class TestOptions:
    def test_show_recipe_prints_one_and_writes_nothing(self, photos, tmp_path, capsys):
        words = ["--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--max_steps", "2", *QUIET]
        with pytest.raises(SystemExit):
            main(["--show_recipe", "auto", *words, "--learning_rate", "0.01"])
        recipe = yaml.safe_load(capsys.readouterr().out)
        assert recipe["learning_rate"] == 0.01 and recipe["max_steps"] == 2
        assert recipe["config_overrides"]["image_size"] == 24
        assert not (tmp_path / "out").exists()

    def test_dry_run(self, photos, tmp_path, capsys):
        words = ["--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--max_steps", "2", *QUIET]
        main([*words, "--dry_run"])
        said = capsys.readouterr().out
        assert "Chosen" in said and "Nothing was trained" in said
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["_dry_run.png"]

    def test_options_reach_the_training(self, photos, tmp_path):
        words = ["auto", "--train_dir", str(photos), "--output_dir", str(tmp_path), "--max_steps", "2", *QUIET]
        overrides = '{"attention_types": ["plain", "plain"], "hidden_size": 48}'
        model, _, augmentation, args = parse_arguments([*words, "--config_overrides", overrides, "--mixup", "0.5"])
        assert model.overrides["attention_types"] == ["plain", "plain"] and model.overrides["hidden_size"] == 48
        assert model.overrides["patch_size"] == 4 and augmentation.mixup == 0.5 and args.timm_optim == "nmuon"

    @pytest.mark.parametrize("words", [["digits"], ["defaults", "--train_dir", "."], []])
    def test_a_time_for_another_recipe_is_refused(self, words, capsys):
        with pytest.raises(SystemExit):
            main([*words, "--time_budget", "1h"])
        assert "--time_budget is for the recipe auto" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["20", "soon", "-5min", "0s", ""])
    def test_a_time_that_is_none(self, text, photos, tmp_path):
        with pytest.raises(ValueError, match="must be a time with its unit"):
            seconds_of(text)
        with pytest.raises(SystemExit, match="--time_budget must be a time with its unit, such as 20min"):
            main(["auto", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), f"--time_budget={text}"])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text, seconds", [("90s", 90), ("20min", 1200), ("1h30min", 5400), ("1.5h", 5400)])
    def test_times(self, text, seconds):
        assert seconds_of(text) == seconds

    def test_no_stream(self):
        with pytest.raises(SystemExit, match="looks at the whole data first, which a stream"):
            main(["auto", "--dataset_name", "somewhere", "--streaming", "--max_steps", "3"])

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(SystemExit, match="There is no folder"):
            main(["--train_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")])


class TestLook:
    def test_facts(self, photos):
        data = load(photos)
        facts = look(data.train, data.labels, evaluated=7, for_statistics=512)
        assert facts.images == facts.for_statistics == len(data.train) and facts.labels == 3 and facts.evaluated == 7
        assert (facts.height, facts.width, facts.grey) == (24, 30, False)
        assert facts.fewest <= facts.images / 3 <= facts.most

    def test_grey(self, tmp_path, photos):
        from PIL import Image

        for file in photos.rglob("*.png"):
            target = tmp_path / "grey" / file.relative_to(photos)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).convert("L").save(target)
        data = load(tmp_path / "grey")
        assert look(data.train, data.labels, evaluated=1, for_statistics=1).grey

    def test_damaged_files_are_passed_over_here(self, tmp_path):
        """The training lists them all."""
        folder = write_folder(tmp_path / "photos", 10)
        (folder / "red" / "0.png").write_bytes(b"no image")
        data = load(folder)
        rows = data.train if any(row["image"]["path"].endswith("red/0.png") for row in data.train) else data.evaluation
        assert look(rows, data.labels, evaluated=1, for_statistics=1).height == 24


@pytest.mark.parametrize("workers", [0, 1])
def test_timing_leaves_nothing(photos, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    options = {
        "train_dir": str(photos), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 8,
        "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0,
    }  # fmt: skip
    network = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    speed = measure_speed(to_arguments({**options, "config_overrides": network}), load(photos))
    assert speed.step > 0 and speed.evaluated > 0
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
