"""Images without labels, wherever they come from."""

import datasets
import numpy as np
import pytest
from PIL import Image

from refiner_hf.data import image_sample
from refiner_hf.data.digits import NAME, digits_splits
from refiner_hf.data.image_sample import decoded, load_images
from refiner_hf.data.images import UnreadableImageError

from ..images import write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "photos", 4)


@pytest.fixture
def table(folder):
    """The same photos as a dataset: columns image and label."""
    return datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")


def contents(rows) -> list[bytes]:
    return [image.tobytes() for image in decoded(rows)]


def pixels_in(folder) -> list[bytes]:
    return sorted(Image.open(path).convert("RGB").tobytes() for path in folder.rglob("*.png"))


class TestFolders:
    def test_with_subfolders(self, folder):
        name, rows = load_images(str(folder), 100)
        assert name == "photos" and rows.column_names == ["image"] and len(rows) == 12
        images = list(decoded(rows))
        assert {image.mode for image in images} == {"RGB"} and {image.size for image in images} == {(30, 24)}
        assert sorted(image.tobytes() for image in images) == pixels_in(folder)

    def test_without_subfolders(self, folder):
        name, rows = load_images(str(folder / "red"), 100)
        assert name == "red" and rows.column_names == ["image"]
        assert sorted(contents(rows)) == pixels_in(folder / "red")

    def test_images_at_several_depths_and_other_files(self, folder):
        (folder / "notes.txt").write_text("seen today")
        Image.new("RGB", (30, 24)).save(folder / "top.png")
        write_folder(folder / "more" / "of [them]", 2)
        _, rows = load_images(str(folder), 100)
        assert len(rows) == 12 + 1 + 6 and sorted(contents(rows)) == pixels_in(folder)

    def test_names_that_look_like_splits_lose_nothing(self, tmp_path):
        folder = write_folder(tmp_path / "my [photos]", labels=("train", "test"))
        for path in folder.glob("test/*.png"):
            path.rename(path.with_name(f"val_{path.name}"))
        assert len(load_images(str(folder), 100)[1]) == 16

    def test_captions_beside_images_are_dropped(self, folder):
        captions = "".join(f'{{"file_name": "{path.name}", "text": "red"}}\n' for path in folder.glob("red/*.png"))
        (folder / "red" / "metadata.jsonl").write_text(captions)
        assert load_images(str(folder / "red"), 100)[1].column_names == ["image"]

    def test_grey_and_turned_files(self, tmp_path):
        pixels = np.arange(20 * 30, dtype=np.uint32).reshape(20, 30).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        (image,) = decoded(load_images(str(tmp_path), 1)[1])
        assert (np.asarray(image) == np.rot90(pixels, -1)[..., None]).all() and image.mode == "RGB"

    @pytest.mark.parametrize("files", [(), ("notes.txt",)])
    def test_without_images(self, tmp_path, files):
        (tmp_path / "empty" / "inside").mkdir(parents=True)
        for name in files:
            (tmp_path / "empty" / "inside" / name).write_text("")
        with pytest.raises(ValueError, match="no images in .*empty"):
            load_images(str(tmp_path / "empty"), 4)

    @pytest.mark.parametrize("name", ["{}/missing", "./missing", "../missing", "~/missing", "file.png"])
    def test_missing(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        Image.new("RGB", (8, 8)).save(tmp_path / "file.png")
        name = name.format(tmp_path)
        with pytest.raises(ValueError, match=f"There is no folder {name}"):
            load_images(name, 4)

    def test_a_name_that_is_neither_a_folder_nor_on_the_hub(self):
        with pytest.raises((OSError, ValueError), match="nobody/nothing"):
            load_images("nobody/nothing", 4)

    @pytest.mark.parametrize("spoil", [lambda file: file.write_text("no"), lambda file: cut(file)])
    def test_an_unreadable_image_is_named(self, folder, spoil):
        spoil(folder / "red" / "3.png")
        _, rows = load_images(str(folder), 100)
        with pytest.raises(UnreadableImageError, match=r"red/3\.png can't be read"):
            list(decoded(rows))


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:200])


class TestChoice:
    def test_digits_by_default(self):
        name, rows = load_images(None, 500)
        assert name == NAME and rows.column_names == ["image"] and len(rows) == 360
        test = [image.convert("RGB").tobytes() for image in digits_splits()[1]["image"]]
        assert sorted(contents(rows)) == sorted(test)

    @pytest.mark.parametrize("count", [1, 5, 12, 13])
    def test_at_most_so_many(self, folder, count):
        assert len(load_images(str(folder), count)[1]) == min(count, 12)

    @pytest.mark.parametrize("data", ["folder", None])
    def test_the_seed_decides_which(self, folder, data):
        data = data and str(folder)
        images = [contents(load_images(data, 6, seed)[1]) for seed in (3, 3, 4)]
        assert images[0] == images[1] and set(images[0]) != set(images[2])
        assert contents(load_images(data, 6)[1]) == contents(load_images(data, 6, 0)[1])

    def test_they_are_picked_from_everywhere(self, folder):
        reds = set(pixels_in(folder / "red"))
        picked = set(contents(load_images(str(folder), 8)[1]))
        assert 0 < len(picked & reds) < 8


class TestTables:
    def load(self, table, folder, count=100):
        folder.mkdir()
        table.to_parquet(str(folder / "0.parquet"))
        return load_images(str(folder), count)

    def test_parquet_folder(self, table, folder, tmp_path):
        name, rows = self.load(table, tmp_path / "tables")
        assert name == "tables" and rows.column_names == ["image"]
        assert sorted(contents(rows)) == pixels_in(folder)

    def test_several_files(self, table, tmp_path):
        folder = tmp_path / "my [tables]"
        (folder / "more").mkdir(parents=True)
        for i, place in enumerate(("train-0", "test-0", "more/1")):
            table.shard(3, i).to_parquet(str(folder / f"{place}.parquet"))
        assert len(load_images(str(folder), 100)[1]) == 12

    def test_columns_of_other_names_and_kinds(self, table, folder, tmp_path):
        table = table.rename_column("image", "picture").add_column("text", ["a"] * 12)
        _, rows = self.load(table, tmp_path / "tables")
        assert rows.column_names == ["image"] and sorted(contents(rows)) == pixels_in(folder)

    def test_several_columns_of_images(self, table, tmp_path):
        masks = table.select_columns(["image"]).rename_column("image", "mask")
        table = datasets.concatenate_datasets([table, masks], axis=1)
        with pytest.raises(ValueError, match=r"one column of images; it has \['image', 'mask'\]"):
            self.load(table, tmp_path / "tables")

    def test_no_column_of_images(self, table, tmp_path):
        with pytest.raises(ValueError, match=r"it has none among \['label'\]"):
            self.load(table.select_columns(["label"]), tmp_path / "tables")


class TestHub:
    """Datasets of the Hub, which come as streams."""

    @pytest.fixture
    def splits(self, table, monkeypatch):
        """What the dataset has."""
        splits = {}

        def load(name, streaming):
            assert (name, streaming) == ("someone/pets", True)
            return datasets.IterableDatasetDict(splits)

        monkeypatch.setattr(image_sample, "load_dataset", load)
        return splits

    @pytest.mark.parametrize(
        "names, chosen",
        [
            (["train", "test"], "test"),
            (["train", "test", "validation"], "validation"),
            (["train", "extra"], "train"),
            (["extra"], "extra"),
        ],
    )
    def test_images_that_training_did_not_see_where_there_are_some(self, splits, table, names, chosen):
        for name in names:
            splits[name] = table.select(range(3, 8) if name == chosen else range(3)).to_iterable_dataset()
        name, rows = load_images("someone/pets", 100)
        assert name == f"pets ({chosen})" and all(list(row) == ["image"] for row in rows)
        assert sorted(contents(rows)) == sorted(image.tobytes() for image in table[3:8]["image"])

    def test_count_and_seed(self, splits, table):
        splits["train"] = table.rename_column("image", "picture").to_iterable_dataset()
        images = [contents(load_images("someone/pets", 4, seed)[1]) for seed in (3, 3, 4)]
        assert [len(each) for each in images] == [4, 4, 4]
        assert images[0] == images[1] and set(images[0]) != set(images[2])

    def test_a_stream_is_read_once(self, splits, table):
        read = []
        stream = table.cast_column("image", datasets.Image(decode=False)).to_iterable_dataset()
        splits["train"] = stream.map(lambda row: read.append(row["label"]) or row, features=stream.features)
        rows = load_images("someone/pets", 4)[1]
        once = len(read)
        assert 4 <= once <= 12 and contents(rows) == contents(rows) and len(contents(rows)) == 4
        assert len(read) == once

    def test_columns_that_nobody_knows(self, splits):
        splits["train"] = datasets.IterableDataset.from_generator(lambda: iter([{"image": 1}]))
        with pytest.raises(ValueError, match=r"pets \(train\) doesn't say what its columns hold"):
            load_images("someone/pets", 4)
