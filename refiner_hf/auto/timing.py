"""How long a step of a training takes here, and an evaluation: by doing some."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from tempfile import TemporaryDirectory

from transformers import TrainerCallback
from transformers.utils import logging

from ..data.augmentation import Augment
from ..data.sources import ImageData
from ..training.building import build_trainer
from ..training.initial_model import load_model, load_processor, source_of_model
from ..training.plan import Plan
from .options import Arguments


_WARM_UP, _STEPS, _SECONDS = 3, 15, 6.0  # steps that don't count; then at most so many, or so long
_AHEAD = 2  # batches that each worker prepares ahead, torch's default
_EVALUATED = 128  # images


@dataclass(frozen=True)
class Speed:
    """Seconds for a training `step`, the preparation of its images included, and for an `evaluated` image."""

    step: float
    evaluated: float


class _Clock(TrainerCallback):
    """Notes when each step ends, and ends a training that has taken long enough; of several processes none alone."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())
        if args.world_size == 1 and len(self.ends) > self.warm_up + 1:
            control.should_training_stop |= self.ends[-1] - self.ends[self.warm_up] > _SECONDS

    @property
    def seconds(self) -> float:
        """For a step, without the first ones, which are slower."""
        return (self.ends[-1] - self.ends[self.warm_up]) / (len(self.ends) - 1 - self.warm_up)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the Trainer prints of a training that isn't one."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def measure_speed(arguments: Arguments, data: ImageData) -> Speed:
    """
    Trains some steps as the options say, and evaluates some images. Nothing is kept.

    Raises:
        `ValueError`: the options don't fit each other, the data or the network.
    """
    assert data.evaluation is not None and data.evaluation.count
    images = min(_EVALUATED, data.evaluation.count)
    data = replace(data, evaluation=data.evaluation.at_most(images, arguments[3].seed))
    # Besides, steps whose images workers have prepared before the first one.
    clock = _Clock(_WARM_UP + arguments[3].dataloader_num_workers * _AHEAD)
    with TemporaryDirectory() as folder, _quiet():
        trainer, _ = build_trainer(_short_plan(arguments, data, folder, clock.warm_up + _STEPS))
        trainer.add_callback(clock)
        trainer.train()
        start = time.perf_counter()
        trainer.evaluate()
        evaluated = time.perf_counter() - start
        trainer.accelerator.free_memory()  # of several processes, before their threads end
    return Speed(clock.seconds, evaluated / images)


def _short_plan(arguments: Arguments, data: ImageData, folder: str, steps: int) -> Plan:
    model_args, data_args, augmentation_args, training_args = arguments
    # Nothing is written, logged or evaluated in between, and no norm's statistics are re-estimated.
    args = replace(
        training_args, output_dir=folder, max_steps=steps, eval_strategy="no", save_strategy="no",
        logging_strategy="no", report_to="none", load_best_model_at_end=False, early_stopping_patience=None,
        push_to_hub=False, disable_tqdm=True, norm_statistics_images=0, do_train=True, do_eval=True,
    )  # fmt: skip
    source = source_of_model(model_args)
    model, label_ids = load_model(model_args, source, data.labels, keep_labels=False)
    processor = load_processor(model_args, source, model)
    return Plan(
        data_args=data_args,
        augmentation_args=augmentation_args,
        args=args,
        arguments={},
        data=data,
        model=model,
        processor=processor,
        label_ids=label_ids or list(range(len(data.labels))),
        augment=Augment(processor, augmentation_args),
        label_maps=None,
        checkpoint=None,
        data_facts=None,
        unreadable=[],
    )
