"""From the options that a user has given to all of a training's."""

import os
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from ..data.arguments import DataArguments
from ..data.sources import load_image_data
from .choose import Choices, choose
from .look import Facts, look
from .options import to_arguments
from .timing import measure_speed


_MOST_WORKERS = 8  # of each process


def choose_options(given: dict[str, Any], seconds: float, processes: int = 1) -> tuple[Facts, Choices]:
    """
    Looks at the data that the given options name, and chooses the others.

    Args:
        given (`dict[str, Any]`): options by name, `config_overrides` as a mapping.
        seconds (`float`): how long the training, with its evaluations, may take.
        processes (`int`, *optional*, defaults to 1): how many train together, each of which calls this.

    Raises:
        `ValueError`, `OSError`: as for a training whose options don't fit its data.
    """
    if not torch.accelerator.is_available():
        given = {**given, "use_cpu": True}  # without this, the Trainer refuses bfloat16
    _, data_args, _, args = to_arguments(given)
    _check(data_args)
    with args.main_process_first(desc="loading the data"):  # others find it in the cache of `datasets`
        data = load_image_data(data_args, need_train=True, need_evaluation=True, seed=args.seed)
    assert data.train is not None and data.evaluation is not None
    statistics = 0 if args.freeze_norms else args.norm_statistics_images
    facts = look(data.train, data.labels, evaluated=data.evaluation.count or 0, for_statistics=statistics)
    choices = choose(
        facts,
        given,
        seconds=seconds,
        measure=lambda options: measure_speed(to_arguments(options), data),
        # A CPU may have it or not, which a trial shows.
        has_bf16=args.use_cpu or is_torch_bf16_gpu_available(),
        # A training on the CPU takes all cores itself; there, workers made no step faster.
        workers=0 if args.use_cpu else min(_MOST_WORKERS, (os.cpu_count() or 1) // processes),
        processes=processes,
    )
    return facts, choices


def _check(data_args: DataArguments) -> None:
    if data_args.streaming:
        raise ValueError("The recipe auto looks at the whole data first, which a stream doesn't allow. Name a recipe.")
