"""Several labels an image, and numbers: from a folder with metadata to the finished model."""

import csv

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from sklearn.metrics import average_precision_score, f1_score, r2_score
from transformers import EvalPrediction, pipeline

from refiner_hf.commands.predict import main as predict
from refiner_hf.commands.train import main
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.labels import LabelValues, as_label_lists, as_numbers
from refiner_hf.data.sources import load_image_data
from refiner_hf.training.metrics import MultiLabelMetrics, RegressionMetrics

from ..conftest import load_json
from ..images import write_folder
from .test_run import QUICK


MULTI, NUMBERS = "multi_label_classification", "regression"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The coloured photos, all in one folder, described by a metadata.csv: labels (warm, cold, none), and a number."""
    place = tmp_path_factory.mktemp("data")
    photos = write_folder(place / "colours", 24)
    said = {"red": ("warm; bright", 1.0), "green": ("bright", 2.5), "blue": ("", -3.0)}
    for kind in ("labels", "number"):
        (place / kind).mkdir()
        with open(place / kind / "metadata.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "labels" if kind == "labels" else "hours"])
            for photo in sorted(photos.rglob("*.png")):
                name = f"{photo.parent.name}_{photo.name}"
                (place / kind / name).write_bytes(photo.read_bytes())
                rows.writerow([name, said[photo.parent.name][kind == "number"]])
    return place


def load(folder, problem_type, **fields):
    args = DataArguments(train_dir=str(folder), problem_type=problem_type, **fields)
    return load_image_data(args, need_train=True, need_evaluation=True, seed=0)


def train(folder, out, problem_type, *words):
    number = ["--label_column_name", "hours"] if problem_type == NUMBERS else []
    return main(
        ["defaults", "--train_dir", str(folder), "--output_dir", str(out), "--problem_type", problem_type, *number,
         *QUICK, "--num_train_epochs", "12", *words]
    )  # fmt: skip


class TestData:
    def test_labels_of_a_folder(self, folders):
        data = load(folders / "labels", MULTI)
        assert data.labels == ["bright", "warm"] and data.problem_type == MULTI
        found = {row["image"]["path"].split("/")[-1].split("_")[0]: row["labels"] for row in data.train}
        assert found == {"red": [1, 0], "green": [0], "blue": []}

    def test_numbers_of_a_folder(self, folders):
        data = load(folders / "number", NUMBERS, label_column_name="hours")
        assert data.labels == ["hours"]
        assert {row["labels"] for row in data.train} == {1.0, 2.5, -3.0}

    @pytest.mark.parametrize("cells", [["b;a", None, " a ;"], [["b", "a"], [], ["a"]], [[1, 0], [], [0]]])
    def test_lists(self, cells):
        data, names = as_label_lists(Dataset.from_dict({"x": cells}), "x")
        assert len(names) == 2 and list(data["x"]) == [[1, 0], [], [0]]

    def test_of_other_splits(self, folders, tmp_path):
        """An evaluation folder in which a label is missing still has the training's numbers."""
        table = Dataset.from_dict(
            {"image": [str(next((folders / "labels").glob("red*")))], "labels": [["warm"]]},
            features=Features({"image": Image(), "labels": List(Value("string"))}),
        )
        (tmp_path / "more").mkdir()
        table.to_parquet(str(tmp_path / "more" / "x.parquet"))
        data = load(folders / "labels", MULTI, validation_dir=str(tmp_path / "more"))
        assert list(data.evaluation)[0]["labels"] == [1]

    def test_what_can_not_be_labels(self, folders):
        with pytest.raises(ValueError, match="must hold several labels an image"):
            load(folders / "number", MULTI, label_column_name="hours")
        with pytest.raises(ValueError, match="must hold a number for each image"):
            load(folders / "labels", NUMBERS)
        with pytest.raises(ValueError, match="2 images have no finite number in the column 'x', first row 1"):
            as_numbers(Dataset.from_dict({"x": [1.0, None, float("inf")]}), "x")
        with pytest.raises(ValueError, match="No image has a label"):
            as_label_lists(Dataset.from_dict({"x": ["", ";"]}), "x")

    def test_images_that_are_not_described_are_an_error(self, folders, tmp_path):
        """`datasets` would leave them out."""
        for file in (folders / "labels").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "extra.png").write_bytes(next(tmp_path.glob("red*")).read_bytes())
        with pytest.raises(ValueError, match="say nothing of 1 image, such as .*extra.png"):
            load(tmp_path, MULTI)

    def test_values(self):
        assert LabelValues(MULTI, 4, [2, 0])([0, 1]).tolist() == [1, 0, 1, 0]
        assert LabelValues(NUMBERS, 1)(2.5) == np.float32(2.5)
        assert LabelValues(label_ids=[2, 0])(1) == 0 and LabelValues()(3) == 3

    @pytest.mark.parametrize(
        "words", [{"streaming": True, "dataset_name": "x"}, {"label_map_dir": "x", "train_dir": "y"}, {}]
    )
    def test_where_they_can_not_be_had(self, words):
        with pytest.raises(ValueError, match="is for images on this machine"):
            DataArguments(problem_type=MULTI, **words)


class TestMetrics:
    def test_several_labels(self):
        random = np.random.default_rng(0)
        logits, truth = random.normal(size=(50, 4)), random.integers(0, 2, (50, 4)).astype(np.float32)
        truth[:, 3] = 0  # a label of which nothing can be said
        found = MultiLabelMetrics()(EvalPrediction(logits, truth))
        each = [average_precision_score(truth[:, i], logits[:, i]) for i in range(3)]
        assert found["map"] == pytest.approx(np.mean(each))
        assert found["f1_micro"] == pytest.approx(f1_score(truth.ravel(), logits.ravel() > 0))
        assert found["accuracy_of_all"] == np.mean([(a == (b > 0)).all() for a, b in zip(truth, logits)])

    def test_numbers(self):
        given, truth = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 3.0])
        found = RegressionMetrics()(EvalPrediction(given, truth))
        assert found == {
            "mae": pytest.approx(2 / 3), "rmse": pytest.approx((2 / 3) ** 0.5),
            "r2": pytest.approx(r2_score(truth, given)),
        }  # fmt: skip


class TestTraining:
    @pytest.fixture(scope="class")
    def trained(self, folders, tmp_path_factory):
        place = tmp_path_factory.mktemp("runs")
        return {
            MULTI: (place / "several", train(folders / "labels", place / "several", MULTI)),
            NUMBERS: (place / "number", train(folders / "number", place / "number", NUMBERS)),
        }

    def test_several_labels_are_learned(self, trained, folders):
        folder, result = trained[MULTI]
        assert result.metrics["eval_map"] > 0.9 and result.metrics["eval_f1_micro"] > 0.8
        assert result.baseline.metric == "map" and 0.5 < result.baseline.value <= 1
        assert load_json(folder / "config.json")["problem_type"] == MULTI
        classify = pipeline("image-classification", model=str(folder))
        scores = {each["label"]: each["score"] for each in classify(str(next((folders / "labels").glob("red*"))))}
        assert scores["warm"] > 0.5 and scores["bright"] > 0.5

    def test_a_number_is_learned(self, trained, folders):
        folder, result = trained[NUMBERS]
        assert result.metrics["eval_r2"] > 0.7 and result.metrics["eval_mae"] < 1.2
        assert result.baseline.metric == "r2"
        estimate = pipeline("image-classification", model=str(folder))
        (answer,) = estimate(str(next((folders / "number").glob("blue*"))))
        assert answer["label"] == "hours" and answer["score"] < 0

    def test_cards(self, trained):
        text = (trained[MULTI][0] / "README.md").read_text()
        assert (
            "with 2 labels, any number of which a picture may have, trained" in text
            and "Mean average precision" in text
        )
        assert "gives every picture a score for each" in text and "type: mAP" in text
        text = (trained[NUMBERS][0] / "README.md").read_text()
        assert "estimates a number (hours)" in text and "| R squared |" in text and "ridge regression" in text.lower()
        assert not (trained[NUMBERS][0] / "confusion_matrix.csv").exists()

    def test_predict_writes_the_same_numbers(self, trained, folders, tmp_path):
        folder, _ = trained[NUMBERS]
        picture = str(next((folders / "number").glob("blue*")))
        predict(
            ["--model", str(folder), "--images", picture, "--output_file", str(tmp_path / "a.csv"), "--device", "cpu"]
        )
        (row,) = csv.DictReader((tmp_path / "a.csv").open())
        expected = pipeline("image-classification", model=str(folder))(picture)[0]["score"]
        assert float(row["score"]) == pytest.approx(expected, abs=1e-3) and row["label"] == "hours"

    def test_evaluated_again(self, trained, folders, tmp_path):
        folder, result = trained[MULTI]
        words = ["--model_name_or_path", str(folder), "--train_dir", str(folders / "labels"), "--do_eval", "--use_cpu"]
        words += ["--report_to", "none", "--output_dir", str(tmp_path / "again")]
        again = main([*words, "--problem_type", MULTI])
        assert again.metrics["eval_map"] == pytest.approx(result.metrics["eval_map"])
        with pytest.raises(SystemExit, match="problem type is multi_label.*give --problem_type multi_label"):
            photos = write_folder(tmp_path / "photos", labels=("bright", "warm"))
            main([*words[:2], "--train_dir", str(photos), *words[4:], "--output_dir", str(tmp_path / "other")])

    def test_auto_and_dry_run(self, folders, tmp_path, capsys):
        words = [
            "--train_dir",
            str(folders / "number"),
            "--label_column_name",
            "hours",
            "--max_steps",
            "3",
            "--use_cpu",
        ]
        words += ["--report_to", "none", "--problem_type", NUMBERS]
        main([*words, "--output_dir", str(tmp_path / "plan"), "--dry_run"])
        assert "hours from -3 to 2.5" in capsys.readouterr().out
        result = main([*words, "--output_dir", str(tmp_path / "out")])
        assert "eval_mae" in result.metrics

    @pytest.mark.parametrize(
        "problem, words, says",
        [
            (MULTI, ["--class_weights", "balanced"], "--class_weights can't be had"),
            (MULTI, ["--calibrate"], "--calibrate can't be had"),
            (NUMBERS, ["--label_smoothing_factor", "0.1"], "--label_smoothing_factor can't be had"),
        ],
    )
    def test_refused(self, folders, tmp_path, problem, words, says):
        with pytest.raises(SystemExit, match=says):
            train(folders / ("labels" if problem == MULTI else "number"), tmp_path / "out", problem, *words)

    def test_mixed_and_smoothed_targets_reach_the_loss(self, folders, tmp_path):
        result = train(
            folders / "labels", tmp_path / "out", MULTI, "--mixup", "0.5", "--label_smoothing_factor", "0.1"
        )
        assert np.isfinite(result.metrics["train_loss"])

    def test_continues_only_with_the_same_labels(self, folders, tmp_path):
        """Content digests hold the lists and numbers."""
        from refiner_hf.data.content_hashes import content_digests

        data = load(folders / "labels", MULTI).train.data
        other = data.map(lambda labels: {"labels": [0]}, input_columns=["labels"])
        same = content_digests(data, "training")
        assert same == content_digests(data, "training") != content_digests(other, "training")
        numbers = load(folders / "number", NUMBERS, label_column_name="hours").train.data
        doubled = numbers.map(lambda labels: {"labels": 2 * labels}, input_columns=["labels"])
        before, after = content_digests(numbers, "training"), content_digests(doubled, "training")
        assert before["contents"] == after["contents"] and before["rows"] != after["rows"]
