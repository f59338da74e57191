"""From images to a table of a classifier's answers."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from ..image_processing_pil_refiner import open_image, to_8_bit_rgb
from ..utils.image_files import find_images
from ..utils.locking import locked_beside
from ..utils.processes import Processes
from ..utils.text import counted
from .classifiers import Classifier, open_classifier
from .table import FEATURES, AnswerTable, as_text, check_place, part_of, partial_file


DEFAULT_WORKERS = min(4, os.cpu_count() or 1)

_PARQUET = ".parquet"


@dataclass
class Predictions:
    """What became of the images: how many got each label as their first, and why others can't be read, by file."""

    labels: Counter[str]
    unreadable: dict[str, str] = field(default_factory=dict)


def predict(
    model: str,
    images: str | os.PathLike | Iterable[str | os.PathLike],
    output_file: str | os.PathLike,
    *,
    top_k: int = 1,
    features: bool = False,
    batch_size: int = 32,
    num_workers: int = DEFAULT_WORKERS,
    device: str = "cpu",
    revision: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
) -> Predictions:
    """
    Writes a table of a classifier's answers to images: `file,label,score`, and with `top_k` also `label_2,score_2` and
    so on, sorted by file. Scores are probabilities.

    The rows are written batch by batch into `output_file` + `.partial`, which gets its name when all are there. After
    an interruption the same call continues after those rows. Files that were added or repaired meanwhile come last.

    Processes that torchrun or accelerate has started divide the images; the first joins their rows to one table, and
    another number of processes may continue it.

    Args:
        model (`str`): folder or Hub name of one of transformers' image classifiers, or an exported one, see
            [`~refiner_hf.prediction.classifiers.open_classifier`].
        images (`str` or `Iterable[str]`): files, folders and patterns, see
            [`~refiner_hf.utils.image_files.find_images`].
        output_file (`str`): the table to write, as parquet where it ends in `.parquet`, else as CSV in UTF-8; its
            folder is made. Bytes in a file's name that aren't UTF-8 are written as `\\xe9`.
        top_k (`int`, *optional*, defaults to 1): how many labels of each image, at most all.
        features (`bool`, *optional*, defaults to `False`): also a column `features`, the numbers that the head of the
            model makes its answer of; only in parquet, and not of an exported model.
        batch_size (`int`, *optional*, defaults to 32): images at a time.
        num_workers (`int`, *optional*): processes that read ahead; 0 reads here. Default: 4, or the number of cores.
        device (`str`, *optional*, defaults to `"cpu"`): where the model runs.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.
        engine (`str`, *optional*): what computes an exported model, `"onnxruntime"` (the default) or `"openvino"`.
        precision (`str`, *optional*): `"float32"` (the default) or `"bfloat16"`, which PyTorch and OpenVINO know.

    Returns:
        [`Predictions`], in each of several processes those of all. Images that can't be read have no row; they are
        listed there.

    Raises:
        `ValueError`, `OSError`, `RuntimeError`: no images, or none that can be read; no classifier; a table that is
            there already, or unfinished and of another model, precision or `top_k`; a folder that can't be written,
            or a table that another process writes.
    """
    output = Path(output_file)
    _check_options(output, features, top_k=top_k, batch_size=batch_size, num_workers=num_workers)
    files = find_images([images] if isinstance(images, str | os.PathLike) else images)
    processes = Processes()
    if processes.is_first:
        check_place(output)
    classifier = open_classifier(model, processes.device(device), revision, engine, precision)
    top_k = min(top_k, len(classifier.labels))
    if features:
        classifier.keep_features()

    facts = {"model": classifier.digest(), "top_k": top_k, "features": features, "precision": classifier.precision}
    names = [_printable(file) for file in files]
    with ExitStack() as held:
        columns, answers = _columns(top_k, features), None
        if processes.is_first:
            answers = _open_table(output, columns, facts, names, held)
        done = processes.from_first(answers and answers.finished)
        if answers is None:  # not before the first has looked for parts that others have left
            answers = held.enter_context(AnswerTable(part_of(output, processes.number), columns, facts))
        to_do = [file for file, name in zip(files, names) if name not in done]
        to_do = to_do[processes.number :: processes.count]
        unreadable: dict[str, str] = {}
        bar = tqdm(total=len(done) + len(to_do), initial=len(done), unit="image", disable=not processes.is_first)
        with bar as progress:
            for batch in _read_ahead(to_do, classifier.processor, batch_size, num_workers):
                if batch.files:
                    answers.add(list(_rows(batch, classifier, top_k, features)))
                unreadable |= batch.unreadable
                progress.update(len(batch.files) + len(batch.unreadable))
        for each in processes.of_all(unreadable):
            unreadable |= each
        if processes.is_first:
            _finish(answers, names, unreadable, in_order=processes.count > 1, as_parquet=output.suffix == _PARQUET)
        return Predictions(processes.from_first(answers.labels), unreadable)


def _check_options(output: Path, features: bool, *, num_workers: int, **at_least_one: int) -> None:
    for name, value, least in (
        *((name, value, 1) for name, value in at_least_one.items()),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if features and output.suffix != _PARQUET:
        raise ValueError(f"Features are too many for a table such as {output}: let its name end in {_PARQUET}.")
    if output.suffix == _PARQUET and find_spec("pyarrow") is None:
        raise RuntimeError("A table in parquet needs pyarrow. Install it with: pip install pyarrow")


def _open_table(
    output: Path, columns: list[str], facts: dict[str, Any], names: list[str], held: ExitStack
) -> AnswerTable:
    """The first process's table, with what was answered before, by however many processes."""
    held.enter_context(locked_beside(output))
    answers = held.enter_context(AnswerTable(output, columns, facts))
    answers.take_parts()
    if others := answers.finished - set(names):
        raise ValueError(
            f"{partial_file(output)} holds answers to images that weren't given now, such as {min(others)}. "
            "Remove it, or give another --output_file."
        )
    return answers


def _finish(
    answers: AnswerTable, names: list[str], unreadable: dict[str, str], *, in_order: bool, as_parquet: bool
) -> None:
    """Joins the rows of all processes, and brings them into the images' order where there were several."""
    answers.take_parts()
    if lost := set(names) - answers.finished - unreadable.keys():
        raise RuntimeError(f"The answers to {counted(len(lost), 'image')} are lost, such as {min(lost)}. Start again.")
    if not answers.finished:
        raise ValueError(f"None of the images can be read.\n{list_unreadable(unreadable)}")
    if in_order:
        answers.sort(names)
    if as_parquet:
        from .parquet import write_parquet  # the base installation hasn't what it needs

        answers.finish(write_parquet)
    else:
        answers.finish()


def list_unreadable(unreadable: dict[str, str]) -> str:
    """Their number, their names and what is wrong with them."""
    return "\n".join(
        (f"Images that can't be read: {len(unreadable)}", *(f"  {file}: {why}" for file, why in unreadable.items()))
    )


def _columns(top_k: int, features: bool) -> list[str]:
    further = [f"{name}_{place}" for place in range(2, top_k + 1) for name in ("label", "score")]
    return ["file", "label", "score", *further, *[FEATURES] * features]


def _printable(file: str) -> str:
    """A file's name in what UTF-8 can hold."""
    return os.fsencode(file).decode(errors="backslashreplace")


@dataclass
class _Batch:
    """Images that were read, their `pixel_values` (B, C, height, width), and why others weren't."""

    files: list[str]
    pixel_values: torch.Tensor | None
    unreadable: dict[str, str]


def _rows(batch: _Batch, classifier: Classifier, top_k: int, features: bool) -> Iterator[list[str]]:
    assert batch.pixel_values is not None  # there are files
    scores, labels = classifier.scores(batch.pixel_values).sort(descending=True, stable=True)
    numbers = classifier.last_features().numpy() if features else batch.files
    best = scores[:, :top_k].tolist(), labels[:, :top_k].tolist()
    for file, best_scores, best_labels, of_image in zip(batch.files, *best, numbers, strict=True):
        row = [file]
        for score, label in zip(best_scores, best_labels):
            row += [classifier.labels[label], f"{score:.6f}"]
        yield [*row, as_text(of_image)] if features else row


class _Images(Dataset):
    """Files to (printable name, pixels (C, height, width)), or to (printable name, why not)."""

    def __init__(self, files: list[str], processor: BaseImageProcessor):
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[str, torch.Tensor | str]:
        name = _printable(self.files[i])
        try:
            image = to_8_bit_rgb(open_image(self.files[i]))
            return name, self.processor(image, return_tensors="pt").pixel_values[0]
        except Exception as error:  # PIL raises errors of nearly any kind for a damaged file
            cause = error.__cause__ or error
            return name, " ".join(str(cause).split()) or type(cause).__name__


def _read_ahead(
    files: list[str], processor: BaseImageProcessor, batch_size: int, num_workers: int
) -> Iterable[_Batch]:
    return DataLoader(
        _Images(files, processor),
        batch_size,
        num_workers=num_workers if len(files) > batch_size else 0,  # for one batch there is nothing to read ahead
        collate_fn=_collate,
    )


def _collate(images: list[tuple[str, torch.Tensor | str]]) -> _Batch:
    read = {name: pixels for name, pixels in images if isinstance(pixels, torch.Tensor)}
    return _Batch(
        files=list(read),
        pixel_values=torch.stack(list(read.values())) if read else None,
        unreadable={name: why for name, why in images if isinstance(why, str)},
    )
