"""A run that goes on has the images and labels that it began with, or says what changed."""

import json
import shutil

import datasets
import pytest

from refiner_hf import RefinerConfig
from refiner_hf.commands.train import main
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.sources import load_image_data
from refiner_hf.training import same_data
from refiner_hf.training.same_data import check_same_data, facts_of_data

from ..conftest import load_json
from ..images import write_folder
from .test_run import QUICK


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two epochs that never ended, its training pictures and those that it is evaluated on."""
    folder = tmp_path_factory.mktemp("same")
    write_folder(folder / "photos")
    write_folder(folder / "others", per_label=3, side=20)
    main(command(folder))
    for name in ("train_results.json", "README.md", "model.safetensors"):
        (folder / "run" / name).unlink()
    return folder


@pytest.fixture
def place(begun, tmp_path):
    """A copy of all that."""
    return shutil.copytree(begun, tmp_path / "same")


def command(folder, *more):
    return [
        "defaults", "--train_dir", str(folder / "photos"), "--validation_dir", str(folder / "others"), "--output_dir",
        str(folder / "run"), *QUICK, "--num_train_epochs", "2", "--save_strategy", "epoch", *more,
    ]  # fmt: skip


def one_more(folder):
    shutil.copy(folder / "others" / "red" / "0.png", folder / "photos" / "red" / "new.png")


def relabel(folder):
    (folder / "photos" / "red" / "3.png").rename(folder / "photos" / "blue" / "from_red.png")


CHANGES = {
    "more": (one_more, "the number of training images is now 25 and was 24"),
    "fewer": (
        lambda f: (f / "photos" / "red" / "3.png").unlink(),
        "the number of training images is now 23 and was 24",
    ),
    "others": (
        lambda f: shutil.copy(f / "others" / "red" / "0.png", f / "photos" / "red" / "3.png"),
        "as many training images, 24, but others among them",
    ),
    "relabelled": (relabel, "the training images come in another order or have other labels"),
    "renamed": (
        lambda f: (f / "photos" / "red" / "3.png").rename(f / "photos" / "red" / "z.png"),
        "the training images come in another order or have other labels",
    ),
    "evaluation": (
        lambda f: (f / "others" / "red" / "0.png").unlink(),
        "the number of evaluation images is now 8 and was 9",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_images_stop_it(place, name):
    change, said = CHANGES[name]
    change(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit, match=f"aren't those that the run began with: .*{said}.*--resume_from_checkpoint"):
        main(command(place))
    assert sorted(place.rglob("*")) == before


def test_the_same_images_go_on_wherever_they_lie(place, tmp_path):
    moved = tmp_path / "elsewhere"
    place.rename(moved)
    main(command(moved))
    assert (moved / "run" / "README.md").exists() and not list((moved / "run").glob("*.new"))


def test_whoever_names_the_checkpoint_is_warned(place, monkeypatch):
    said = []
    monkeypatch.setattr(same_data.logger, "warning", said.append)
    one_more(place)
    main(command(place, "--resume_from_checkpoint", str(place / "run" / "checkpoint-3")))
    assert (
        len(said) == 1 and "number of training images is now 25" in said[0] and "isn't that of one training" in said[0]
    )
    assert load_json(place / "run" / "_data.json")["training"]["images"] == 25


@pytest.mark.parametrize("named", [False, True])
def test_other_labels_stop_it_in_any_case(place, named):
    write_folder(place / "photos", labels=("violet",))
    (place / "photos" / "red").rename(place / "photos" / "rose")
    shutil.rmtree(place / "others" / "red")
    named = ["--resume_from_checkpoint", str(place / "run" / "checkpoint-3")] if named else []
    with pytest.raises(SystemExit, match=r"labels aren't .*\(new: rose, violet; gone: red\).*--model_name_or_path"):
        main(command(place, *named))


def test_a_run_of_which_nothing_was_written_down(place, monkeypatch):
    said = []
    monkeypatch.setattr(same_data.logger, "warning", said.append)
    (place / "run" / "_data.json").unlink()
    write_folder(place / "photos", labels=("violet",))
    with pytest.raises(SystemExit, match=r"The labels aren't .*\(new: violet\)"):
        main(command(place))
    shutil.rmtree(place / "photos" / "violet")
    one_more(place)
    main(command(place))
    assert len(said) == 1 and "whether they are the same is unknown" in said[0]


def test_another_order_of_labels(tmp_path, monkeypatch):
    """A network may have another than its data, and keeps it; the data may not change theirs."""
    said = []
    monkeypatch.setattr(same_data.logger, "warning", said.append)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    RefinerConfig(id2label={0: "red", 1: "blue"}).save_pretrained(checkpoint)
    now = {"labels": ["blue", "red"], "training": {"images": 1}, "evaluation": None, "evaluated_at_most": None}
    check_same_data(str(checkpoint), now, named=False)
    assert len(said) == 1 and "is unknown" in said[0]
    (tmp_path / "run" / "_data.json").write_text(json.dumps(now))
    check_same_data(str(checkpoint), now, named=False)
    with pytest.raises(ValueError, match="labels aren't those .*another order"):
        check_same_data(str(checkpoint), now | {"labels": ["red", "blue"]}, named=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"labels": []}', '{"labels": 1, "training": 2}'])
def test_what_was_written_down_is_damaged(place, content):
    (place / "run" / "_data.json").write_text(content)
    with pytest.raises(SystemExit, match="_data.json is damaged.*Delete it"):
        main(command(place))


def test_options_that_may_change(place):
    main(command(place, "--max_eval_samples", "4", "--refine_implementation", "eager"))
    assert (place / "run" / "README.md").exists()


def test_held_out_images(tmp_path, monkeypatch):
    """They may become more or fewer without being mixed up, but the run isn't the same."""
    photos = write_folder(tmp_path / "photos", per_label=20)
    words = [
        "defaults",
        "--train_dir",
        str(photos),
        "--output_dir",
        str(tmp_path / "run"),
        *QUICK,
        "--save_strategy",
        "epoch",
    ]
    main([*words, "--train_val_split", "0.4"])
    (tmp_path / "run" / "train_results.json").unlink()
    for i in range(3):
        (photos / "red" / f"{i}.png").unlink()
    with pytest.raises(SystemExit, match="aren't those that the run began with: .* is now .* and was"):
        main([*words, "--train_val_split", "0.4"])


class TestOtherSources:
    def facts(self, **fields):
        args = DataArguments(**fields)
        data = load_image_data(args, need_train=True, need_evaluation=True, seed=0)
        return facts_of_data(data, args, evaluated=True)

    @pytest.fixture
    def tables(self, tmp_path):
        table = datasets.load_dataset("imagefolder", data_dir=str(write_folder(tmp_path / "photos")), split="train")
        for i in range(2):
            table.shard(2, i).to_parquet(str(tmp_path / "tables" / f"train-{i}.parquet"))
        table.select(range(5)).to_parquet(str(tmp_path / "tables" / "validation.parquet"))
        return tmp_path / "tables"

    def test_parquet_and_datasets(self, tables, tmp_path):
        photos = self.facts(train_dir=str(tmp_path / "photos"), validation_dir=str(tmp_path / "photos"))
        stored = self.facts(dataset_name=str(tables))
        assert stored["training"] == photos["training"], "the same images with the same labels"
        assert stored["evaluation"]["images"] == 5 and stored["evaluation"]["contents"]

    def test_of_a_stream_what_can_be_known(self, tables, tmp_path):
        facts = self.facts(dataset_name=str(tables), streaming=True)
        assert facts["training"]["files"] == 2 and facts["labels"] == ["blue", "green", "red"]
        (tables / "train-0.parquet").rename(tables / "train-2.parquet")
        shutil.copy(tables / "train-1.parquet", tables / "train-3.parquet")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "_data.json").write_text(json.dumps(facts))
        downloaded = self.facts(dataset_name=str(tables))
        with pytest.raises(ValueError, match=r"training images come in another way \(--streaming\)"):
            check_same_data(str(tmp_path / "run" / "checkpoint-1"), downloaded, named=False)
        now = self.facts(dataset_name=str(tables), streaming=True)
        with pytest.raises(ValueError, match="the training images come in 3 files and no longer in 2"):
            check_same_data(str(tmp_path / "run" / "checkpoint-1"), now, named=False)

    def test_the_digits_are_not_read(self):
        facts = self.facts()
        assert facts["training"] == {"images": 1437} and facts["evaluation"] == {"images": 360}
