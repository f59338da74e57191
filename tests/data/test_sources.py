"""Data from folders, parquet files, datasets and streams, in one form."""

from importlib.resources import files

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from refiner_hf.data import sources
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.digits import SEEN, accuracy_seen, digits_splits
from refiner_hf.data.images import decode_image
from refiner_hf.data.labels import LabelValues
from refiner_hf.data.sources import load_image_data
from refiner_hf.data.transforms import PrepareImages, evaluation_pixels, match_labels
from refiner_hf.data.unreadable import raise_if_unreadable
from refiner_hf.image_processing_refiner import RefinerImageProcessor

from ..images import write_folder


def load(need_evaluation=True, need_train=True, **fields):
    return load_image_data(DataArguments(**fields), need_train=need_train, need_evaluation=need_evaluation, seed=0)


def labels_of(data):
    return [row["labels"] for row in data]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "photos")


class TestDigits:
    def test_are_the_default(self):
        data = load()
        assert (len(data.train), len(data.evaluation)) == (1437, 360)
        assert data.labels == [str(i) for i in range(10)] and data.evaluation_split == "test"
        assert np.bincount(labels_of(data.evaluation)).min() >= 34

    def test_are_real_scans_and_the_split_is_fixed(self):
        train, test = digits_splits()
        assert test[0]["image"].size == (8, 8)
        overlap = {np.asarray(i).tobytes() for i in test["image"]} & {np.asarray(i).tobytes() for i in train["image"]}
        assert not overlap
        assert digits_splits()[1]["label"] == test["label"]

    def test_the_recipe_and_the_demo_say_the_same_range(self):
        assert "98.89% to 99.17%" in accuracy_seen()
        recipe = files("refiner_hf").joinpath("recipes/digits.yaml").read_text(encoding="utf-8")
        assert f"{100 * SEEN[0]:.2f} to {100 * SEEN[1]:.2f} %" in recipe


class TestFolders:
    def test_a_share_is_held_out(self, folder):
        data = load(train_dir=str(folder), train_val_split=0.25)
        assert len(data.train) + len(data.evaluation) == 24 and 0 < len(data.evaluation) < 15
        assert data.labels == ["blue", "green", "red"]
        assert data.name == "photos" and data.hub_id is None

    def test_nothing_is_held_out_where_nothing_is_evaluated(self, folder):
        data = load(train_dir=str(folder), need_evaluation=False)
        assert len(data.train) == 24 and data.evaluation is None

    def test_validation_folder(self, folder, tmp_path):
        validation = write_folder(tmp_path / "more", 2, ("red", "blue"))
        data = load(train_dir=str(folder), validation_dir=str(validation))
        assert (len(data.train), data.evaluation_split) == (24, "validation")
        # Two labels only, at their positions among the training set's three.
        assert sorted(labels_of(data.evaluation)) == [0, 0, 2, 2]

    def test_labels_that_only_the_validation_set_has(self, folder, tmp_path):
        validation = write_folder(tmp_path / "more", 2, ("red", "violet"))
        with pytest.raises(ValueError, match="violet"):
            load(train_dir=str(folder), validation_dir=str(validation))

    def test_only_validation(self, folder):
        data = load(validation_dir=str(folder), need_train=False)
        assert data.train is None and len(data.evaluation) == 24
        with pytest.raises(ValueError, match="no training images"):
            load(validation_dir=str(folder))

    def test_samples_are_limited_and_mixed(self, folder):
        def paths(**limits):
            data = load(train_dir=str(folder), train_val_split=0.4, **limits)
            return [[row["image"]["path"] for row in rows] for rows in (data.train, data.evaluation)]

        limits = dict(max_train_samples=7, max_eval_samples=2)
        for some, whole, count in zip(paths(**limits), paths(), (7, 2)):
            assert len(some) == count and set(some) < set(whole) and some != whole[:count]
        assert paths(**limits) == paths(**limits)

    @pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: write_folder(p / "a" / "b")])
    def test_folders_that_are_none(self, tmp_path, make):
        make(tmp_path / "photos")
        if (tmp_path / "photos" / "a").exists():
            (tmp_path / "photos" / "x.txt").write_text("")
        with pytest.raises(ValueError, match="no folder|subfolder"):
            load(train_dir=str(tmp_path / "photos"))

    def test_a_label_without_images(self, folder):
        (folder / "yellow").mkdir()
        with pytest.raises(ValueError, match="labels without images: yellow. Add some, or remove them"):
            load(train_dir=str(folder))

    @pytest.mark.parametrize("name", ["train_{}", "ILSVRC2012_val_{}", "test_{}", "val-{}"])
    def test_names_that_look_like_splits_lose_nothing(self, tmp_path, name):
        folder = write_folder(tmp_path / "my [photos]", labels=("train", "plane", "test"))
        for path in folder.rglob("*.png"):
            path.rename(path.with_name(name.format(path.name)))
        data = load(train_dir=str(folder), need_evaluation=False)
        assert len(data.train) == 24 and data.labels == ["plane", "test", "train"]

    def test_a_folder_of_splits_gives_its_name(self, tmp_path):
        for split in ("train", "val"):
            write_folder(tmp_path / "pets" / split)
        assert load(train_dir=str(tmp_path / "pets/train"), validation_dir=str(tmp_path / "pets/val")).name == "pets"


class TestOtherSources:
    @pytest.fixture
    def table(self, folder):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")

    def test_parquet_folder(self, table, tmp_path):
        (tmp_path / "tables").mkdir()
        table.to_parquet(str(tmp_path / "tables" / "train.parquet"))
        data = load(train_dir=str(tmp_path / "tables"))
        assert data.labels == ["blue", "green", "red"]
        assert decode_image(data.train[0]["image"]).size == (30, 24)

    def test_saved_dataset_by_name(self, folder):
        data = load(dataset_name=str(folder))
        assert data.labels == ["blue", "green", "red"] and data.hub_id is None

    def test_dataset_of_the_hub(self, table, monkeypatch):
        def load_dataset(name, configuration, streaming):
            assert (name, configuration, streaming) == ("someone/pets", "large", False)
            return datasets.DatasetDict(train=table, test=table.select(range(3)), validation=table.select(range(5)))

        monkeypatch.setattr(sources, "load_dataset", load_dataset)
        data = load(dataset_name="someone/pets", dataset_config_name="large")
        assert (data.name, data.hub_id, data.evaluation_split) == ("pets", "someone/pets", "validation")
        assert (len(data.train), len(data.evaluation)) == (24, 5)

    def test_label_names_as_text(self, table, tmp_path):
        names = [table.features["label"].names[i] for i in table["label"]]
        (tmp_path / "tables").mkdir()
        table.remove_columns("label").add_column("kind", names).to_parquet(str(tmp_path / "tables" / "t.parquet"))
        with pytest.raises(ValueError, match="--label_column_name.*kind"):
            load(train_dir=str(tmp_path / "tables"))
        data = load(train_dir=str(tmp_path / "tables"), label_column_name="kind")
        assert data.labels == ["blue", "green", "red"]

    def test_label_numbers_without_names(self, table, tmp_path):
        (tmp_path / "tables").mkdir()
        table.cast_column("label", datasets.Value("int64")).to_parquet(str(tmp_path / "tables" / "t.parquet"))
        assert load(train_dir=str(tmp_path / "tables")).labels == ["0", "1", "2"]
        numbers = [1000 * number for number in table["label"]]
        table = table.remove_columns("label").add_column("label", numbers)
        table.to_parquet(str(tmp_path / "tables" / "t.parquet"))
        with pytest.raises(ValueError, match="are 3 different numbers up to 2000: number them from 0 on"):
            load(train_dir=str(tmp_path / "tables"))

    def test_unknown_column(self, folder):
        with pytest.raises(ValueError, match="'picture'.*'image'"):
            load(train_dir=str(folder), image_column_name="picture")

    def test_stream(self, table, tmp_path):
        for split, name in ((table, "train"), (table.select(range(5)), "validation")):
            split.to_parquet(str(tmp_path / "tables" / f"{name}.parquet"))
        data = load(dataset_name=str(tmp_path / "tables"), streaming=True, max_eval_samples=3)
        order = labels_of(data.train)
        assert order == labels_of(load(dataset_name=str(tmp_path / "tables")).train)
        mixed = labels_of(data.train.sample(24, seed=0))
        assert sorted(mixed) == sorted(order) and mixed != order
        assert data.train.streamed and data.labels == ["blue", "green", "red"]
        processor = RefinerImageProcessor(size={"height": 16, "width": 16})
        rows = list(data.evaluation.prepared(PrepareImages(evaluation_pixels(processor))))
        assert len(rows) == 3 and np.shape(rows[0]["pixel_values"]) == (3, 16, 16) and "image" not in rows[0]

    @pytest.mark.parametrize("label", [-1, 3, None])
    def test_labels_out_of_range(self, table, tmp_path, label):
        labels = table["label"][:]
        labels[5] = label
        names = datasets.ClassLabel(names=["blue", "green", "red"])
        table = table.remove_columns("label").add_column("label", labels, feature=datasets.Value("int64"))
        (tmp_path / "tables").mkdir()
        # As files come that somebody else wrote: `datasets` itself refuses a label beyond the last.
        features = datasets.Features({**table.features, "label": names}).arrow_schema
        pq.write_table(table.data.table.cast(features), tmp_path / "tables" / "train.parquet")
        with pytest.raises(ValueError, match="labels outside 0..2 in 1 image .*The first is row 5"):
            load(train_dir=str(tmp_path / "tables"))

    @pytest.mark.parametrize(
        "fields",
        [
            dict(dataset_name="a", train_dir="b"),
            dict(train_val_split=1.5),
            dict(max_train_samples=0),
            dict(train_dir="b", streaming=True),
        ],
    )
    def test_options_that_contradict_each_other(self, fields):
        with pytest.raises(ValueError, match="--"):
            DataArguments(**fields)


class TestUnreadable:
    """A truncated file and one that is no image, in a folder of good ones."""

    @pytest.fixture
    def spoiled(self, folder):
        (folder / "red" / "3.png").write_bytes((folder / "red" / "3.png").read_bytes()[:200])
        (folder / "blue" / "notes.jpg").write_text("no picture")
        return load(train_dir=str(folder), need_evaluation=False).train

    def test_are_found_and_left_out(self, spoiled):
        good, wrong = spoiled.readable("training")
        assert len(spoiled) == 25 and len(good) == 23 and len(wrong) == 2
        assert any("3.png can't be read" in reason for reason in wrong) and any("notes.jpg" in r for r in wrong)
        assert good.readable("training")[1] == []
        [decode_image(row["image"]) for row in good]

    def test_stop_with_all_their_names(self, spoiled):
        with pytest.raises(ValueError, match="2 images can't be read. (.|\n)*--unreadable_images skip(.|\n)*3.png"):
            raise_if_unreadable(spoiled.readable("training")[1])
        with pytest.raises(ValueError, match="\nand 5 more$"):
            raise_if_unreadable([f"The image {i} can't be read" for i in range(25)])
        raise_if_unreadable([])


class TestTransforms:
    @pytest.fixture
    def processor(self):
        return RefinerImageProcessor(size={"height": 16, "width": 16})

    def test_evaluation_is_what_the_processor_makes(self, folder, processor):
        data = load(train_dir=str(folder), need_evaluation=False).train
        rows = data.prepared(PrepareImages(evaluation_pixels(processor)))[:4]
        for row, pixels in zip(data, rows["pixel_values"]):
            assert (processor(decode_image(row["image"]), return_tensors="pt").pixel_values[0] == pixels).all()

    def test_a_damaged_file_is_named(self, folder, processor):
        (folder / "red" / "3.png").write_bytes((folder / "red" / "3.png").read_bytes()[:200])
        data = load(train_dir=str(folder), need_evaluation=False).train
        rows = data.prepared(PrepareImages(evaluation_pixels(processor)))
        with pytest.raises(ValueError, match=r"3\.png"):
            rows[:24]

    def test_grey_and_16_bit_files(self, tmp_path, processor):
        grey = np.linspace(0, 255, 400).reshape(20, 20).astype(np.uint8)
        for name, pixels in (("grey", grey), ("deep", grey.astype(np.uint16) * 257)):
            (tmp_path / "scans" / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "scans" / name / "1.png")
        data = load(train_dir=str(tmp_path / "scans"), need_evaluation=False).train
        one, two = data.prepared(PrepareImages(evaluation_pixels(processor)))[:2]["pixel_values"]
        assert (one == two).all()

    def test_labels_in_the_models_order(self, folder, processor):
        data = load(train_dir=str(folder), need_evaluation=False)
        ids = match_labels(data.labels, ["red", "violet", "blue", "green"])
        assert ids == [2, 3, 0]
        rows = data.train.prepared(PrepareImages(evaluation_pixels(processor), LabelValues(label_ids=ids)))[:24]
        assert rows["labels"] == [ids[label] for label in labels_of(data.train)]

    @pytest.mark.parametrize("label", [-1, 3, None])
    def test_labels_out_of_range(self, label, processor, folder):
        row = load(train_dir=str(folder), need_evaluation=False).train[0]
        with pytest.raises(ValueError, match="label"):
            PrepareImages(evaluation_pixels(processor), LabelValues(label_ids=[2, 1, 0]))(
                {"image": [row["image"]], "labels": [label]}
            )

    def test_files_are_turned_upright(self, tmp_path):
        pixels = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        turned = decode_image({"path": str(tmp_path / "a.png"), "bytes": None})
        assert (np.asarray(turned) == np.rot90(pixels, -1)).all()

    def test_labels_that_the_model_does_not_know(self):
        assert match_labels(["a", "b"], ["a", "b"]) is None
        with pytest.raises(ValueError, match=r"doesn't know: lynx\..*lacks: dog\."):
            match_labels(["cat", "lynx"], ["cat", "dog"])


class TestNothingIsLeftOut:
    """What `datasets` passes over, or labels otherwise than a reader would, without a word."""

    def load(self, folder):
        return load(need_evaluation=False, train_dir=str(folder))

    def test_a_label_that_begins_with_underlines(self, tmp_path):
        write_folder(tmp_path, 2, ("__init__", "blue", "green"))
        with pytest.raises(ValueError, match="folders '__init__' of .* wouldn't be taken.*two underlines"):
            self.load(tmp_path)

    def test_folders_in_folders(self, tmp_path):
        write_folder(tmp_path, 2)
        write_folder(tmp_path / "blue", 2, ("2019", "2020"))
        with pytest.raises(ValueError, match="'2019', '2020' would become labels"):
            self.load(tmp_path)

    def test_all_images_deeper(self, tmp_path):
        for label in ("blue", "green"):
            write_folder(tmp_path / label, 2, ("a", "b"))
        with pytest.raises(ValueError, match="has no images in subfolders"):
            self.load(tmp_path)

    def test_images_beside_the_labels(self, tmp_path):
        write_folder(tmp_path, 2)
        (tmp_path / "blue" / "0.png").rename(tmp_path / "lost.png")
        with pytest.raises(ValueError, match="would become labels"):
            self.load(tmp_path)

    def test_files_that_are_no_images_by_their_names(self, tmp_path):
        write_folder(tmp_path, 2)
        for name in ("1.heic", "2.heic", "notes.txt", ".DS_Store"):
            (tmp_path / "blue" / name).write_text("x")
        with CaptureLogger(logging.get_logger("refiner_hf.data.sources")) as log:
            data = self.load(tmp_path)
        assert len(data.train) == 6
        assert "3 files in" in log.out and ".heic (2), .txt (1)" in log.out

    def test_a_cache_that_can_not_be_written(self, tmp_path, monkeypatch):
        write_folder(tmp_path / "photos", 2)
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
        with pytest.raises(OSError, match="The cache of `datasets`.* can't be written: .*Set HF_DATASETS_CACHE"):
            self.load(tmp_path / "photos")
