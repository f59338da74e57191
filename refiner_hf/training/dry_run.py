"""What a training would do, without training: the plan in words, and a batch as the network would see it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cards.architecture import network_facts
from ..cards.plots import plot_predictions
from ..choices_refiner import MULTI_LABEL, REGRESSION
from ..data.columns import IMAGE_COLUMN, LABEL_COLUMN
from ..data.images import EncodedImage
from ..data.labels import count_labels
from ..data.rows import Rows
from ..inspection.attention_views import as_picture
from ..loss_refiner import problem_type_of
from ..utils.image_config import label_names_of
from ..utils.text import counted
from .output_folder import DRY_RUN
from .plan import Plan
from .trainer import RefinerTrainer


_SHOWN, _MEASURED = 16, 200  # pictures in the drawing; images whose size is looked at
_MOST_NAMED = 2  # labels of a mixed picture


def dry_run(trainer: RefinerTrainer, plan: Plan) -> tuple[dict[str, str], Path]:
    """
    Draws the first images of the training, augmented and mixed as they would be, into the output folder.

    Returns:
        what the training would do, by topic; and the picture.
    """
    picture = Path(str(plan.args.output_dir)) / DRY_RUN
    _draw_batch(trainer, plan, picture)
    return _describe(trainer, plan), picture


def _draw_batch(trainer: RefinerTrainer, plan: Plan, file: Path) -> None:
    inputs: dict[str, torch.Tensor] = next(iter(trainer.get_train_dataloader()))
    config: Any = plan.model.config
    names, grid = label_names_of(config), getattr(config, "patch_grid", (0, 0))
    problem = problem_type_of(inputs["labels"], config)
    inputs = trainer.make_targets(inputs, config.num_labels, grid, 0.0, problem)
    pictures = [as_picture(plan.processor, pixels) for pixels in inputs["pixel_values"][:_SHOWN]]
    plot_predictions(pictures, [_title(target, names, problem) for target in inputs["labels"][:_SHOWN]], file)


def _title(target: torch.Tensor, names: list[str], problem: str) -> str:
    """The label of a picture, or of a mixed one the shares of its labels; or its number."""
    if problem == REGRESSION:
        return f"{target.item():.4g}"
    if problem == MULTI_LABEL:
        return ", ".join(names[i] for i in range(len(target)) if target[i] > 0.5) or "no label"
    if target.ndim == 0:
        return names[int(target)]
    shares = target[:, 1] if target.ndim == 2 else target  # of a dense target the image's own
    shares = shares / shares.sum()
    best = shares.topk(min(_MOST_NAMED, len(shares)))
    if best.values[0] > 0.99:
        return names[int(best.indices[0])]
    return ", ".join(f"{names[int(i)]} {share:.0%}" for share, i in zip(best.values, best.indices))


def _describe(trainer: RefinerTrainer, plan: Plan) -> dict[str, str]:
    data, args, mixes = plan.data, plan.args, plan.augmentation_args
    assert data.train is not None
    evaluation = "none" if data.evaluation is None else f"{_count(data.evaluation)}: {data.evaluation_split}"
    parts = {
        "crops": f"from {mixes.crop_min_scale:.0%} of an image",
        "mirrored": "half of them" if mixes.horizontal_flip else "none",
        "rotation": f"up to {mixes.rotation:g} degrees" if mixes.rotation else "",
        "policy": mixes.auto_augment,
        "colour jitter": mixes.color_jitter,
        "erasing": mixes.random_erasing,
        "mixup": mixes.mixup,
        "cutmix": mixes.cutmix,
    }
    images = trainer.get_total_train_batch_size(args)
    if args.max_steps > 0:
        length = counted(args.max_steps, "step")
    else:
        a_pass = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
        length = f"{args.num_train_epochs:g} epochs of {counted(a_pass, 'step')}"
    return {
        "training images": f"{_count(data.train)}, {_labels(data.train, data.labels)}",
        "their size": _sizes(data.train),
        "evaluation images": evaluation,
        "network": type(plan.model).__name__,
        **network_facts(plan.model),
        "augmentation": ", ".join(f"{name}: {value}" for name, value in parts.items() if value),
        "training": f"{length} of {counted(images, 'image')}, learning rate {args.learning_rate:g}",
    }


def _count(rows: Rows) -> str:
    return "a stream" if rows.count is None else counted(rows.count, "image")


def _labels(rows: Rows, names: list[str]) -> str:
    if rows.streamed:
        return counted(len(names), "label")
    given = rows.labels(LABEL_COLUMN)
    if given and isinstance(given[0], float):
        return f"{names[0]} from {min(given):.4g} to {max(given):.4g}"
    counts = count_labels(given)
    (most, largest), (least, smallest) = counts.most_common()[0], counts.most_common()[-1]
    return f"{counted(len(names), 'label')}, from {smallest:,} ({names[least]}) to {largest:,} ({names[most]}) images"


def _sizes(rows: Rows) -> str:
    sizes = np.array([EncodedImage(row[IMAGE_COLUMN]).size for row in rows.spread(_MEASURED)])
    width, height = np.median(sizes, 0)
    return f"{width:.0f} x {height:.0f} pixels (median), from {sizes.min()} to {sizes.max()} on a side"
