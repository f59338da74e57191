"""Which images are held out: each by its content, so that none is ever on both sides."""

import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from refiner_hf.data import validation_split
from refiner_hf.data.arguments import DataArguments
from refiner_hf.data.content_hashes import content_digests, content_hashes
from refiner_hf.data.sources import load_image_data
from refiner_hf.data.validation_split import hold_out

from ..images import write_folder


FEATURES = Features({"image": Image(decode=False), "labels": ClassLabel(names=["cat", "dog", "fox"])})


def table(contents, labels):
    """Rows of which only the content matters."""
    images = [{"bytes": str(content).encode(), "path": None} for content in contents]
    return Dataset.from_dict({"image": images, "labels": list(labels)}, features=FEATURES)


def sides(data):
    return (set(content_hashes(side, "some").tolist()) for side in data)


def load(folder, seed=0, **fields):
    fields = {"train_dir": str(folder), "train_val_split": 0.3, **fields}
    data = load_image_data(DataArguments(**fields), need_train=True, need_evaluation=True, seed=seed)
    return data.train.data, data.evaluation.data


class TestFoldersThatChange:
    """Real pictures, forty of each label."""

    @pytest.fixture
    def folder(self, tmp_path):
        return write_folder(tmp_path / "photos", per_label=40)

    def test_no_picture_changes_sides(self, folder, tmp_path):
        train, held = sides(load(folder))
        assert 15 < len(held) < 60 and len(train) + len(held) == 120
        more = write_folder(tmp_path / "more", per_label=3, labels=("red", "violet"), side=20)
        for i, picture in enumerate(sorted(more.rglob("*.png"))):
            shutil.copy(picture, folder / "blue" / f"00{i}.png")  # before all others
        (folder / "green" / "7.png").unlink()
        train_now, held_now = sides(load(folder))
        assert not held & train_now and not train & held_now
        assert len(train_now | held_now) == 120 - 1 + 6

    def test_names_and_order_do_not_matter(self, folder, tmp_path):
        train, held = sides(load(folder))
        for path in folder.rglob("*.png"):
            path.rename(path.with_name(f"{1000 - int(path.stem)}.png"))
        assert list(sides(load(folder.rename(tmp_path / "moved")))) == [train, held]

    def test_copies_are_on_one_side(self, folder):
        for label in ("blue", "red"):
            for i in range(20):
                shutil.copy(folder / label / f"{i}.png", folder / label / f"copy_of_{i}.png")
        train, held = load(folder)
        assert len(train) + len(held) == 160
        one, other = sides((train, held))
        assert not one & other and len(one) + len(other) == 120

    def test_a_seed_decides(self, folder):
        _, held = sides(load(folder))
        assert list(sides(load(folder)))[1] == held != list(sides(load(folder, seed=1)))[1]

    def test_limits_stay_within_their_side(self, folder):
        _, held = sides(load(folder))
        train, evaluation = sides(load(folder, max_train_samples=70, max_eval_samples=9))
        assert evaluation < held and not train & held and (len(train), len(evaluation)) == (70, 9)


class TestSmallSets:
    def test_about_the_share(self):
        rows = table(range(4000), np.arange(4000) % 3)
        for share in (0.05, 0.5, 0.9):
            left, held = hold_out(rows, (0, share), seed=3)
            assert len(left) + len(held) == 4000 and abs(len(held) / 4000 - share) < 0.04

    def test_a_larger_share_holds_out_the_same_and_more(self):
        rows = table(range(300), np.arange(300) % 3)
        (_, few), (_, many) = (sides(hold_out(rows, (0, share), seed=3)) for share in (0.2, 0.4))
        assert few < many

    def test_nothing_is_held_out(self):
        with pytest.raises(ValueError, match="None of the 6 images is held out at --train_val_split 1e-09.*Raise"):
            hold_out(table(range(6), [0, 1] * 3), (0, 1e-9), seed=0)

    def test_a_label_that_could_not_be_learned(self):
        rows = table([*range(50), *["one"] * 3], [*[0, 1] * 25, *[2] * 3])
        place = validation_split._place(content_hashes(rows, "some").tolist()[-1], 0)
        with pytest.raises(ValueError, match="All images of fox are held out.*--validation_dir"):
            hold_out(rows, (0, place + 1e-6), seed=0)
        left, held = hold_out(rows, (0, place + 1e-6), seed=0, need_train=False)
        assert len(left) + len(held) == 53, "only measured, there is nothing to learn"

    def test_a_label_of_which_nothing_is_measured(self, monkeypatch):
        said = []
        monkeypatch.setattr(validation_split.logger, "warning", said.append)
        rows = table([*range(50), "one"], [*[0, 1] * 25, 2])
        place = validation_split._place(content_hashes(rows, "some").tolist()[-1], 0)
        hold_out(rows, (0, place), seed=0)
        assert said == ["No image of fox is held out: nothing will be measured of them."]

    def test_how_many_is_said(self, tmp_path):
        args = DataArguments(train_dir=str(write_folder(tmp_path / "photos")), train_val_split=0.4)
        data = load_image_data(args, need_train=True, need_evaluation=True, seed=0)
        assert data.evaluation_split == f"{len(data.evaluation)} of 24 images held out of train"


class TestDigests:
    def test_what_they_tell_apart(self):
        digests = content_digests(table(range(9), [0, 1, 2] * 3), "some")
        assert digests == content_digests(table(range(9), [0, 1, 2] * 3), "some")
        others = {
            "order": table(reversed(range(9)), reversed([0, 1, 2] * 3)),
            "labels": table(range(9), [0, 1, 1] * 3),
            "images": table(range(1, 10), [0, 1, 2] * 3),
        }
        for what, rows in others.items():
            found = content_digests(rows, "some")
            assert found["rows"] != digests["rows"], what
            assert (found["contents"] == digests["contents"]) == (what != "images"), what

    def test_a_file_that_is_gone_stops_nobody_here(self, tmp_path):
        rows = Dataset.from_dict(
            {"image": [{"bytes": None, "path": str(tmp_path / "1.png")}], "labels": [0]}, features=FEATURES
        )
        assert len(content_hashes(rows, "some")) == 1
        assert len(content_hashes(rows.select([]), "some")) == 0
