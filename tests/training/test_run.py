"""The whole job on real and synthetic images: train, evaluate, save, load, answer."""

import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from refiner_hf.commands.train import main
from refiner_hf.commands.training_options import parse_arguments
from refiner_hf.data.images import decode_image
from refiner_hf.data.seeded_sampling import SeededSampler
from refiner_hf.training.run import run
from refiner_hf.training.trainer import RefinerTrainer
from refiner_hf.utils.confusions import scores_by_label
from refiner_hf.utils.flops import count_flops
from refiner_hf.utils.norm_statistics import reestimate_norm_statistics

from ..conftest import assert_close, load_json
from ..images import COLOURS, write_folder
from ..parsed_card import Card, shown


TINY = json.dumps(dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2))
QUICK = [
    "--config_overrides", TINY, "--crop_pct", "1.0", "--num_train_epochs", "1", "--per_device_train_batch_size", "8",
    "--report_to", "none", "--use_cpu", "--learning_rate", "0.002", "--disable_tqdm", "True",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def more_photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("more_data") / "photos", per_label=20)


@pytest.fixture(scope="module")
def trained(more_photos, tmp_path_factory):
    """A finished folder: a few epochs on the coloured photos."""
    folder = tmp_path_factory.mktemp("runs") / "colours"
    result = main(
        [
            "defaults",
            "--train_dir", str(more_photos), "--output_dir", str(folder), *QUICK, "--num_train_epochs", "4",
            "--train_val_split", "0.25", "--eval_strategy", "epoch", "--logging_steps", "1", "--with_code",
            "--weights_license", "apache-2.0", "--example_pictures", "8", "--analysis_images", "5",
            "--adam_epsilon", "1e-7",
        ]
    )  # fmt: skip
    return folder, result


def confusion_matrix(folder) -> list[list[int]]:
    rows = list(csv.reader((folder / "confusion_matrix.csv").open()))
    return [[int(cell) for cell in row[1:]] for row in rows[1:]]


class TestFinishedFolder:
    def test_it_learned(self, trained):
        assert trained[1].metrics["eval_accuracy"] >= 5 / 6

    def test_norms_have_the_statistics_of_the_training_images(self, trained):
        folder, result = trained
        model = AutoModelForImageClassification.from_pretrained(folder)
        saved = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
        images = [decode_image(row["image"]) for row in result.data.train]
        pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
        assert reestimate_norm_statistics(model, [pixels]) == len(images)
        for name, buffer in saved.items():
            assert_close(buffer, model.get_buffer(name), 1e-4, name)

    def test_holds_everything_and_nothing_else(self, trained):
        folder, result = trained
        names = {path.name for path in folder.iterdir() if not path.name.endswith("_refiner.py")}
        names -= {name for name in names if name.startswith("checkpoint-")}
        assert names == {
            "README.md", "model.safetensors", "config.json", "preprocessor_config.json", "learning_curve.png",
            "confusion_matrix.png", "confusion_matrix.csv", "by_label.csv", "predictions.png", "all_results.json",
            "eval_results.json", "baseline_results.json", "train_results.json", "trainer_state.json",
            "training_arguments.json", "examples", "analysis", "_data.json",
        } | ({"mistakes.png"} if result.metrics["eval_accuracy"] < 1 else set())  # fmt: skip

    @pytest.fixture
    def card(self, trained):
        return Card((trained[0] / "README.md").read_bytes())

    def test_metadata_of_the_card(self, trained, card):
        (model,) = card.data.pop("model-index")
        (result,) = model["results"]
        assert card.data == {
            "library_name": "transformers", "pipeline_tag": "image-classification", "license": "apache-2.0",
            "tags": ["refiner", "vision", "image-classification", "custom_code"], "metrics": ["accuracy", "f1"],
        }  # fmt: skip
        split = f"{len(trained[1].data.evaluation)} of 60 images held out of train"
        assert (result["dataset"]["name"], result["dataset"]["split"]) == ("photos", split)
        measured = {"accuracy": "eval_accuracy", "f1": "eval_f1_macro"}
        for metric, (kind, name) in zip(result["metrics"], measured.items(), strict=True):
            assert (metric["type"], metric["value"]) == (kind, pytest.approx(trained[1].metrics[name], abs=1e-6))

    def test_numbers_of_the_card(self, trained, card):
        folder, result = trained
        held, measured = len(result.data.evaluation), card.table("Results")
        speed = measured.pop("Evaluation speed, reading images included")
        rate = result.metrics["eval_samples_per_second"]
        assert re.fullmatch(r"([\d.]+) images/s on (?:CPU|\d+ x) .*", speed)[1] == f"{rate:.1f}"
        assert measured == {
            "Top-1 accuracy": f"{result.metrics['eval_accuracy']:.2%}",
            "Macro F1": f"{result.metrics['eval_f1_macro']:.2%}",
            "Expected calibration error of the scores, in 15 bins": (
                f"{result.metrics['eval_calibration_error']:.2%}"
            ),
            f"Logistic regression on thumbnails of 16 x 16 pixels, trained on {60 - held} images": (
                f"{result.baseline.value:.2%}"
            ),
            "Loss": f"{result.metrics['eval_loss']:.4f}",
        }
        found = dict(zip(sorted(COLOURS), scores_by_label(confusion_matrix(folder))))
        lines = [line.strip("| ").split(" | ") for line in card.sections["By label"].splitlines() if line[:1] == "|"]
        assert lines[0] == ["label", "images", "precision", "recall", "F1"]
        assert {name: cells for name, *cells in lines[2:]} == {
            name: [str(each.images), *(f"{share:.2%}" for share in each[1:])] for name, each in found.items()
        }
        assert card.numbers("Results") == [held, held, 60] and card.numbers("Data") == [60 - held, held, held, 60]
        assert f"{result.metrics['train_samples_per_second']:.1f} images/s" in card.sections["How it was made"]
        model, network = AutoModelForImageClassification.from_pretrained(folder), card.table("The network")
        assert network["parameters"] == f"{model.num_parameters():,}" and network["labels"] == "3"
        flops = float(network["cost of an image"].removesuffix(" GFLOP (2 per multiply-add)"))
        assert 1e9 * flops == pytest.approx(count_flops(model), rel=0.01)

    def test_options_of_the_card(self, trained, card):
        """Whatever it lists has the value that the run had, and what the command was given is there."""
        folder, _ = trained
        run = load_json(folder / "training_arguments.json")
        had = load_json(folder / "config.json") | run["training"] | run["augmentation"] | run["data"]
        had["crop_pct (evaluation)"] = load_json(folder / "preprocessor_config.json")["crop_pct"]
        options = card.table("How it was made")
        assert options == {name: shown(had[name]) for name in options}
        given = {"num_train_epochs": "4", "learning_rate": "0.002", "per_device_train_batch_size": "8",
                 "train_val_split": "0.25", "crop_pct (evaluation)": "1", "adam_epsilon": "1e-07"}  # fmt: skip
        assert options.items() >= given.items()
        assert {"seed", "drop_path_rate", *run["augmentation"]} <= options.keys()

    def test_pictures_of_the_card(self, trained, card):
        names = [f"analysis/{name}.png" for name in ("analysis_curves", "analysis_layers", "layers", "heads")]
        mistakes = ["mistakes.png"] if trained[1].metrics["eval_accuracy"] < 1 else []
        assert card.pictures == ["learning_curve.png", "confusion_matrix.png", "predictions.png", *mistakes, *names]
        assert all(min(Image.open(trained[0] / name).size) > 200 for name in card.pictures)

    def test_example_of_the_card(self, trained, card, photos, tmp_path, monkeypatch, capsys):
        """A reader runs it beside the folder, with a picture of their own."""
        (tmp_path / trained[0].name).symlink_to(trained[0])
        (tmp_path / "photo.jpg").symlink_to(photos / "red" / "0.png")
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(card.code, names)
        answers = pipeline("image-classification", model=str(trained[0]))(str(photos / "red" / "0.png"), top_k=5)
        assert names["classify"]("photo.jpg", top_k=5) == answers
        assert str(answers) in capsys.readouterr().out
        assert "import refiner_hf" not in card.code, "the folder has its own code"

    def test_no_path_of_this_machine_is_published(self, trained):
        folder, _ = trained
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".md", ".csv"):
                assert str(folder.parent) not in path.read_text() and "/data0/" not in path.read_text(), path.name
        assert load_json(folder / "training_arguments.json")["data"]["train_dir"] == "photos"

    def test_example_pictures(self, trained):
        """From all over the evaluation images, with the answers of the model as it is in the folder."""
        folder, result = trained
        rows = result.data.evaluation
        rows = [rows[i * len(rows) // 8] for i in range(8)]
        images = [decode_image(row["image"]) for row in rows]
        answers = pipeline("image-classification", model=str(folder))(images, top_k=1)
        for example, row, image, (answer,) in zip(result.examples, rows, images, answers, strict=True):
            assert example.image == image and example.label == result.data.labels[row["labels"]]
            assert (example.answer, example.score) == (answer["label"], pytest.approx(answer["score"]))
        saved = sorted((folder / "examples").iterdir())
        assert [path.name for path in saved] == [f"{i}.png" for i in range(8)]
        assert all(Image.open(path).tobytes() == image.tobytes() for path, image in zip(saved, images))

    def test_analysis(self, trained):
        (network,) = load_json(trained[0] / "analysis" / "analysis.json")["networks"]
        assert (network["name"], network["images"]) == ("colours", 5)

    def test_each_label_is_beside_the_model(self, trained):
        folder, result = trained
        rows = list(csv.DictReader((folder / "by_label.csv").open()))
        assert [row["label"] for row in rows] == sorted(COLOURS)
        assert sum(int(row["images"]) for row in rows) == len(result.data.evaluation)
        macro = sum(float(row["f1"]) for row in rows if int(row["images"])) / 3
        assert macro == pytest.approx(result.metrics["eval_f1_macro"])

    def test_metrics_are_beside_the_model(self, trained):
        folder, result = trained
        assert load_json(folder / "all_results.json")["eval_accuracy"] == result.metrics["eval_accuracy"]
        rows = list(csv.reader((folder / "confusion_matrix.csv").open()))
        assert [row[0] for row in rows[1:]] == sorted(COLOURS) == rows[0][1:]
        assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == len(result.data.evaluation)

    def test_loads_and_answers_in_a_pipeline(self, trained, photos):
        folder, result = trained
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        assert AutoImageProcessor.from_pretrained(folder).crop_pct == 1.0
        classify = pipeline("image-classification", model=str(folder))
        path = photos / "red" / "0.png"
        by_path = classify(str(path))
        assert {answer["label"] for answer in by_path} == set(COLOURS)
        assert sum(answer["score"] for answer in by_path) == pytest.approx(1, abs=1e-4)
        assert classify(Image.open(path)) == by_path
        assert classify([str(path), str(path)]) == [by_path, by_path]
        assert classify(Image.open(path).convert("L"))[0]["score"] > 0
        assert classify([Image.open(path)] * 3, batch_size=2)[2][0]["score"] == pytest.approx(by_path[0]["score"])

    def test_pipeline_answers_as_the_evaluation_measured(self, trained):
        folder, result = trained
        classify = pipeline("image-classification", model=str(folder))
        right = sum(
            classify(decode_image(row["image"]))[0]["label"] == result.data.labels[row["labels"]]
            for row in result.data.evaluation
        )
        assert right / len(result.data.evaluation) == result.metrics["eval_accuracy"]

    def test_finished_runs_are_not_overwritten(self, trained, photos):
        folder, _ = trained
        before = (folder / "model.safetensors").read_bytes()
        evaluate = ["--model_name_or_path", str(folder), "--train_dir", str(photos), "--do_eval"]
        with pytest.raises(SystemExit, match="finished training run"):
            main([*evaluate, "--output_dir", str(folder)])
        with pytest.raises(SystemExit, match="finished training run"):
            main(["defaults", "--train_dir", str(photos), "--output_dir", str(folder), *QUICK])
        assert (folder / "model.safetensors").read_bytes() == before


REMOTE = """
import sys
sys.modules["refiner_hf"] = None  # importing it fails, as where it isn't installed
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
folder, picture = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules"), type(config)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
larger = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, image_size=24)
assert larger.base_model.embeddings.position_embeddings.shape[1] == 37
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(base).__name__ == "RefinerModel" and type(processor).__name__ == "RefinerImageProcessor"
from PIL import Image
pixels = processor(Image.open(picture), return_tensors="pt").pixel_values
with torch.no_grad():
    assert base(pixels).last_hidden_state.shape[1] == 17
    print("LOGITS", *model(pixels).logits[0].tolist())
print("PIPELINE", pipeline("image-classification", model=folder, trust_remote_code=True)(picture)[0]["label"])
"""


def test_code_in_the_folder_serves_where_the_package_is_not_installed(trained, photos, tmp_path):
    folder, _ = trained
    picture = photos / "green" / "1.png"
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(folder), str(picture)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = dict(line.split(" ", 1) for line in run.stdout.splitlines() if line.startswith(("LOGITS", "PIPELINE")))
    model = AutoModelForImageClassification.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixels).logits[0].tolist()
    assert [float(x) for x in said["LOGITS"].split()] == pytest.approx(expected, abs=1e-5)
    assert said["PIPELINE"] in COLOURS


class TestEvaluationOnly:
    def test_in_the_models_label_order(self, trained, tmp_path):
        folder, _ = trained
        # Folder names of two labels only: their positions differ from the model's.
        data = write_folder(tmp_path / "data", 4, ("green", "red"))
        result = main(
            ["--model_name_or_path", str(folder), "--validation_dir", str(data), "--do_eval", "--use_cpu",
             "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
        )  # fmt: skip
        assert result.metrics["eval_accuracy"] >= 7 / 8 and not result.trained
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "all_results.json", "eval_results.json", "confusion_matrix.csv", "by_label.csv"
        }  # fmt: skip

    def test_confusions(self, trained, tmp_path):
        """True labels down, predicted ones across."""
        data = write_folder(tmp_path / "data", 4, ("green", "red"))
        (data / "green").rename(data / "blue")
        main(
            ["--model_name_or_path", str(trained[0]), "--validation_dir", str(data), "--do_eval", "--use_cpu",
             "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
        )  # fmt: skip
        rows = list(csv.DictReader((tmp_path / "out" / "confusion_matrix.csv").open()))
        blue, green, red = ({label: int(row[label]) for label in COLOURS} for row in rows)
        assert blue["green"] >= 3 and red["red"] >= 3 and green == dict.fromkeys(COLOURS, 0)

    def test_unknown_labels_are_listed(self, trained, tmp_path):
        data = write_folder(tmp_path / "data", 2, ("green", "violet"))
        with pytest.raises(SystemExit, match="know: violet.*lacks: blue, red"):
            main(
                ["--model_name_or_path", str(trained[0]), "--validation_dir", str(data), "--do_eval", "--use_cpu",
                 "--output_dir", str(tmp_path / "out")]
            )  # fmt: skip

    def test_does_not_change_the_models_statistics(self, trained, tmp_path, more_photos):
        folder, result = trained
        data = ["--train_dir", str(more_photos), "--train_val_split", "0.25"]
        again = main(
            [
                "--model_name_or_path",
                str(folder),
                *data,
                "--do_eval",
                "--use_cpu",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        assert again.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)


class TestFineTuning:
    def fine_tune(self, folder, data, out, *more):
        return main(
            ["fine_tune", "--model_name_or_path", str(folder), "--train_dir", str(data), "--output_dir", str(out),
             "--num_train_epochs", "1", "--use_cpu", "--dataloader_num_workers", "0", "--report_to", "none",
             "--disable_tqdm", "True", *more]
        )  # fmt: skip

    def test_other_labels_replace_the_heads_and_say_so(self, trained, tmp_path, monkeypatch):
        from refiner_hf.training import initial_model

        said = []
        monkeypatch.setattr(initial_model.logger, "warning", said.append)
        data = write_folder(tmp_path / "data", 6, ("cat", "dog", "fox"))  # as many as before, but others
        self.fine_tune(trained[0], data, tmp_path / "out", "--learning_rate", "1e-9")
        assert any("classifiers are replaced" in line for line in said)
        old = AutoModelForImageClassification.from_pretrained(trained[0])
        new = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert new.config.id2label == {0: "cat", 1: "dog", 2: "fox"}
        assert not torch.allclose(new.classifier.weight, old.classifier.weight, atol=1e-3)
        assert torch.allclose(new.refiner.layers[0].mlp.fc1.weight, old.refiner.layers[0].mlp.fc1.weight, atol=1e-6)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "by fine-tuning `colours`" in card

    def test_the_same_labels_keep_the_heads(self, trained, tmp_path, photos):
        result = self.fine_tune(trained[0], photos, tmp_path / "out", "--learning_rate", "1e-9", "--freeze_norms")
        assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_pct == 1.0  # as the checkpoint's
        assert result.metrics["eval_accuracy"] >= 0.75
        old = AutoModelForImageClassification.from_pretrained(trained[0])
        new = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        for name, tensor in old.state_dict().items():
            assert torch.allclose(new.state_dict()[name].float(), tensor.float(), atol=1e-6), name

    def test_labels_in_another_order_than_the_datas(self, trained, tmp_path, photos):
        """The heads keep the checkpoint's order, and training follows it as evaluation does."""
        model, order = AutoModelForImageClassification.from_pretrained(trained[0]), [2, 0, 1]
        with torch.no_grad():
            for parameter in (*model.classifier.parameters(), *model.dense_classifier.parameters()):
                parameter.copy_(parameter[order].clone())
        names = [model.config.id2label[i] for i in order]
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
        model.save_pretrained(shutil.copytree(trained[0], tmp_path / "turned"))
        measured = [
            self.fine_tune(folder, photos, tmp_path / f"out_of_{folder.name}", "--learning_rate", "1e-9").metrics
            for folder in (trained[0], tmp_path / "turned")
        ]
        for name in ("train_loss", "eval_loss"):
            assert measured[1][name] == pytest.approx(measured[0][name], rel=1e-4)

    def test_at_another_image_size(self, trained, tmp_path, photos):
        self.fine_tune(trained[0], photos, tmp_path / "out", "--image_size", "24")
        new = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert new.config.image_size == 24 and new.refiner.embeddings.position_embeddings.shape == (1, 37, 24)
        assert dict(AutoImageProcessor.from_pretrained(tmp_path / "out").size) == {"height": 24, "width": 24}

    def test_what_can_not_classify_images(self, tmp_path, photos):
        from transformers import BertConfig

        BertConfig().save_pretrained(tmp_path / "bert")
        with pytest.raises(SystemExit, match="'bert' model, of which there is no image classifier"):
            self.fine_tune(tmp_path / "bert", photos, tmp_path / "out")


class TestMoreData:
    def test_the_card_names_the_augmentation_and_has_no_pictures_unasked(self, tmp_path, photos):
        main(
            ["imagenet_s_224", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), "--max_steps", "2",
             "--config_overrides", TINY, "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False",
             "--per_device_train_batch_size", "4", "--use_cpu", "--eval_strategy", "no", "--save_strategy", "no",
             "--report_to", "none", "--disable_tqdm", "True"]
        )  # fmt: skip
        card = (tmp_path / "out" / "README.md").read_text()
        assert "rand-m9-mstd0.5-inc1" in card and "predictions.png" not in card
        assert not {"examples", "predictions.png"} & {path.name for path in (tmp_path / "out").iterdir()}

    def test_stream(self, tmp_path, photos):
        table = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
        for name in ("train", "validation"):
            table.to_parquet(str(tmp_path / "tables" / f"{name}.parquet"))
        command = ["defaults", "--dataset_name", str(tmp_path / "tables"), "--streaming", *QUICK, "--output_dir"]
        with pytest.raises(SystemExit, match="--max_steps"):
            main([*command, str(tmp_path / "first")])
        for_card = ["--example_pictures", "2", "--analysis_images", "4"]
        result = main([*command, str(tmp_path / "out"), "--max_steps", "3", *for_card])
        assert 0 <= result.metrics["eval_accuracy"] <= 1
        assert (tmp_path / "out" / "predictions.png").exists()
        assert load_json(tmp_path / "out" / "analysis" / "analysis.json")["networks"][0]["images"] == 4

    def test_options_of_the_images_order(self, tmp_path, photos, monkeypatch):
        """A seed of its own, in a folder and in a stream, and what to do with a stream's unreadable images."""
        trainers = []

        def stop(trainer, **kwargs):
            trainers.append(trainer)
            raise ValueError("far enough")

        monkeypatch.setattr(RefinerTrainer, "train", stop)
        datasets.load_dataset("imagefolder", data_dir=str(photos), split="train").to_parquet(
            str(tmp_path / "tables" / "train.parquet")
        )
        for name, words in {
            "folder": ["defaults", "--train_dir", str(photos)],
            "stream": ["defaults", "--dataset_name", str(tmp_path / "tables"), "--streaming", "--max_steps", "3"],
        }.items():
            words += ["--output_dir", str(tmp_path / name), "--do_train", "--data_seed", "7"]
            with pytest.raises(SystemExit, match="far enough"):
                main([*words, *QUICK, "--unreadable_images", "skip"])
        folder, stream = trainers
        assert list(folder._get_train_sampler()) == list(SeededSampler(folder.train_dataset, 7))
        assert stream.train_dataset.seed == 7 and stream.train_dataset.skip_unreadable

    def test_a_failed_analysis_costs_nothing_else(self, tmp_path, photos, monkeypatch):
        from refiner_hf.training import finished_folder

        def fail(*args):
            raise RuntimeError("out of memory")

        said = []
        monkeypatch.setattr(finished_folder, "analyze_folder", fail)
        monkeypatch.setattr(finished_folder.logger, "warning", said.append)
        words = ["defaults", "--train_dir", str(photos), *QUICK, "--max_steps", "1", "--analysis_images", "4"]
        main([*words, "--output_dir", str(tmp_path / "out")])
        assert "out of memory" in said[0] and "refiner analyze" in said[0]
        assert "](analysis" not in (tmp_path / "out" / "README.md").read_text()

    def test_a_file_of_options_is_the_one_argument(self, tmp_path, photos):
        options = {
            "train_dir": str(photos), "output_dir": str(tmp_path / "out"), "config_overrides": json.loads(TINY),
            "max_steps": 1, "use_cpu": True, "do_train": True, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "per_device_train_batch_size": 4,
        }  # fmt: skip
        for name in ("options.json", "options.yaml"):
            (tmp_path / name).write_text(json.dumps(options))
        result = main([str(tmp_path / "options.json")])
        assert result.trained and "eval_accuracy" not in result.metrics
        result = main([str(tmp_path / "options.yaml"), "--output_dir", str(tmp_path / "other"), "--seed", "7"])
        assert load_json(tmp_path / "other" / "training_arguments.json")["training"]["seed"] == 7


class TestBadInput:
    @pytest.mark.parametrize(
        "words, message",
        [
            (["--config_overrides", "{hidden"], "JSON"),
            (["--config_overrides", "[1]"], "JSON object"),
            (["--remove_unused_columns", "True"], "drop the images"),
            (["--norm_statistics_images", "-1"], "norm_statistics_images"),
            (["--no_such_option", "1"], "no_such_option"),
            (["--model_size", "huge"], "huge"),
            (["--config_overrides", '{"expansion_rate": 6}'], "expansion_rate"),
            (["--config_overrides", '{"num_labels": 7}'], "num_labels"),
            (["--random_erasing", "2"], "random_erasing"),
            (["--label_smoothing_factor", "2"], "label_smoothing_factor"),
            (["--crop_pct", "-1"], "crop_pct"),
            (["--do_train", "False"], "Nothing to do"),
        ],
    )
    def test_options(self, tmp_path, photos, words, message, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK, *words])
        assert message in f"{stopped.value}{capsys.readouterr().err}"
        assert not (tmp_path / "out").exists()

    def test_unknown_augmentation(self, tmp_path, photos):
        words = ["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK]
        with pytest.raises(SystemExit, match="--auto_augment nonsense"):
            main([*words, "--auto_augment", "nonsense"])

    def test_evaluation_without_a_model(self, tmp_path, photos):
        with pytest.raises(SystemExit, match="--model_name_or_path"):
            main(
                [
                    "defaults",
                    "--train_dir",
                    str(photos),
                    "--output_dir",
                    str(tmp_path / "out"),
                    "--do_eval",
                    "--use_cpu",
                ]
            )

    def test_one_label(self, tmp_path):
        data = write_folder(tmp_path / "data", labels=("red",))
        with pytest.raises(SystemExit, match="one label only"):
            main(["defaults", "--train_dir", str(data), "--output_dir", str(tmp_path / "out"), *QUICK])

    def test_file_that_is_no_recipe(self, tmp_path):
        (tmp_path / "options.yaml").write_text("a: [b")
        with pytest.raises(SystemExit, match="options.yaml isn't"):
            main([str(tmp_path / "options.yaml")])

    @pytest.mark.parametrize(
        "overrides, says",
        [
            ('{"hidden_size": 48}', "another shape than the network's in classifier.weight"),
            ('{"num_hidden_layers": 1}', "2 entries for num_hidden_layers=1"),
            ('{"hidden_act": "x"}', "hidden_act is 'x'"),
        ],
    )
    def test_overrides_that_do_not_fit_a_checkpoint(self, trained, tmp_path, photos, overrides, says):
        with pytest.raises(SystemExit, match=says):
            main(
                ["--model_name_or_path", str(trained[0]), "--train_dir", str(photos), "--use_cpu",
                 "--output_dir", str(tmp_path / "out"), "--config_overrides", overrides]
            )  # fmt: skip

    def test_missing_recipe(self):
        with pytest.raises(SystemExit, match="digits, fine_tune, imagenet_l_224"):
            main(["fast_recipe"])

    def test_folder_that_can_not_be_written(self, tmp_path, photos):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="can't be written"):
            main(["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path / "file" / "out"), *QUICK])

    def test_folder_with_other_things_in_it(self, tmp_path, photos):
        (tmp_path / "thesis.txt").write_text("dear")
        with pytest.raises(SystemExit, match="isn't empty"):
            main(["defaults", "--train_dir", str(photos), "--output_dir", str(tmp_path), *QUICK])
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_damaged_picture_is_named(self, tmp_path):
        data = write_folder(tmp_path / "data")
        (data / "red" / "3.png").write_bytes(b"\x89PNG broken")
        with pytest.raises(SystemExit, match=r"3\.png"):
            main(["defaults", "--train_dir", str(data), "--output_dir", str(tmp_path / "out"), *QUICK])

    def test_architecture_that_does_not_fit(self, tmp_path, photos):
        with pytest.raises(SystemExit, match="multiple"):
            main(
                [
                    "defaults",
                    "--train_dir",
                    str(photos),
                    "--output_dir",
                    str(tmp_path / "out"),
                    *QUICK,
                    "--image_size",
                    "18",
                ]
            )


def test_what_codecarbon_measured_is_in_the_card(tmp_path, photos, monkeypatch):
    """codecarbon itself asks the network where it is, so here is the file that it leaves."""
    import refiner_hf.training.run as module

    def leave_a_file(args):
        (tmp_path / "out" / "emissions.csv").write_text(
            "timestamp,duration,emissions,energy_consumed,country_name,longitude,cpu_model,gpu_count,gpu_model\n"
            "2026-01-01,1,0.5,0.9,France,2.3,A CPU,0,\n2026-01-02,1,0.00012345,0.00098765,Canada,-71.2,A CPU,0,\n"
        )

    monkeypatch.setattr(module, "set_seed", leave_a_file)
    main(["defaults", "--train_dir", str(photos), *QUICK, "--output_dir", str(tmp_path / "out"), "--do_train"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["co2_eq_emissions"] == {
        "emissions": 0.123, "source": "codecarbon", "training_type": "pre-training",
        "geographical_location": "Canada", "hardware_used": "A CPU",
    }  # fmt: skip
    assert "it took 0.000988 kWh and emitted 0.123 g of CO2 equivalent, with the electricity of Canada" in card.text


@pytest.mark.slow
def test_codecarbon_itself(tmp_path, photos):
    pytest.importorskip("codecarbon")
    options = ["defaults", "--train_dir", str(photos), *QUICK, "--output_dir", str(tmp_path / "out"), "--do_train"]
    main([*options, "--report_to", "codecarbon"])
    emissions = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()["co2_eq_emissions"]
    assert emissions["emissions"] > 0 and emissions["source"] == "codecarbon"


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, photos):
    """kill -9 after a checkpoint, then the same command again: the losses are those of an unbroken run."""
    command = [
        sys.executable, "scripts/train.py", "defaults", "--train_dir", str(photos), *QUICK, "--num_train_epochs", "12",
        "--save_strategy", "epoch", "--logging_steps", "1", "--train_val_split", "0.34",
    ]  # fmt: skip

    def history(folder):
        return [e["loss"] for e in load_json(folder / "trainer_state.json")["log_history"] if "loss" in e]

    subprocess.run([*command, "--output_dir", str(tmp_path / "unbroken")], check=True, capture_output=True)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--output_dir", str(tmp_path / "broken")], stdout=log, stderr=log)
        deadline = time.time() + 120
        while (
            not list((tmp_path / "broken").glob("checkpoint-*/trainer_state.json"))
            and process.poll() is None
            and time.time() < deadline
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "broken" / "README.md").exists(), "it finished before it was killed"
    again = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "broken")], check=True, capture_output=True, text=True
    )
    assert "Continuing from" in again.stderr + again.stdout
    assert history(tmp_path / "broken") == pytest.approx(history(tmp_path / "unbroken"), rel=1e-4)
    assert " steps in " in (tmp_path / "unbroken" / "README.md").read_text()
    assert " steps in " not in (tmp_path / "broken" / "README.md").read_text()


def test_a_checkpoint_that_was_cut_off_is_left_aside(tmp_path, photos, monkeypatch):
    from refiner_hf.training import output_folder

    said = []
    monkeypatch.setattr(output_folder.logger, "warning", said.append)
    options = [
        "defaults",
        "--train_dir", str(photos), *QUICK, "--num_train_epochs", "3", "--save_strategy", "epoch", "--do_train",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    main(options)
    for name in ("train_results.json", "README.md"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "checkpoint-9" / "trainer_state.json").write_text('{"epoch": ')
    other = write_folder(tmp_path / "data", labels=("cat", "dog"))
    with pytest.raises(SystemExit, match="train_dir was 'photos' and is now 'data'"):
        main([*options[:2], str(other), *options[3:]])
    measured = main(options).metrics
    assert not [name for name in measured if name.startswith("train_")], "they are of the last part alone"
    assert any("checkpoint-9 is damaged: trainer_state.json can't be read" in line for line in said)
    assert any("Continuing from" in line and "checkpoint-6" in line for line in said)
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.slow
def test_digits_reach_98_percent(tmp_path):
    """The embedded default as a user runs it, whole."""
    run = subprocess.run(
        [sys.executable, "scripts/train.py", "--output_dir", str(tmp_path / "demo")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert load_json(tmp_path / "demo" / "eval_results.json")["eval_accuracy"] >= 0.98
    assert "Logistic regression on thumbnails of 8 x 8 pixels" in run.stdout and "96.94%" in run.stdout
    assert "behind this linear model" not in run.stdout


def test_digits_in_short(tmp_path, capsys):
    result = main(
        ["--output_dir", str(tmp_path / "demo"), "--max_steps", "30", "--eval_strategy", "no", "--use_cpu",
         "--save_strategy", "no", "--disable_tqdm", "True"]
    )  # fmt: skip
    assert result.metrics["eval_accuracy"] > 0.3
    assert "eval_top5_accuracy" in result.metrics
    assert (tmp_path / "demo" / "mistakes.png").exists()  # 30 steps don't get all right
    said = capsys.readouterr().out
    assert "Logistic regression on thumbnails of 8 x 8 pixels, trained on 1,437 of the same images" in said
    assert "The network is behind this linear model" in said and "held-out pictures" in said
    assert 0.95 < load_json(tmp_path / "demo" / "baseline_results.json")["baseline_accuracy"] < 0.98
    card = (tmp_path / "demo" / "README.md").read_text()
    assert "| Logistic regression on thumbnails of 8 x 8 pixels, trained on 1,437 images | 9" in card
    assert str(tmp_path / "demo") in said


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for text in ("refiner train fine_tune --model_name_or_path", "--train_dir", "--learning_rate", "--with_code"):
        assert text in said


def test_curves_for_tensorboard(tmp_path, photos):
    # For some seconds: tensorboardX names its files by the second, and the last evaluation begins a new one.
    main(
        ["defaults",
         "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK, "--report_to", "tensorboard",
         "--logging_steps", "1", "--eval_strategy", "epoch", "--ema_decay", "0.9", "--num_train_epochs", "20"]
    )  # fmt: skip
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("events.out.tfevents.*"))
    for curve in ("train/loss", "train/learning_rate", "train/images_per_second", "train/grad_norm", "eval/loss",
                  "eval/accuracy", "eval/ema_accuracy", "eval/ema_loss"):  # fmt: skip
        assert curve.encode() in content, curve


def test_what_is_unreadable_stops_or_is_left_out(tmp_path, monkeypatch):
    folders, damaged = [write_folder(tmp_path / name) for name in ("photos", "others")], []
    for folder, name in zip(folders, ("red/1.png", "blue/2.png")):
        damaged.append(folder / name)
        damaged[-1].write_bytes(damaged[-1].read_bytes()[:150])
    words = ["defaults", "--train_dir", str(folders[0]), "--validation_dir", str(folders[1]), *QUICK]
    with pytest.raises(SystemExit, match=r"(?s)2 images can't be read.*red/1\.png.*blue/2\.png"):
        main([*words, "--output_dir", str(tmp_path / "stopped")])
    result = main([*words, "--output_dir", str(tmp_path / "out"), "--unreadable_images", "skip"])
    assert (len(result.data.train), len(result.data.evaluation)) == (23, 23)
    listed = (tmp_path / "out" / "_unreadable_images.txt").read_text().splitlines()
    assert len(listed) == 2 and all(str(file) in line for file, line in zip(damaged, listed))


def test_an_odd_batch_can_not_be_mixed(tmp_path, photos):
    with pytest.raises(SystemExit, match="need an even --per_device_train_batch_size"):
        main(
            ["defaults", "--train_dir", str(photos), *QUICK, "--output_dir", str(tmp_path / "out"), "--mixup", "1",
             "--per_device_train_batch_size", "3"]
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("--bf16",), ("--gradient_checkpointing",), ("--torch_compile",), ("--bf16", "--gradient_checkpointing")],
    ids=" ".join,
)
def test_ways_to_train(tmp_path, photos, words):
    """With everything of a recipe on, they learn as plain float32 does."""
    everything = [
        "defaults",
        "--train_dir", str(photos), *QUICK, "--num_train_epochs", "6", "--mixup", "0.2", "--ema_decay", "0.8",
        "--logging_steps", "1", "--label_smoothing_factor", "0.1",
    ]  # fmt: skip
    losses = []
    for name, more in (("plain", ()), ("other", words)):
        main([*everything, "--output_dir", str(tmp_path / name), *more])
        history = load_json(tmp_path / name / "trainer_state.json")["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=0.02)
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.15) and losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("kind", ["folder", "stream", "pushed"])
def test_the_arguments_stay_as_they_were_given(kind, tmp_path, photos, hub, monkeypatch):
    """Whoever calls `run` again with them starts the same run."""
    words = ["defaults", "--train_dir", str(photos), "--max_steps", "1", "--learning_rate_batch_size", "3"]
    if kind == "stream":
        data = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
        data.to_parquet(str(tmp_path / "tables" / "train.parquet"))
        data.select(range(3)).to_parquet(str(tmp_path / "tables" / "test.parquet"))
        words[:3] = ["defaults", "--dataset_name", str(tmp_path / "tables"), "--streaming"]
    if kind == "pushed":
        hub.add_user("alice")
        monkeypatch.setenv("HF_TOKEN", hub.add_token("alice"))
        words += ["--push_to_hub", "--hub_model_id", "mine"]
    groups = parse_arguments([*words, *QUICK, "--output_dir", str(tmp_path / "out")])
    given = [{field.name: copy.copy(getattr(group, field.name)) for field in fields(group)} for group in groups]
    run(*groups)
    assert [{field.name: getattr(group, field.name) for field in fields(group)} for group in groups] == given
