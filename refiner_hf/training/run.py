"""A whole run: its plan, the Trainer that is built from it, training and evaluation, and the finished folder."""

import csv
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, set_seed
from transformers.utils import logging

from ..data.arguments import AugmentationArguments, DataArguments
from ..data.sources import ImageData
from ..hub.publish import Published
from ..hub.repository import PublishError
from ..hub.verification import verify
from ..utils.confusions import LabelScores, scores_by_label
from ..utils.files import write_json
from ..utils.image_config import label_names_of
from ..utils.run_files import AUTO_RECIPE, RUN_FILE
from ..utils.text import counted
from .arguments import RefinerTrainingArguments
from .baseline import Baseline, linear_baseline
from .building import build_trainer, metrics_of, test_images
from .calibration import calibrate
from .dry_run import dry_run
from .finished_folder import BY_LABEL, CONFUSION_MATRIX, Example, finish_folder
from .metrics import Metrics
from .model_arguments import ModelArguments
from .output_folder import push_command
from .plan import Plan, make_plan
from .same_data import DATA_FILE
from .saving import explain_write_errors
from .trainer import RefinerTrainer


logger = logging.get_logger(__name__)

UNREADABLE_FILE = "_unreadable_images.txt"  # names with _ in front are never published


@dataclass
class RunResult:
    """
    What a run leaves: the folder, the measured metrics (`eval_accuracy` and so on), the data it was run on, and after
    training what the saved model answers for a few evaluation pictures, what a linear model reaches on the same
    images, and where it was published. Of a dry run only `planned`: what would have been trained, by topic, and the
    picture of a batch.
    """

    folder: Path
    metrics: dict[str, float]
    data: ImageData
    trained: bool
    examples: list[Example]
    baseline: Baseline | None = None
    published: Published | None = None
    planned: tuple[dict[str, str], Path] | None = None


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: RefinerTrainingArguments,
    recipe: str | None = None,
) -> RunResult:
    """
    Trains and/or evaluates, as `training_args.do_train` and `do_eval` say. After training, the output folder holds
    the model, its processor, a card with pictures, and the measured results: it is ready for the Hub, and with
    `push_to_hub` it goes there, in one commit. The token and the repository are checked before anything else.

    An interrupted run continues from its last whole checkpoint, with the data that it began with. The arguments aren't
    changed. A `recipe` that was made for this run is kept beside it.

    Raises:
        `ValueError`: options, data or labels that don't fit, or a run that can't be continued; before any
            long work, wherever possible.
        `OSError`: an output folder that can't be written, or that another run is writing to, before training.
        [`~refiner_hf.hub.repository.PublishError`]: a token that can't push, before training; or the push failed
            after it (the folder is finished, and the message says how to push it again).
    """
    with ExitStack() as held:
        plan = make_plan(model_args, data_args, augmentation_args, training_args, held)
        folder = Path(plan.args.output_dir)
        if plan.args.dry_run:
            return RunResult(folder, {}, plan.data, False, [], planned=dry_run(build_trainer(plan)[0], plan))
        _begin_folder(plan, recipe)
        trainer, metrics = build_trainer(plan)
        measured = _train_and_evaluate(trainer, plan)
        baseline = _measure_baseline(trainer, plan)
        examples = _finish(trainer, plan, measured, metrics, baseline)
        published = _publish(trainer) if plan.args.push_to_hub else None
    return RunResult(folder, measured, plan.data, plan.args.do_train, examples, baseline, published)


def _begin_folder(plan: Plan, recipe: str | None) -> None:
    """Writes what a later run needs to continue this one, and the images that are left out."""
    if not plan.args.should_save:
        return
    folder = Path(plan.args.output_dir)
    if plan.unreadable:
        file = folder / UNREADABLE_FILE
        file.write_text("\n".join(plan.unreadable) + "\n", encoding="utf-8")
        logger.warning(
            f"{counted(len(plan.unreadable), 'image')} can't be read. The run leaves out what {file} lists."
        )
    if plan.data_facts is not None:
        write_json(folder / RUN_FILE, plan.arguments)
        if recipe is not None:
            (folder / AUTO_RECIPE).write_text(recipe, encoding="utf-8")
        write_json(folder / DATA_FILE, plan.data_facts)


def _train_and_evaluate(trainer: RefinerTrainer, plan: Plan) -> dict[str, float]:
    """All measured numbers, named as the Trainer does."""
    args, measured = plan.args, {}
    if args.do_train:
        # Drop path and mixing differ between processes. (The order of the images has a seed of its own.)
        set_seed(args.seed + args.process_index)
        measured |= trainer.train(resume_from_checkpoint=plan.checkpoint).metrics
        if plan.checkpoint:
            # Times and mean loss are those of the last part of the run: the card must not show them for the whole.
            measured = {"epoch": measured["epoch"]}
        if args.calibrate:
            measured["temperature"] = calibrate(trainer)
    if args.do_eval:
        evaluated = trainer.evaluate()
        measured |= evaluated
        trainer.log_metrics("eval", evaluated)
        trainer.save_metrics("eval", evaluated)
        if plan.data.test is not None:
            measured |= _measure_test(trainer, plan)
    return measured


def _measure_test(trainer: RefinerTrainer, plan: Plan) -> dict[str, float]:
    """On the test images, with metrics of their own: the others keep the confusions of the evaluation images."""
    keep = trainer.compute_metrics
    trainer.compute_metrics = metrics_of(plan)
    try:
        measured = trainer.evaluate(test_images(plan), metric_key_prefix="test")
    finally:
        trainer.compute_metrics = keep
    trainer.log_metrics("test", measured)
    trainer.save_metrics("test", measured)
    return measured


def _measure_baseline(trainer: RefinerTrainer, plan: Plan) -> Baseline | None:
    """What a linear model reaches, in the first process, and where the network was trained and evaluated."""
    if not (plan.args.do_train and plan.args.do_eval and trainer.is_world_process_zero()):
        return None
    baseline = linear_baseline(plan.data, plan.args.seed)
    if baseline is not None:
        trainer.save_metrics("baseline", {f"baseline_{baseline.metric}": baseline.value})
    return baseline


def _finish(
    trainer: RefinerTrainer,
    plan: Plan,
    measured: dict[str, float],
    metrics: Metrics,
    baseline: Baseline | None,
) -> list[Example]:
    """Saves the model and finishes its folder; returns what the saved model answers for a few evaluation pictures."""
    args, examples = plan.args, []
    if trainer.is_world_process_zero() and metrics.confusion_matrix is not None:
        _write_tables(metrics.confusion_matrix, plan.model.config, Path(args.output_dir))
    if not args.do_train:
        return examples
    with explain_write_errors(f"The model in {args.output_dir}"):
        trainer.save_model(_internal_call=True)  # the folder is pushed when it is finished
    trainer.save_state()
    if trainer.is_world_process_zero():
        examples = finish_folder(trainer, plan.data, plan.arguments, measured, metrics, baseline)
    # Last, because it marks the folder as finished.
    trainer.save_metrics(
        "train", {name: value for name, value in measured.items() if not name.startswith(("eval_", "test_"))}
    )
    return examples


def _publish(trainer: RefinerTrainer) -> Published | None:
    args = trainer.args
    try:
        published = trainer.publish("End of training")
        if published and args.verify_push:
            verify(published, token=args.hub_token)
    except (PublishError, ValueError, KeyboardInterrupt) as error:
        raise PublishError(
            f"Training is finished and its folder is whole, but: {str(error) or 'interrupted.'}\n"
            f"To push it again: {push_command(args)}"
        ) from error
    return published


def _write_tables(counts: list[list[int]], config: PreTrainedConfig, folder: Path) -> None:
    """The confusion matrix, and precision, recall and F1 of each label."""
    labels = label_names_of(config)
    scores = ([label, *each] for label, each in zip(labels, scores_by_label(counts)))
    confusions = ([label, *row] for label, row in zip(labels, counts))
    tables = {
        CONFUSION_MATRIX: [["true label \\ predicted", *labels], *confusions],
        BY_LABEL: [["label", *LabelScores._fields], *scores],
    }
    for name, rows in tables.items():
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
