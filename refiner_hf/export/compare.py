"""What a graph is worth beside the model it was made of: accuracy, same answers, speed, size."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
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
from ..utils.machine import describe_machine
from ..utils.markdown import markdown_table
from ..utils.measure import time_in_turns
from .graph import open_onnx, run_onnx


DIGITS = "digits"
BATCHES = (1, 32)
ROUNDS = 30

Answer = Callable[[np.ndarray], np.ndarray]  # pixels (B, C, height, width) to logits (B, K)


def compare(
    model: PreTrainedModel, processor: BaseImageProcessor, files: list[Path], images: ImageData
) -> dict[str, Any]:
    """
    Runs the model and its graphs on labelled images, and times them in turns on the CPU.

    Args:
        model (`PreTrainedModel`): on the CPU.
        processor (`BaseImageProcessor`): its image processor.
        files (`list[Path]`): graphs made of it.
        images ([`~refiner_hf.data.sources.ImageData`]): labelled ones, of [`load_labelled`].

    Returns:
        `dict`: `data`, `images` and what the machine is; `contenders`, for the model ("PyTorch") and each file
        `accuracy`, `same_answers` (share in which it agrees with the model), `bytes` (of a file), and by batch size
        `images_per_second` (median of the rounds).
    """
    label_ids = match_labels(images.labels, label_names_of(model.config))
    prepare = PrepareImages(evaluation_pixels(processor), LabelValues(label_ids=label_ids))
    contenders: dict[str, Answer] = {"PyTorch": partial(_answer, model)}
    contenders |= {file.name: partial(run_onnx, open_onnx(file)) for file in files}

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

    results = {name: _agreement(np.concatenate(predicted[name]), predicted, labels) for name in contenders}
    for file in files:
        results[file.name]["bytes"] = file.stat().st_size
    for batch in BATCHES:
        pixels = np.resize(pixels, (batch, *pixels.shape[1:]))
        times = time_in_turns(
            {name: partial(partial, answer, pixels) for name, answer in contenders.items()}, ROUNDS, "cpu"
        )
        for name, row in times.items():
            results[name].setdefault("images_per_second", {})[str(batch)] = batch / median(row["seconds"])
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
    base = compared["contenders"]["PyTorch"]["images_per_second"]
    for name, row in compared["contenders"].items():
        size = f"{row['bytes'] / 1e6:.1f} MB" if "bytes" in row else ""
        speeds = [f"{rate:,.0f} ({rate / base[batch]:.2f}x)" for batch, rate in row["images_per_second"].items()]
        rows.append([name, size, f"{row['accuracy']:.2%}", f"{row['same_answers']:.2%}", *speeds])
    heads = ["", "file", "accuracy", "same answers", *(f"images/s, {batch} at once" for batch in base)]
    return markdown_table(heads, rows)


@torch.no_grad()
def _answer(model: PreTrainedModel, pixels: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(pixels)).logits.numpy()


def _agreement(answers: np.ndarray, predicted: dict[str, list[np.ndarray]], labels: list[int]) -> dict[str, Any]:
    return {
        "accuracy": float((answers == np.array(labels)).mean()),
        "same_answers": float((answers == np.concatenate(predicted["PyTorch"])).mean()),
    }
