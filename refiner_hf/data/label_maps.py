"""
Label maps: a teacher's scores for each place of each training image (token labelling, Jiang et al. 2021, arXiv
2104.10858).

A label map holds a teacher's k best classes, with their raw scores, at each place of a grid over the whole image. It
is found by the content of the image's file, which may be anywhere and have any name.
"""

from abc import ABC, abstractmethod
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import load_dataset

from ..utils.files import read_json
from ..utils.text import counted, name_some
from .images import read_bytes


FACTS_FILE = "label_maps.json"
SHARDS = "label_maps-*.parquet"
KEY, SCORES, CLASSES = "key", "scores", "classes"  # columns of a shard
# What a row of training data holds beside `pixel_values` and `labels` where it has a label map.
MAP_SCORES, MAP_CLASSES, BOX, FLIPPED = "label_map_scores", "label_map_classes", "box", "flipped"
_NOT_FOUND = "There is no label map of the image {name}. Make the maps again, of all training images."


class LabelMap(NamedTuple):
    """`scores` (k, rows, columns), float16, and `classes` (k, rows, columns), int16: the best first."""

    scores: np.ndarray
    classes: np.ndarray


class LabelMaps(ABC):
    """Label maps by image."""

    @abstractmethod
    def __call__(self, image: dict[str, Any]) -> LabelMap:
        """
        The map of an image as `datasets` stores it, bytes or a path.

        Raises:
            `ValueError`: there is none.
        """


class ShardedLabelMaps(LabelMaps):
    """
    Those that `refiner label-maps` makes: parquet shards, and a file of facts.

    Raises:
        `ValueError`: the folder isn't finished, or its maps are of other labels than `labels`.
    """

    def __init__(self, folder: Path, labels: list[str]):
        facts = read_json(folder / FACTS_FILE)
        if not facts.get("finished"):
            raise ValueError(
                f"The label maps in {folder} aren't finished. Start refiner label-maps again to continue."
            )
        if facts["labels"] != labels:
            raise ValueError(
                f"The label maps in {folder} are of {counted(len(facts['labels']), 'label')} "
                f"({name_some(facts['labels'])}), the data has {len(labels)} ({name_some(labels)})."
            )
        self.shape = facts["top_k"], facts["rows"], facts["columns"]
        files = sorted(str(path) for path in folder.glob(SHARDS))
        self.data = load_dataset("parquet", data_files=files, split="train").with_format("numpy")
        keys = self.data.data.column(KEY).to_numpy()
        self.order = np.argsort(keys)
        self.keys = keys[self.order]

    def __call__(self, image: dict[str, Any]) -> LabelMap:
        key = key_of(image)
        place = np.searchsorted(self.keys, key)
        if place == len(self.keys) or self.keys[place] != key:
            raise ValueError(_NOT_FOUND.format(name=image.get("path") or "(without a file name)"))
        row = self.data[int(self.order[place])]
        # `datasets` gives wider types than it stores
        scores, classes = row[SCORES].astype(np.float16), row[CLASSES].astype(np.int16)
        return LabelMap(scores.reshape(self.shape), classes.reshape(self.shape))


class PublishedLabelMaps(LabelMaps):
    """
    The maps that token labelling's authors published: a folder with CLASS/NAME.pt for each CLASS/NAME.JPEG, a float16
    tensor (2, k, rows, columns) of scores and classes. The classes are numbered as the data's labels must be: in
    alphabetical order of ImageNet's class folders.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, image: dict[str, Any]) -> LabelMap:
        name = image.get("path")
        if not name:
            raise ValueError("Label maps in .pt files go by the images' file names, which these images haven't.")
        files = [self.folder / f"{'/'.join(Path(name).with_suffix('').parts[-n:])}.pt" for n in (2, 1)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(_NOT_FOUND.format(name=name))
        try:
            scores, classes = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{file} isn't a label map, a tensor (2, k, rows, columns) of scores and classes: {error}"
            ) from error
        return LabelMap(scores.half().numpy(), classes.short().numpy())


def open_label_maps(folder: str, labels: list[str]) -> LabelMaps:
    """
    The label maps in a folder, of either kind.

    Args:
        folder (`str`): made by `refiner label-maps`, or of published `.pt` files.
        labels (`list[str]`): those of the data.

    Raises:
        `ValueError`: no label maps there, unfinished ones, or those of other labels.
    """
    path = Path(folder)
    if (path / FACTS_FILE).is_file():
        return ShardedLabelMaps(path, labels)
    if path.is_dir() and next(path.rglob("*.pt"), None):
        return PublishedLabelMaps(path)
    raise ValueError(f"{folder} holds no label maps: neither {FACTS_FILE}, of refiner label-maps, nor .pt files.")


def key_of(image: dict[str, Any]) -> int:
    """A number for what is in an image's file: 8 bytes of its hash."""
    return int.from_bytes(blake2b(read_bytes(image), digest_size=8).digest(), "big", signed=True)
