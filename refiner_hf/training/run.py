"""A whole run: data, model, training, evaluation, and the finished folder."""

import csv
import json
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, default_data_collator, set_seed
from transformers.utils import logging

from ..configuration_refiner import RefinerConfig
from ..data.arguments import AugmentationArguments, DataArguments
from ..data.sources import ImageData, at_most, load_image_data
from ..data.transforms import PrepareImages, evaluation_pixels, match_labels, training_pixels, with_transform
from ..hub.card import CardFacts, make_card
from ..hub.files import without_paths, write_json
from ..hub.publish import Published
from ..hub.repository import PublishError, patiently, prepare_repository
from ..hub.verification import verify
from ..image_processing_refiner import RefinerImageProcessor
from ..modeling_refiner import RefinerForImageClassification
from .arguments import ModelArguments, RefinerTrainingArguments
from .card import RUN_FILE
from .folder import CONFUSION_MATRIX, Example, finish_folder
from .metrics import ClassificationMetrics, rank_labels
from .statistics import NormStatisticsCallback
from .trainer import RefinerTrainer


logger = logging.get_logger(__name__)

FINISHED_FILE = "train_results.json"
# Options that may differ when a run is taken up again.
_MAY_CHANGE = {"cache_dir", "refine_implementation", "max_eval_samples"}


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

    A run that broke off is taken up again from its last checkpoint.

    Raises:
        `ValueError`: options, data or labels that don't fit; before anything long begins wherever it can be seen.
        `OSError`: an output folder that can't be written, before training.
        [`~refiner_hf.hub.repository.PublishError`]: a token that can't push, before training; or the push failed
            after it (the folder is finished, and the message says how to push it again).
    """
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("Nothing to do: neither --do_train nor --do_eval.")
    if not training_args.do_train and model_args.model_name_or_path is None:
        raise ValueError("Which model to evaluate? Give --model_name_or_path.")
    if training_args.push_to_hub and not training_args.do_train:
        raise ValueError("An evaluation leaves nothing to push. Use refiner-push to publish the model's folder.")
    arguments = _as_dict(model_args, data_args, augmentation_args, training_args)
    checkpoint = _prepare_output_folder(training_args, arguments)
    if training_args.push_to_hub and training_args.should_save:
        training_args.hub_model_id = prepare_repository(
            _repository(training_args),
            private=training_args.hub_private_repo,
            branch=training_args.hub_revision,
            token=training_args.hub_token,
        )
        if training_args.weights_license:
            _check_license(training_args)
    set_seed(training_args.seed)
    data = load_image_data(
        data_args, need_train=training_args.do_train, need_evaluation=training_args.do_eval, seed=training_args.seed
    )
    model, label_ids = load_model(model_args, data.labels, keep_labels=not training_args.do_train)
    processor = load_processor(model_args, model.config)

    for_evaluation = PrepareImages(evaluation_pixels(processor), label_ids)
    for_training = PrepareImages(training_pixels(processor, augmentation_args), label_ids)
    train, evaluation = data.train, data.evaluation
    metrics = ClassificationMetrics(model.config.num_labels)
    callbacks = []
    if training_args.do_train:
        _check_length(train, training_args)
        if training_args.freeze_norms:
            model.freeze_norms()
        elif training_args.norm_statistics_images:
            # Always the same training images.
            some = at_most(train, training_args.norm_statistics_images, training_args.seed)
            for_statistics = with_transform(some, for_evaluation)
            callbacks.append(NormStatisticsCallback(for_statistics, training_args.per_device_eval_batch_size))
        if training_args.should_save:
            write_json(Path(training_args.output_dir) / RUN_FILE, arguments)

    trainer = RefinerTrainer(
        model=model,
        args=training_args,
        train_dataset=with_transform(train, for_training) if training_args.do_train else None,
        eval_dataset=with_transform(evaluation, for_evaluation) if training_args.do_eval else None,
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=rank_labels,
        callbacks=callbacks,
    )

    measured: dict[str, float] = {}
    if training_args.do_train:
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
    card = make_card(CardFacts(title="", summary="", usage="", limits="", license=args.weights_license))
    patiently(lambda: card.validate(repo_type="model"), "Validating --weights_license")


def _publish(trainer: RefinerTrainer) -> Published | None:
    args = trainer.args
    try:
        published = trainer.publish("End of training")
        if published and args.verify_push:
            verify(published, token=args.hub_token)
    except (PublishError, ValueError, KeyboardInterrupt) as error:
        raise PublishError(
            f"Training is finished and its folder is whole, but: {str(error) or 'interrupted.'}\n"
            f"To push it again: {_push_command(args)}"
        ) from error
    return published


def _repository(args: RefinerTrainingArguments) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


def _push_command(args: RefinerTrainingArguments) -> str:
    words = ["refiner-push", "--folder", args.output_dir, "--repo_id", _repository(args)]
    words += ["--branch", args.hub_revision] if args.hub_revision else []
    return shlex.join(words + ["--verify"] * args.verify_push)


def load_model(
    args: ModelArguments, labels: list[str], *, keep_labels: bool
) -> tuple[RefinerForImageClassification, list[int] | None]:
    """
    A new network for `labels`, or a checkpoint's, fitted to them.

    A checkpoint with the same labels keeps its heads and its label order, whatever order the data has. With other
    labels its heads are replaced, with a warning, unless `keep_labels`.

    Returns:
        the model, and its number of each of the data's labels (`None` where they are the same).

    Raises:
        `ValueError`: the checkpoint isn't a Refiner's; or, with `keep_labels`, labels that it doesn't know.
    """
    sizes = {} if args.image_size is None else {"image_size": args.image_size}
    if args.model_name_or_path is None:
        new = getattr(RefinerConfig, args.model_size)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        config = new(**names, **args.overrides | sizes)
        return RefinerForImageClassification(config, args.refine_implementation), None

    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    config = AutoConfig.from_pretrained(args.model_name_or_path, **hub)
    if not isinstance(config, RefinerConfig):
        raise ValueError(f"{args.model_name_or_path} is a {config.model_type!r} model, not a Refiner.")
    try:
        model = RefinerForImageClassification.from_pretrained(
            args.model_name_or_path,
            refine_implementation=args.refine_implementation,
            **hub,
            **args.overrides | sizes,
        )
    except RuntimeError as error:
        raise ValueError(f"The weights of {args.model_name_or_path} don't fit the network: {error}") from error
    model_labels = model.config.label_names
    if keep_labels or set(labels) == set(model_labels):
        return model, match_labels(labels, model_labels)
    logger.warning(
        f"The data's {len(labels)} labels are not the checkpoint's {len(model_labels)}: its classifiers are replaced "
        "by new ones."
    )
    model.reset_classifier(labels)
    return model, None


def load_processor(args: ModelArguments, config: RefinerConfig) -> RefinerImageProcessor:
    """The checkpoint's image processor, or a new one, at the model's image size."""
    height, width = config.image_height_width
    changes: dict[str, Any] = {"size": {"height": height, "width": width}}
    if args.crop_pct is not None:
        changes["crop_pct"] = args.crop_pct
    if args.model_name_or_path is None:
        return RefinerImageProcessor(**changes)
    try:
        return RefinerImageProcessor.from_pretrained(
            args.model_name_or_path,
            cache_dir=args.cache_dir,
            revision=args.model_revision,
            token=args.token,
            **changes,
        )
    except OSError:
        logger.warning(f"{args.model_name_or_path} has no image processor; taking the standard one.")
        return RefinerImageProcessor(**changes)


def _prepare_output_folder(args: RefinerTrainingArguments, arguments: dict[str, Any]) -> str | None:
    """Checks that the folder can be written and holds nothing to lose. Returns the checkpoint to go on from."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"The output folder {folder} can't be written: {error}. Give another --output_dir.") from error
    if (folder / FINISHED_FILE).exists():
        push = f" To publish it: {_push_command(args)}" if args.push_to_hub else ""
        raise ValueError(f"{folder} holds a finished training run. Give another --output_dir.{push}")
    if not args.do_train:
        return None
    if args.resume_from_checkpoint and args.resume_from_checkpoint not in ("True", "true"):
        if not os.path.isdir(args.resume_from_checkpoint):
            raise ValueError(f"There is no checkpoint {args.resume_from_checkpoint}.")
        return args.resume_from_checkpoint
    if any(folder.iterdir()) and not (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} isn't empty and holds no training run of ours. Give another --output_dir.")
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint:
        _check_same_run(folder, arguments)
        logger.warning(f"Going on from {checkpoint}.")
    elif args.resume_from_checkpoint:
        raise ValueError(f"There is no checkpoint in {folder} to resume from.")
    return checkpoint


def _check_same_run(folder: Path, arguments: dict[str, Any]) -> None:
    """A run may go on for longer or on other hardware, but with the network and the data that it began with."""
    begun = without_paths(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    arguments = without_paths(arguments)
    changed = [
        f"{name} was {begun[group].get(name)!r} and is now {value!r}"
        for group in ("model", "data", "augmentation")
        for name, value in arguments[group].items()
        if name not in _MAY_CHANGE and begun[group].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run that broke off, but its options differ: {'; '.join(changed)}. Start it with the "
            "same options to go on, or give another --output_dir."
        )


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):
            logger.warning(f"{checkpoint} is incomplete (the run broke off while saving it); leaving it aside.")
    return None


def _check_length(train, args: RefinerTrainingArguments) -> None:
    if not hasattr(train, "__len__"):
        if args.max_steps <= 0:
            raise ValueError("A stream has no known length: give --max_steps, the number of training steps.")
    elif len(train) == 0:
        raise ValueError("There are no training images.")


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
