"""Training and evaluation images from the Hub, a folder, parquet files, a stream, or the embedded digits."""

import glob
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value, load_dataset
from transformers.utils import logging

from ..utils.files import check_writable
from .arguments import DataArguments
from .columns import IMAGE_COLUMN, LABEL_COLUMN
from .holding_out import hold_out


logger = logging.get_logger(__name__)

_LABEL_NAMES = ("label", "labels", "fine_label")
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")
_SHUFFLE_BUFFER = 1000  # images of a stream among which the next one is drawn


@dataclass
class ImageData:
    """
    What a run needs to know of its data.

    `train` and `evaluation` have the columns `image` (not decoded) and `labels` (positions in `labels`), and `content`
    where images were held out; `name` is what the card calls the data, `hub_id` its name on the Hub if it has one,
    `evaluation_split` where `evaluation` comes from.
    """

    name: str
    labels: list[str]
    train: Dataset | IterableDataset | None
    evaluation: Dataset | IterableDataset | None
    evaluation_split: str
    hub_id: str | None = None


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
    evaluation_split = next((split for split in EVALUATION_SPLITS if split in splits), None)
    train, evaluation = splits.get("train"), splits.get(evaluation_split)
    if train is None and need_train:
        raise ValueError(f"{name} has no training images; its splits are {sorted(splits)}. Give --train_dir.")
    if evaluation is None and train is None:
        raise ValueError(f"{name} has neither a train, a validation nor a test split, but {sorted(splits)}.")

    train, names = _standard_columns(train, args, need_train) if train is not None else (None, None)
    if need_train and len(names) < 2:
        raise ValueError(f"{name} has one label only, {names}: there is nothing to tell apart.")
    if evaluation is not None:
        evaluation, evaluation_names = _standard_columns(evaluation, args, need_evaluation)
        names = names or evaluation_names
        evaluation = _relabel(evaluation, evaluation_names, names)
    elif need_evaluation:
        whole = train
        train, evaluation = hold_out(whole, args.train_val_split, seed, need_train=need_train)
        evaluation_split = f"{len(evaluation):,} of {len(whole):,} images held out of train"
        logger.warning(f"There is no validation set: evaluating on {evaluation_split}.")

    return ImageData(
        name=name,
        labels=names,
        train=at_most(train, args.max_train_samples, seed),
        evaluation=at_most(evaluation, args.max_eval_samples, seed),
        evaluation_split=evaluation_split or "none",
        hub_id=args.dataset_name if args.dataset_name and not os.path.exists(args.dataset_name) else None,
    )


def _load_splits(args: DataArguments) -> tuple[dict, str]:
    if args.embedded:
        from .digits import NAME, digits_splits

        return dict(zip(("train", "test"), digits_splits())), NAME
    if args.dataset_name:
        check_cache()
        splits = load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
        return dict(splits), os.path.basename(os.path.normpath(args.dataset_name))
    folders = {"train": args.train_dir, "validation": args.validation_dir}
    splits = {split: _load_folder(folder) for split, folder in folders.items() if folder}
    path = Path(args.train_dir or args.validation_dir).resolve()
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
    if not has_tables(path) and not any(file.is_file() for file in path.glob("*/*")):
        raise ValueError(
            f"{folder} has no images in subfolders. Put them into one subfolder per label, such as "
            f"{path / 'cat' / '1.jpg'}."
        )
    data = read_files(path, drop_labels=False)
    if not has_tables(path) and not any(path.rglob("metadata.*")):  # with such a file, that one says the labels
        _check_nothing_left_out(path, data)
    return data


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
            f"{len(files) - len(data):,} files in {folder} don't have names of images and are left out: "
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


def _standard_columns(
    data: Dataset | IterableDataset, args: DataArguments, check_labels: bool
) -> tuple[Dataset | IterableDataset, list[str]]:
    """The data with the columns `image` and `labels` only, and the labels' names."""
    features = data.features
    if features is None:
        raise ValueError("The dataset doesn't say what its columns hold; it can't be streamed. Drop --streaming.")
    image = args.image_column_name or _only_column(features, lambda f: isinstance(f, Image), "image_column_name")
    label = args.label_column_name or next((name for name in _LABEL_NAMES if name in features), None)
    label = label or _only_column(features, lambda f: isinstance(f, ClassLabel), "label_column_name")
    for column in (image, label):
        if column not in features:
            raise ValueError(f"The dataset has no column {column!r}, but {sorted(features)}.")

    if not isinstance(features[label], ClassLabel):
        data = _as_class_label(data, label, features[label])
    names = data.features[label].names
    if check_labels:
        _check_labels(data, label, len(names))
    # Done first, because renaming a stream's columns would decode its images and encode them again. Our own transform
    # decodes them: it can name a file that is damaged.
    data = data.cast_column(image, Image(decode=False)).select_columns([image, label])
    renames = {old: new for old, new in ((image, IMAGE_COLUMN), (label, LABEL_COLUMN)) if old != new}
    return data.rename_columns(renames) if renames else data, names


def _only_column(features, is_wanted, option: str) -> str:
    found = [name for name, feature in features.items() if is_wanted(feature)]
    if len(found) != 1:
        raise ValueError(f"Which column to use? Give --{option}, one of {sorted(features)}.")
    return found[0]


def _as_class_label(data, column: str, feature):
    if isinstance(data, IterableDataset):
        raise ValueError(f"The labels in column {column!r} have no list of names, which a stream needs: {feature}.")
    if not isinstance(feature, Value):
        raise ValueError(f"The labels in column {column!r} must be integers or names, not {feature}.")
    if feature.dtype.startswith(("int", "uint")):
        values = data.unique(column)
        if None in values or min(values) < 0:
            some = sorted(map(str, values))[:5]
            raise ValueError(f"The labels in column {column!r} must be numbers from 0, got {some}.")
        if max(values) >= 10 * max(len(values), 10):
            raise ValueError(
                f"The labels in column {column!r} are {len(values)} different numbers up to {max(values)}: number "
                "them from 0 on, or give them as names."
            )
        return data.cast_column(column, ClassLabel(names=[str(i) for i in range(max(values) + 1)]))
    return data.class_encode_column(column)


def _check_labels(data: Dataset | IterableDataset, column: str, count: int) -> None:
    """A stream's are looked at when they come."""
    if isinstance(data, IterableDataset) or len(data) == 0:
        return
    labels = data.with_format("pandas")[column]
    wrong = labels[~labels.between(0, count - 1)]  # missing ones too
    if len(wrong):
        some = sorted({str(label) for label in wrong})[:5]
        raise ValueError(
            f"{len(wrong)} images have labels outside 0..{count - 1} (-1 is how unlabelled test sets say so): "
            f"{', '.join(some)}. The first is row {wrong.index[0]}."
        )


def _relabel(data, names: list[str], wanted: list[str]):
    """Labels as positions in `wanted` instead of in `names`."""
    if names == wanted:
        return data
    if unknown := sorted(set(names) - set(wanted)):
        raise ValueError(f"The validation set has labels that the training set lacks: {unknown}.")
    position = [wanted.index(name) for name in names]
    feature = ClassLabel(names=wanted)
    features = data.features.copy()
    features[LABEL_COLUMN] = feature
    return data.map(lambda row: {LABEL_COLUMN: pick_label(position, row[LABEL_COLUMN])}, features=features)


def pick_label(choices: list[int], label: int | None) -> int:
    """`choices[label]`; raises a `ValueError` for a label that isn't one, such as the -1 of unlabelled test sets."""
    if label is None or not 0 <= label < len(choices):
        raise ValueError(f"An image has the label {label}; labels must lie in 0..{len(choices) - 1}.")
    return choices[label]


def at_most(data: Dataset | IterableDataset | None, number: int | None, seed: int) -> Dataset | IterableDataset | None:
    """`number` images at random, the same ones for a seed; the first ones of a stream; all where it is `None`."""
    if data is None or number is None:
        return data
    if isinstance(data, IterableDataset):
        return data.take(number)
    return data.shuffle(seed=seed).select(range(min(number, len(data))))


def shuffled(data: Dataset | IterableDataset, seed: int) -> Dataset | IterableDataset:
    """A stream whose next image is drawn among a thousand; anything else as it is."""
    return data.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) if isinstance(data, IterableDataset) else data
