"""What graphs are worth beside the model they were made of, by engine: accuracy, same answers, speed, size."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.arguments import DataArguments
from ..data.labels import LabelValues
from ..data.sources import IMAGE_COLUMN, LABEL_COLUMN, ImageData, load_image_data
from ..data.transforms import PrepareImages, evaluation_pixels, match_labels
from ..utils.image_config import label_names_of
from ..utils.machine import computes_bfloat16, describe_machine
from ..utils.markdown import markdown_table
from ..utils.measure import Step, seconds_of, time_in_turns
from .engines import BFLOAT16, ENGINES, FLOAT32, has_bfloat16, installed_engines, open_graph


DIGITS = "digits"
PYTORCH = "PyTorch"
BATCHES = (1, 32)
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 30, 60  # of taking turns: as many as fit into so many seconds, about

Answer = Callable[[np.ndarray], np.ndarray]  # pixels (B, C, height, width) to logits (B, K)


def compare(
    model: PreTrainedModel, processor: BaseImageProcessor, files: list[Path], images: ImageData
) -> dict[str, Any]:
    """
    Runs the model, and its graphs in every engine that is installed and every precision that it has here, on labelled
    images, and times them in turns on the CPU, with as many threads each.

    Args:
        model (`PreTrainedModel`): on the CPU.
        processor (`BaseImageProcessor`): its image processor.
        files (`list[Path]`): graphs made of it.
        images ([`~refiner_hf.data.sources.ImageData`]): labelled ones, of [`load_labelled`].

    Returns:
        `dict`: `data`, `images` and what the machine is; `contenders`, for the model ("PyTorch"; where the CPU has
        bfloat16 also "PyTorch, bfloat16") and each way to compute a graph `engine`, `precision`, `file` and `bytes`
        (of a graph), `accuracy`, `same_answers` (share in which it agrees with the model), and by batch size
        `images_per_second` (median of the rounds) and `times_pytorch` (speed, median of the ratios to the model's in
        the same round).
    """
    label_ids = match_labels(images.labels, label_names_of(model.config))
    prepare = PrepareImages(evaluation_pixels(processor), LabelValues(label_ids=label_ids))
    results: dict[str, dict[str, Any]] = {PYTORCH: {"engine": PYTORCH, "precision": FLOAT32}}
    contenders: dict[str, Answer] = {PYTORCH: partial(_answer, model)}
    if computes_bfloat16("cpu"):
        name = f"{PYTORCH}, {BFLOAT16}"
        contenders[name] = partial(_answer, copy.deepcopy(model).bfloat16())
        results[name] = {"engine": PYTORCH, "precision": BFLOAT16}
    for engine in installed_engines():
        for file in files:
            for precision in [FLOAT32] + [BFLOAT16] * has_bfloat16(engine):
                name = f"{ENGINES[engine]}, {file.name}, {precision}"
                contenders[name] = open_graph(file, engine, precision)
                results[name] = {"engine": ENGINES[engine], "precision": precision}
                results[name] |= {"file": file.name, "bytes": file.stat().st_size}

    predicted, labels = {name: [] for name in contenders}, []
    rows = images.evaluation.data
    progress = tqdm(total=len(rows), unit="image", desc="accuracy")
    for batch in rows.iter(BATCHES[-1]):
        prepared = prepare({IMAGE_COLUMN: batch[IMAGE_COLUMN], LABEL_COLUMN: batch[LABEL_COLUMN]})
        pixels = torch.stack(prepared["pixel_values"]).numpy()
        labels += prepared[LABEL_COLUMN]
        for name, answer in contenders.items():
            predicted[name].append(answer(pixels).argmax(1))
        progress.update(len(pixels))
    progress.close()

    for name, row in results.items():
        row |= _agreement(np.concatenate(predicted[name]), predicted, labels)
    for batch in BATCHES:
        pixels = np.resize(pixels, (batch, *pixels.shape[1:]))
        steps = {name: partial(answer, pixels) for name, answer in contenders.items()}
        times = time_in_turns({name: partial(partial, step) for name, step in steps.items()}, _rounds(steps), "cpu")
        seconds = {name: np.array(row["seconds"]) for name, row in times.items()}
        for name, row in results.items():
            ratios = seconds[PYTORCH] / seconds[name]
            row.setdefault("images_per_second", {})[str(batch)] = batch / float(np.median(seconds[name]))
            row.setdefault("times_pytorch", {})[str(batch)] = float(np.median(ratios))
    return {"data": images.name, "images": len(labels), **describe_machine("cpu"), "contenders": results}


def load_labelled(data: str, max_images: int | None, model: PreTrainedModel) -> ImageData:
    """
    Images to compare on.

    Args:
        data (`str`): a folder with one subfolder per label, the Hub name of a dataset, or `"digits"`.
        max_images (`int`, *optional*): at most so many.
        model (`PreTrainedModel`): must know the labels.

    Raises:
        `ValueError`, `OSError`: there are no labelled images, or labels that the model doesn't know.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"--max_images must be at least 1, got {max_images}.")
    place = "validation_dir" if Path(data).is_dir() else "dataset_name"
    named = DataArguments(**{} if data == DIGITS else {place: data}, max_eval_samples=max_images)
    images = load_image_data(named, need_train=False, need_evaluation=True, seed=0)
    match_labels(images.labels, label_names_of(model.config))
    return images


def comparison_table(compared: dict[str, Any]) -> str:
    """Markdown: what [`compare`] found, a row each."""
    rows = []
    base = compared["contenders"][PYTORCH]
    for row in compared["contenders"].values():
        file = f"{row['file']}, {row['bytes'] / 1e6:.1f} MB" if "file" in row else ""
        accuracy = f"{row['accuracy']:.2%}"
        if row is not base:
            accuracy += f" ({100 * (row['accuracy'] - base['accuracy']):+.2f})"
        speeds = [
            f"{row['images_per_second'][batch]:,.0f} ({times:.2f}x)" for batch, times in row["times_pytorch"].items()
        ]
        rows.append([row["engine"], file, row["precision"], accuracy, f"{row['same_answers']:.2%}", *speeds])
    at_once = (f"images/s, {batch} at once" for batch in base["times_pytorch"])
    return markdown_table(["engine", "file", "`--precision`", "accuracy", "same answers", *at_once], rows)


def _rounds(steps: dict[str, Step]) -> int:
    for step in steps.values():  # engines compile at their first
        step()
    seconds = sum(seconds_of(step, "cpu") for step in steps.values())
    return int(min(max(SECONDS / seconds, FEWEST_ROUNDS), MOST_ROUNDS))


@torch.no_grad()
def _answer(model: PreTrainedModel, pixels: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(pixels).to(model.dtype)).logits.float().numpy()


def _agreement(answers: np.ndarray, predicted: dict[str, list[np.ndarray]], labels: list[int]) -> dict[str, Any]:
    return {
        "accuracy": float((answers == np.array(labels)).mean()),
        "same_answers": float((answers == np.concatenate(predicted[PYTORCH])).mean()),
    }
