"""Label maps, found by what is in an image's file."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from refiner_hf.data.label_maps import PublishedLabelMaps, ShardedLabelMaps, key_of, open_label_maps


@pytest.fixture
def images(tmp_path):
    """Files whose content is their number."""
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    encoded = []
    for i in range(7):
        path = tmp_path / "photos" / "cat" / f"{i}.jpeg"
        path.write_bytes(b"image %d" % i)
        encoded.append({"path": str(path), "bytes": None})
    return encoded


@pytest.fixture
def folder(tmp_path, images):
    """Maps of these in two shards, in another order."""
    path = tmp_path / "maps"
    path.mkdir()
    for shard, rows in enumerate(([6, 0, 3, 2], [5, 1, 4])):
        content = {
            "key": [key_of(images[i]) for i in rows],
            "scores": [np.full(2 * 3 * 4, i + 0.5, np.float16) for i in rows],
            "classes": [np.arange(2 * 3 * 4, dtype=np.int16) + i for i in rows],
        }
        Dataset.from_dict(content).to_parquet(str(path / f"label_maps-{shard:05}.parquet"))
    facts = {"labels": ["cat", "dog"], "top_k": 2, "rows": 3, "columns": 4, "finished": True}
    (path / "label_maps.json").write_text(json.dumps(facts))
    return path


def test_each_image_has_its_own(folder, images):
    maps = open_label_maps(str(folder), ["cat", "dog"])
    assert isinstance(maps, ShardedLabelMaps)
    for i, image in enumerate(images):
        scores, classes = maps(image)
        assert scores.shape == classes.shape == (2, 3, 4)
        assert (scores == i + 0.5).all() and classes[0, 0, 0] == i and classes[1, 2, 3] == i + 23
    moved = {"path": "elsewhere.png", "bytes": b"image 4"}
    assert (maps(moved).scores == 4.5).all(), "what counts is what is in the file"


def test_an_image_without_one_is_named(folder):
    maps = open_label_maps(str(folder), ["cat", "dog"])
    with pytest.raises(ValueError, match="no label map of the image new.png"):
        maps({"path": "new.png", "bytes": b"another"})


def test_published_files(tmp_path, images):
    maps = np.random.default_rng(0).normal(size=(2, 5, 18, 18)).astype(np.float16)
    maps[1] = np.arange(5 * 18 * 18).reshape(5, 18, 18) % 1000
    (tmp_path / "published" / "cat").mkdir(parents=True)
    torch.save(torch.from_numpy(maps), tmp_path / "published" / "cat" / "3.pt")
    found = open_label_maps(str(tmp_path / "published"), ["cat", "dog"])
    assert isinstance(found, PublishedLabelMaps)
    scores, classes = found(images[3])
    assert (scores == maps[0]).all() and (classes == maps[1]).all()
    assert scores.dtype == np.float16 and classes.dtype == np.int16
    with pytest.raises(ValueError, match="no label map of the image .*4.jpeg"):
        found(images[4])
    (tmp_path / "published" / "cat" / "3.pt").rename(tmp_path / "published" / "5.pt")  # without folders of classes
    assert (found(images[5]).scores == maps[0]).all()
    with pytest.raises(ValueError, match="file names, which these images haven't"):
        found({"path": None, "bytes": b"3"})
    (tmp_path / "published" / "cat" / "4.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match="4.pt isn't a label map"):
        found(images[4])


def test_unfinished_and_other_maps(folder, tmp_path):
    with pytest.raises(ValueError, match="are of 2 labels .cat, dog., the data has 2 .cat, cow."):
        open_label_maps(str(folder), ["cat", "cow"])
    facts = json.loads((folder / "label_maps.json").read_text())
    (folder / "label_maps.json").write_text(json.dumps({**facts, "finished": False}))
    with pytest.raises(ValueError, match="aren't finished. Start refiner label-maps again"):
        open_label_maps(str(folder), ["cat", "dog"])
    shutil.rmtree(folder)
    for name in ("maps", "photos"):
        with pytest.raises(ValueError, match="holds no label maps"):
            open_label_maps(str(tmp_path / name), ["cat", "dog"])
