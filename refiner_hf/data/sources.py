"""Training and evaluation images from the Hub, a folder, parquet files, a stream, or the embedded digits."""

import glob
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Image, List, Value, load_dataset
from transformers.utils import logging

from ..choices_refiner import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ..utils.files import check_writable
from ..utils.image_files import images_in
from ..utils.text import counted
from .arguments import DataArguments
from .columns import IMAGE_COLUMN, LABEL_COLUMN
from .labels import as_label_lists, as_numbers, pick_label
from .rows import Rows, StoredRows, StreamedRows


logger = logging.get_logger(__name__)

_LABEL_NAMES = ("label", "labels", "fine_label")
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass
class ImageData:
    """
    What a run needs to know of its data.

    `train` and `evaluation` have the columns `image` (not decoded) and `labels` (positions in `labels`), and `content`
    where images were held out; `name` is what the card calls the data, `hub_id` its name on the Hub if it has one,
    `evaluation_split` where `evaluation` comes from. If there is a `test` beside it, that is measured on at the end.
    """

    name: str
    labels: list[str]
    train: Rows | None
    evaluation: Rows | None
    evaluation_split: str
    hub_id: str | None = None
    test: Rows | None = None
    problem_type: str = SINGLE_LABEL


def load_image_data(args: DataArguments, *, need_train: bool, need_evaluation: bool, seed: int) -> ImageData:
    """
    Loads what `args` names, with the images still encoded and the labels as integers.

    Args:
        args ([`DataArguments`]): the data options.
        need_train (`bool`): whether a missing training set is an error.
        need_evaluation (`bool`): whether images are held out of the training set where there is no validation set.
        seed (`int`): decides, with each image's content, which ones are held out; and which ones `max_train_samples`
            and `max_eval_samples` keep of either side.

    Raises:
        `ValueError`: no such folder, no training set, no image or label column; the message lists what is there. Or
            too few images to hold some out.
    """
    splits, name = _load_splits(args)
    kept = {"test"} if args.test_dir and "train" in splits else set()  # for the end
    if args.k_folds is not None and "train" in splits:
        kept |= splits.keys() - {"train"}
    evaluation_split = next((split for split in EVALUATION_SPLITS if split in splits.keys() - kept), None)
    train, evaluation = splits.get("train"), splits.get(evaluation_split)
    if train is None and need_train:
        raise ValueError(f"{name} has no training images; its splits are {sorted(splits)}. Give --train_dir.")
    if evaluation is None and train is None:
        raise ValueError(f"{name} has neither a train, a validation nor a test split, but {sorted(splits)}.")

    test = splits.get("test") if evaluation_split != "test" and need_evaluation else None
    train, names = _standard_columns(train, args, need_train) if train is not None else (None, None)
    if need_train and len(names) < 2 and args.problem_type == SINGLE_LABEL:
        raise ValueError(f"{name} has one label only, {names}: there is nothing to tell apart.")
    if evaluation is not None:
        evaluation, evaluation_names = _standard_columns(evaluation, args, need_evaluation)
        names = names or evaluation_names
        evaluation = evaluation.changed(lambda data: _relabel(data, evaluation_names, names, evaluation_split))
    elif need_evaluation:
        train, evaluation = train.divided(args.held_out, seed, need_train=need_train)
        evaluation_split = f"{len(evaluation):,} of {len(train) + len(evaluation):,} images held out of train"
        if args.k_folds is not None:
            evaluation_split += f", fold {args.fold or 1} of {args.k_folds}"
        logger.warning(f"There is no validation set: evaluating on {evaluation_split}.")

    if test is not None:
        test = _test_images(test, names, args)

    return ImageData(
        name=name,
        labels=names,
        train=None if train is None else train.at_most(args.max_train_samples, seed),
        evaluation=None if evaluation is None else evaluation.at_most(args.max_eval_samples, seed),
        evaluation_split=evaluation_split or "none",
        hub_id=args.dataset_name if args.dataset_name and not os.path.exists(args.dataset_name) else None,
        test=test,
        problem_type=args.problem_type,
    )


def _test_images(rows: Rows, names: list[str], args: DataArguments) -> Rows | None:
    """With the training images' labels; `None` where a dataset keeps its test labels secret."""
    try:
        test, test_names = _standard_columns(rows, args, check_labels=True)
    except ValueError as error:
        if args.test_dir:
            raise
        logger.warning(f"The test split is left out: {error}")
        return None
    return test.changed(lambda data: _relabel(data, test_names, names, "test"))


def _load_splits(args: DataArguments) -> tuple[dict[str, Rows], str]:
    """The splits by name, and what to call the data."""
    if args.embedded:
        from .digits import NAME, digits_splits

        return dict(zip(("train", "test"), map(StoredRows, digits_splits()))), NAME
    if args.dataset_name:
        check_cache()
        splits = load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
        kind = StreamedRows if args.streaming else StoredRows
        name = os.path.basename(os.path.normpath(args.dataset_name))
        return {split: kind(data) for split, data in splits.items()}, name
    folders = {"train": args.train_dir, "validation": args.validation_dir, "test": args.test_dir}
    splits = {split: StoredRows(_load_folder(folder)) for split, folder in folders.items() if folder}
    path = Path(args.train_dir or args.validation_dir or args.test_dir).resolve()
    return splits, path.parent.name if path.name in ("train", *EVALUATION_SPLITS) else path.name


def _load_folder(folder: str) -> Dataset:
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    empty = sorted(
        f.name for f in path.glob("[!.]*") if f.is_dir() and not any(file.is_file() for file in f.rglob("*"))
    )
    if empty:
        raise ValueError(f"In {folder} there are labels without images: {', '.join(empty)}. Add some, or remove them.")
    described = has_tables(path) or any(path.rglob("metadata.*"))  # by files that say which images there are
    if not described and not any(file.is_file() for file in path.glob("*/*")):
        raise ValueError(
            f"{folder} has no images in subfolders. Put them into one subfolder per label, such as "
            f"{path / 'cat' / '1.jpg'}."
        )
    data = read_files(path, drop_labels=False)
    if not described:
        _check_nothing_left_out(path, data)
    elif not has_tables(path):
        _check_all_described(path, data)
    return data


def _check_all_described(folder: Path, data: Dataset) -> None:
    """
    Raises:
        `ValueError`: there are images of which the metadata say nothing; `datasets` leaves them out silently.
    """
    taken = {os.path.realpath(image["path"]) for image in data.cast_column("image", Image(decode=False))["image"]}
    if left := [file for file in images_in(folder) if os.path.realpath(file) not in taken]:
        raise ValueError(
            f"The metadata in {folder} say nothing of {counted(len(left), 'image')}, such as {left[0]}. Add a row for "
            "each, or move them away."
        )


def _check_nothing_left_out(folder: Path, data: Dataset) -> None:
    """
    `datasets` silently leaves out some folders and files, and takes an image's own folder for its label, at any depth.

    Raises:
        `ValueError`: the labels aren't the folders.
    """
    files = [
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    labels, folders = set(data.features["label"].names), {file.parts[0] for file in files if len(file.parts) > 1}
    if passed_over := sorted(folders - labels):
        raise ValueError(
            f"Images in the folders {', '.join(map(repr, passed_over))} of {folder} wouldn't be taken with these "
            "labels: the names of some folders are passed over (those that begin with two underlines), and images in "
            "further folders below would get those as labels. Rename the folders, and put the images right into them."
        )
    if more := sorted(labels - folders):
        raise ValueError(
            f"{', '.join(map(repr, more))} would become labels in {folder}, since images lie beside the labels' "
            "folders or in folders below them. Put all images right into one subfolder per label."
        )
    if len(files) > len(data):
        images = data.cast_column("image", Image(decode=False))["image"]
        taken = {os.path.relpath(image["path"], folder.resolve()) for image in images}
        kinds = Counter(file.suffix.lower() or file.name for file in files if str(file) not in taken)
        logger.warning(
            f"Left out: {counted(len(files) - len(data), 'file')} in {folder} without an image's extension: "
            + ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(5))
        )


def has_tables(folder: Path) -> bool:
    """Whether there are parquet files in a folder or below it."""
    return any(folder.rglob("*.parquet"))


def check_cache() -> None:
    """
    Raises:
        `OSError`: `datasets` can't keep there what it prepares.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    check_writable(cache, "The cache of `datasets`,", "Set HF_DATASETS_CACHE to a folder that can.")


def read_files(folder: Path, *, drop_labels: bool) -> Dataset:
    """All parquet files in a folder and below it, or where there are none all images."""
    # Files are given by pattern, as the training split: left to itself, `datasets` sorts them into splits by what
    # their names look like ("test_1.jpg", a label called "train"), and drops the rest.
    check_cache()
    inside = glob.escape(str(folder.resolve()))
    if has_tables(folder):
        return load_dataset("parquet", data_files={"train": f"{inside}/**/*.parquet"}, split="train")
    return load_dataset("imagefolder", data_files={"train": f"{inside}/**"}, split="train", drop_labels=drop_labels)


def _standard_columns(rows: Rows, args: DataArguments, check_labels: bool) -> tuple[Rows, list[str]]:
    """The rows with the columns `image` and `labels` only, and the labels' names."""
    features = rows.features
    if features is None:
        raise ValueError("The dataset doesn't say what its columns hold; it can't be streamed. Drop --streaming.")
    image = args.image_column_name or _only_column(features, lambda f: isinstance(f, Image), "image_column_name")
    label = args.label_column_name or next((name for name in _LABEL_NAMES if name in features), None)
    label = label or _only_column(features, lambda f: isinstance(f, ClassLabel), "label_column_name")
    for column in (image, label):
        if column not in features:
            raise ValueError(f"The dataset has no column {column!r}, but {sorted(features)}.")

    names = [label]
    if args.problem_type == SINGLE_LABEL:
        if not isinstance(features[label], ClassLabel):
            rows = rows.with_class_labels(label)
        names = rows.features[label].names
        if check_labels:
            rows.check_labels(label, len(names))
    # Done first, because renaming a stream's columns would decode its images and encode them again. Our own transform
    # decodes them: it can name a file that is damaged.
    rows = rows.changed(lambda data: data.cast_column(image, Image(decode=False)).select_columns([image, label]))
    if args.problem_type == MULTI_LABEL:
        data, names = as_label_lists(rows.data, label)
        rows = type(rows)(data)
    elif args.problem_type == REGRESSION:
        rows = rows.changed(partial(as_numbers, column=label))
    renames = {old: new for old, new in ((image, IMAGE_COLUMN), (label, LABEL_COLUMN)) if old != new}
    return rows.changed(lambda data: data.rename_columns(renames)) if renames else rows, names


def _only_column(features, is_wanted, option: str) -> str:
    found = [name for name, feature in features.items() if is_wanted(feature)]
    if len(found) != 1:
        raise ValueError(f"Which column to use? Give --{option}, one of {sorted(features)}.")
    return found[0]


def _relabel(data, names: list[str], wanted: list[str], split: str):
    """Labels as positions in `wanted` instead of in `names`."""
    if isinstance(data.features[LABEL_COLUMN], Value) or names == wanted:  # numbers have no names
        return data
    if unknown := sorted(set(names) - set(wanted)):
        raise ValueError(f"The {split} set has labels that the training set lacks: {unknown}.")
    position = [wanted.index(name) for name in names]
    several = isinstance(data.features[LABEL_COLUMN], List)
    features = data.features.copy()
    features[LABEL_COLUMN] = List(ClassLabel(names=wanted)) if several else ClassLabel(names=wanted)

    def relabelled(row: dict) -> dict:
        given = row[LABEL_COLUMN]
        new = [pick_label(position, each) for each in given] if several else pick_label(position, given)
        return {LABEL_COLUMN: new}

    return data.map(relabelled, features=features)
