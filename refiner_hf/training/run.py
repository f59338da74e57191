"""A whole run: data, model, training, evaluation, and the finished folder."""

import csv
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from timm.data import Mixup
from transformers import default_data_collator, set_seed
from transformers.utils import logging

from ..cards.card import license_card
from ..configuration_refiner import RefinerConfig
from ..data.arguments import AugmentationArguments, DataArguments
from ..data.augmentation import Augment
from ..data.checking import find_unreadable, raise_if_unreadable
from ..data.label_maps import open_label_maps
from ..data.seeded_sampling import SeededImages
from ..data.sources import ImageData, at_most, load_image_data, shuffled
from ..data.streams import StreamedImages, StreamPosition
from ..data.transforms import PrepareImages, PrepareTraining, evaluation_pixels, with_transform
from ..hub.publish import Published
from ..hub.repository import PublishError, prepare_repository, with_retries
from ..hub.verification import verify
from ..modeling_refiner import RefinerForImageClassification
from ..utils.files import write_json
from ..utils.run_files import RUN_FILE
from ..utils.text import counted
from .arguments import ModelArguments, RefinerTrainingArguments
from .ema import EmaCallback
from .finished_folder import CONFUSION_MATRIX, Example, finish_folder
from .loading import load_model, load_processor
from .metrics import ClassificationMetrics, rank_labels
from .output_folder import prepare_output_folder, push_command, repository
from .same_data import DATA_FILE, check_same_data, facts_of_data
from .saving import writing
from .statistics import NormStatisticsCallback
from .targets import TrainingTargets
from .trainer import RefinerTrainer


logger = logging.get_logger(__name__)

UNREADABLE_FILE = "_unreadable_images.txt"  # names with _ in front are never published


@dataclass
class RunResult:
    """
    What a run leaves: the folder, the measured metrics (`eval_accuracy` and so on), the data it was run on, and after
    training what the saved model answers for a few evaluation pictures, and where it was published.
    """

    folder: Path
    metrics: dict[str, float]
    data: ImageData
    trained: bool
    examples: list[Example]
    published: Published | None = None


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: RefinerTrainingArguments,
) -> RunResult:
    """
    Trains and/or evaluates, as `training_args.do_train` and `do_eval` say. After training, the output folder holds
    the model, its processor, a card with pictures, and the measured results: it is ready for the Hub, and with
    `push_to_hub` it goes there, in one commit. The token and the repository are checked before anything else.

    A run that broke off is taken up again from its last whole checkpoint, with the data that it began with.

    Raises:
        `ValueError`: options, data or labels that don't fit, or a run that can't go on; before anything long begins
            wherever it can be seen.
        `OSError`: an output folder that can't be written, or that another run is writing to, before training.
        [`~refiner_hf.hub.repository.PublishError`]: a token that can't push, before training; or the push failed
            after it (the folder is finished, and the message says how to push it again).
    """
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("Nothing to do: neither --do_train nor --do_eval.")
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise ValueError("Which model to evaluate? Give --model_name_or_path.")
    if training_args.push_to_hub and not training_args.do_train:
        raise ValueError("An evaluation leaves nothing to push. Use refiner push to publish the model's folder.")
    with ExitStack() as held:
        return _run(model_args, data_args, augmentation_args, training_args, held)


def _run(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: RefinerTrainingArguments,
    held: ExitStack,
) -> RunResult:
    arguments = _as_dict(model_args, data_args, augmentation_args, training_args)
    checkpoint = prepare_output_folder(training_args, arguments, held)
    if training_args.push_to_hub and training_args.should_save:
        training_args.hub_model_id = prepare_repository(
            repository(training_args),
            private=training_args.hub_private_repo,
            branch=training_args.hub_revision,
            token=training_args.hub_token,
        )
        if training_args.weights_license:
            _check_license(training_args)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="loading the data"):  # the others find it in the cache of `datasets`
        data = load_image_data(
            data_args,
            need_train=training_args.do_train,
            need_evaluation=training_args.do_eval,
            seed=training_args.seed,
        )
        if not data_args.embedded:
            _look_at_images(data, data_args, training_args)
        if training_args.do_train:
            facts = facts_of_data(data, data_args, evaluated=training_args.do_eval)
            if checkpoint:
                check_same_data(checkpoint, facts, named=checkpoint == training_args.resume_from_checkpoint)
    model, label_ids = load_model(model_args, data.labels, keep_labels=not training_args.do_train)
    processor = load_processor(model_args, model)

    label_ids = label_ids or list(range(len(data.labels)))  # a stream's labels are checked when they come
    for_evaluation = PrepareImages(evaluation_pixels(processor), label_ids)
    metrics = ClassificationMetrics(model.config.num_labels)
    train, callbacks = None, []
    if training_args.do_train:
        _check_training(data, model, data_args, augmentation_args, training_args)
        label_maps = open_label_maps(data_args.label_map_dir, data.labels) if data_args.label_map_dir else None
        prepare = PrepareTraining(Augment(processor, augmentation_args), label_ids, label_maps)
        train = _training_images(data.train, prepare, data_args, augmentation_args, training_args, checkpoint)
        ema = EmaCallback(training_args.ema_decay, training_args.ema_warmup) if training_args.ema_decay else None
        callbacks += [ema] if ema else []
        if training_args.norm_statistics_images and not training_args.freeze_norms:
            # Always the same training images.
            some = at_most(
                shuffled(data.train, training_args.seed), training_args.norm_statistics_images, training_args.seed
            )
            for_statistics = with_transform(some, for_evaluation)
            batch_size = training_args.per_device_eval_batch_size
            callbacks.append(NormStatisticsCallback(for_statistics, batch_size, ema=ema))
        if training_args.should_save:
            write_json(Path(training_args.output_dir) / RUN_FILE, arguments)
            write_json(Path(training_args.output_dir) / DATA_FILE, facts)

    trainer = RefinerTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=with_transform(data.evaluation, for_evaluation) if training_args.do_eval else None,
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=rank_labels,
        callbacks=callbacks,
        make_targets=TrainingTargets(
            mixup=Mixup(augmentation_args.mixup, augmentation_args.cutmix, label_smoothing=0.0)
            if augmentation_args.mixup or augmentation_args.cutmix
            else None,
            transposed_boxes=data_args.transposed_label_maps,
        ),
    )

    measured: dict[str, float] = {}
    if training_args.do_train:
        # Every process drops other paths and mixes otherwise. (The order of the images has a seed of its own.)
        set_seed(training_args.seed + training_args.process_index)
        measured |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        if checkpoint:
            # Times and mean loss cover the last part of the run only; the card shall not claim them for the whole.
            measured = {"epoch": measured["epoch"]}
    if training_args.do_eval:
        evaluated = trainer.evaluate()
        measured |= evaluated
        trainer.log_metrics("eval", evaluated)
        trainer.save_metrics("eval", evaluated)
        if trainer.is_world_process_zero() and metrics.confusion_matrix is not None:
            _write_confusion_matrix(metrics.confusion_matrix, model.config, training_args.output_dir)
    examples = []
    if training_args.do_train:
        with writing(f"The model in {training_args.output_dir}"):
            trainer.save_model(_internal_call=True)  # the folder is pushed when it is finished
        trainer.save_state()
        if trainer.is_world_process_zero():
            examples = finish_folder(trainer, data, arguments, measured, metrics.confusion_matrix)
        # Last, since it marks the folder as finished.
        trainer.save_metrics("train", {k: v for k, v in measured.items() if not k.startswith("eval_")})
    published = _publish(trainer) if training_args.push_to_hub else None
    return RunResult(Path(training_args.output_dir), measured, data, training_args.do_train, examples, published)


def _check_license(args: RefinerTrainingArguments) -> None:
    """Has the Hub's validator look at the one part of the card that a user writes, before the training."""
    card = license_card(args.weights_license)
    with_retries(lambda: card.validate(repo_type="model"), "Validating --weights_license")


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


def _look_at_images(data: ImageData, data_args: DataArguments, args: RefinerTrainingArguments) -> None:
    """Opens every image that isn't a stream's, and does with unreadable ones what the user wants."""
    reasons = []
    if args.do_train and isinstance(data.train, Dataset):
        data.train, wrong = find_unreadable(data.train, "training")
        reasons += wrong
    if args.do_eval and isinstance(data.evaluation, Dataset):
        data.evaluation, wrong = find_unreadable(data.evaluation, "evaluation")
        reasons += wrong
    if data_args.unreadable_images == "stop":
        raise_if_unreadable(reasons)
    elif reasons and args.should_save:
        file = Path(args.output_dir) / UNREADABLE_FILE
        file.write_text("\n".join(reasons) + "\n", encoding="utf-8")
        logger.warning(f"{counted(len(reasons), 'image')} can't be read; the training leaves out what {file} lists.")


def _check_training(
    data: ImageData,
    model: RefinerForImageClassification,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    args: RefinerTrainingArguments,
) -> None:
    """What options, data and model can't do together."""
    if not hasattr(data.train, "__len__"):
        if args.max_steps <= 0:
            raise ValueError("A stream has no known length: give --max_steps, the number of training steps.")
        if augmentation_args.repeated_augmentation > 1:
            raise ValueError("--repeated_augmentation needs a data set of known length, not a stream.")
    elif len(data.train) == 0:
        raise ValueError("There are no training images.")
    mixed = augmentation_args.mixup or augmentation_args.cutmix
    if mixed and args.per_device_train_batch_size % 2:
        raise ValueError("--mixup and --cutmix need an even --per_device_train_batch_size.")
    if data_args.label_map_dir and not model.config.use_dense_head:
        logger.warning(
            "There are label maps, but no dense head for their patches: only the class token learns of them."
        )


def _training_images(
    train: Dataset | IterableDataset,
    prepare: PrepareTraining,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    args: RefinerTrainingArguments,
    checkpoint: str | None,
) -> SeededImages | StreamedImages:
    if isinstance(train, Dataset):
        return SeededImages(train, prepare, augmentation_args.repeated_augmentation)
    args.ignore_data_skip = True  # a stream goes on where it was, without reading up to there
    rank = args.process_index
    position = StreamPosition.load(checkpoint, rank) if checkpoint else None
    seed = args.seed if args.data_seed is None else args.data_seed
    return StreamedImages(
        train,
        prepare,
        seed,
        rank=rank,
        world_size=args.world_size,
        skip_unreadable=data_args.unreadable_images == "skip",
        position=position,
    )


def _as_dict(model_args, data_args, augmentation_args, training_args: RefinerTrainingArguments) -> dict[str, Any]:
    return {
        "model": {
            name: value for name, value in vars(model_args).items() if name not in ("config_overrides", "token")
        },
        "data": dict(vars(data_args)),
        "augmentation": dict(vars(augmentation_args)),
        "training": training_args.to_sanitized_dict(),
    }


def _write_confusion_matrix(counts: list[list[int]], config: RefinerConfig, folder: str) -> None:
    labels = config.label_names
    with open(Path(folder) / CONFUSION_MATRIX, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true label \\ predicted", *labels])
        writer.writerows([label, *row] for label, row in zip(labels, counts))
