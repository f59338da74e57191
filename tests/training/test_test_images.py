"""Images that are measured on once, at the end, beside those of the evaluation."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from refiner_hf.commands.train import main
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.sources import load_image_data

from ..conftest import load_json
from ..images import write_folder
from ..parsed_card import Card
from .test_run import QUICK


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    return {name: write_folder(place / name, count) for name, count in (("train", 16), ("validation", 4), ("test", 6))}


def load(**fields):
    return load_image_data(DataArguments(**fields), need_train=True, need_evaluation=True, seed=0)


def test_beside_a_validation_folder(folders):
    data = load(**{f"{name}_dir": str(folder) for name, folder in folders.items()})
    assert [len(rows) for rows in (data.train, data.evaluation, data.test)] == [48, 12, 18]
    assert data.evaluation_split == "validation"


def test_beside_held_out_images(folders):
    data = load(train_dir=str(folders["train"]), test_dir=str(folders["test"]))
    assert len(data.train) + len(data.evaluation) == 48 and len(data.test) == 18
    assert "held out of train" in data.evaluation_split


def test_without_a_training_folder_they_are_the_evaluation(folders):
    args = DataArguments(test_dir=str(folders["test"]))
    data = load_image_data(args, need_train=False, need_evaluation=True, seed=0)
    assert data.test is None and len(data.evaluation) == 18 and data.evaluation_split == "test"


def test_other_labels_are_refused(folders, tmp_path):
    other = write_folder(tmp_path / "other", 2, labels=("red", "violet"))
    with pytest.raises(ValueError, match="The test set has labels that the training set lacks: .*violet"):
        load(train_dir=str(folders["train"]), test_dir=str(other))


@pytest.mark.parametrize("secret", [False, True])
def test_a_dataset_with_three_splits(folders, tmp_path, secret, caplog):
    """Test labels of -1 are how a dataset keeps them secret: such a split is left out, and a warning says so."""
    for name, folder in folders.items():
        table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
        if secret and name == "test":
            features = Features({"image": Image(), "label": ClassLabel(names=table.features["label"].names)})
            table = Dataset.from_dict({"image": table["image"], "label": [-1] * len(table)}, features=features)
        (tmp_path / "tables").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "tables" / f"{name}.parquet"))
    data = load(dataset_name=str(tmp_path / "tables"))
    assert data.evaluation_split == "validation" and (data.test is None) == secret
    assert ("test split is left out" in caplog.text) == secret


def test_are_measured_once_and_in_the_card(folders, tmp_path, capsys):
    data = [word for name, folder in folders.items() for word in (f"--{name}_dir", str(folder))]
    result = main(
        ["defaults", *data, "--output_dir", str(tmp_path / "out"), *QUICK, "--num_train_epochs", "4",
         "--eval_strategy", "epoch"]
    )  # fmt: skip
    measured = load_json(tmp_path / "out" / "test_results.json")
    assert measured["test_accuracy"] == result.metrics["test_accuracy"] >= 0.5
    assert f"On the test images, measured once at the end: {measured['test_accuracy']:.2%}" in capsys.readouterr().out
    history = load_json(tmp_path / "out" / "trainer_state.json")["log_history"]
    assert sum("eval_accuracy" in entry for entry in history) == 5
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"Top-1 accuracy on 18 test images, measured once at the end | {measured['test_accuracy']:.2%}" in text
    # The confusions are those of the evaluation images, as the rest of the card.
    rows = (tmp_path / "out" / "confusion_matrix.csv").read_text().splitlines()[1:]
    assert sum(int(cell) for row in rows for cell in row.split(",")[1:]) == 12
    again = main(
        ["--model_name_or_path", str(tmp_path / "out"), "--test_dir", str(folders["test"]), "--do_eval", "--use_cpu",
         "--report_to", "none", "--output_dir", str(tmp_path / "again")]
    )  # fmt: skip
    assert again.metrics["eval_accuracy"] == measured["test_accuracy"]
    assert Card(text)
