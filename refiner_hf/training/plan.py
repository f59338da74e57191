"""
The plan of a run: its data, network, image processor, checkpoint and repository. Nothing of it is written yet, and
whatever can be refused is refused here.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..cards.card import license_card
from ..choices_refiner import REGRESSION, SINGLE_LABEL
from ..data.arguments import AugmentationArguments, DataArguments
from ..data.augmentation import Augment
from ..data.label_maps import LabelMaps, open_label_maps
from ..data.sources import ImageData, load_image_data
from ..data.unreadable import raise_if_unreadable
from ..hub.repository import prepare_repository, with_retries
from ..modeling_refiner import RefinerForImageClassification
from .adapters import add_adapter
from .arguments import RefinerTrainingArguments
from .initial_model import load_model, load_processor, source_of_model
from .model_arguments import ModelArguments
from .output_folder import prepare_output_folder, repository
from .same_data import check_same_data, facts_of_data


logger = logging.get_logger(__name__)


_FOR_STATISTICS = 128  # images, for the norms of a refinement adapter


@dataclass
class Plan:
    """
    What a run does.

    `data_args` and `augmentation_args` are the options as they were given. `args` are those for the Trainer: a copy,
    with the repository's whole name, and with `ignore_data_skip` for a stream. `arguments` are all options by group,
    for the record. `label_ids` are the network's numbers of the data's labels; `augment` and `label_maps` are for
    training images; `checkpoint` is where training continues; `data_facts` is what a later run compares its data with;
    `unreadable` says which images are left out, and why.
    """

    data_args: DataArguments
    augmentation_args: AugmentationArguments
    args: RefinerTrainingArguments
    arguments: dict[str, dict[str, Any]]
    data: ImageData
    model: PreTrainedModel
    processor: BaseImageProcessor
    label_ids: list[int]
    augment: Augment | None
    label_maps: LabelMaps | None
    checkpoint: str | None
    data_facts: dict[str, Any] | None
    unreadable: list[str]


def make_plan(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: RefinerTrainingArguments,
    held: ExitStack,
) -> Plan:
    """
    Checks everything that can be checked before a training, in the order of how soon it is known: the options, the
    folder, the token and the repository, the data, the network. The options that are given aren't changed.

    Args:
        model_args, data_args, augmentation_args, training_args: the options of the run.
        held (`ExitStack`): keeps other processes from the output folder until it is left.

    Raises:
        `ValueError`, `OSError`: as [`~refiner_hf.training.run.run`].
    """
    _check_options(model_args, training_args)
    arguments = all_options(model_args, data_args, augmentation_args, training_args)
    args = copy.copy(training_args)
    checkpoint = prepare_output_folder(args, arguments, held)
    if args.dry_run:
        args.push_to_hub = False
    if args.push_to_hub and args.should_save:
        args.hub_model_id = prepare_repository(
            repository(args), private=args.hub_private_repo, branch=args.hub_revision, token=args.hub_token
        )
        if args.weights_license:
            # The Hub's validator looks at the one part of the card that a user writes.
            card = license_card(args.weights_license)
            with_retries(lambda: card.validate(repo_type="model"), "Validating --weights_license")
    set_seed(args.seed)
    with args.main_process_first(desc="loading the data"):  # other processes find it in the cache of `datasets`
        data = load_image_data(data_args, need_train=args.do_train, need_evaluation=args.do_eval, seed=args.seed)
        data, unreadable = (data, []) if data_args.embedded else _readable(data, data_args, args)
        data_facts = facts_of_data(data, data_args, evaluated=args.do_eval) if args.do_train else None
        if checkpoint and data_facts:
            check_same_data(checkpoint, data_facts, named=checkpoint == args.resume_from_checkpoint)
    source = source_of_model(model_args)
    model, label_ids = load_model(model_args, source, data.labels, keep_labels=not args.do_train)
    processor = load_processor(model_args, source, model)
    _set_problem_type(model, data.problem_type, trained=args.do_train)
    if args.do_train and model_args.adapter != "none":
        assert data.train is not None
        model = add_adapter(model, processor, data.train.sample(_FOR_STATISTICS, args.seed), model_args)
    augment = label_maps = None
    if args.do_train:
        _check_training(data, model, data_args, augmentation_args, args)
        augment = Augment(processor, augmentation_args)
        label_maps = open_label_maps(data_args.label_map_dir, data.labels) if data_args.label_map_dir else None
        # A stream continues where it was, without reading again what came before.
        args.ignore_data_skip |= data_args.streaming
    return Plan(
        data_args=data_args,
        augmentation_args=augmentation_args,
        args=args,
        arguments=arguments,
        data=data,
        model=model,
        processor=processor,
        label_ids=label_ids or list(range(len(data.labels))),  # a stream's labels are checked when they come
        augment=augment,
        label_maps=label_maps,
        checkpoint=checkpoint,
        data_facts=data_facts,
        unreadable=unreadable,
    )


def all_options(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: RefinerTrainingArguments,
) -> dict[str, dict[str, Any]]:
    """All options by group, without the tokens."""
    not_kept = ("config_overrides", "adapter_options", "token")  # the first are in `overrides` and `adapter_fields`
    return {
        "model": {name: value for name, value in vars(model_args).items() if name not in not_kept},
        "data": dict(vars(data_args)),
        "augmentation": dict(vars(augmentation_args)),
        "training": training_args.to_sanitized_dict(),
    }


def _check_options(model_args: ModelArguments, args: RefinerTrainingArguments) -> None:
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: neither --do_train nor --do_eval.")
    if args.dry_run and not args.do_train:
        raise ValueError("--dry_run is for a training: give --do_train.")
    if not args.do_train and model_args.model_name_or_path is None:
        raise ValueError("Which model to evaluate? Give --model_name_or_path.")
    if args.calibrate and not (args.do_train and args.do_eval):
        raise ValueError("--calibrate is for a training with evaluation images: give --do_train and --do_eval.")
    if args.push_to_hub and not args.do_train:
        raise ValueError("An evaluation leaves nothing to push. Use refiner push to publish the model's folder.")


def _readable(
    data: ImageData, data_args: DataArguments, args: RefinerTrainingArguments
) -> tuple[ImageData, list[str]]:
    """Opens every image but a stream's. The data without unreadable ones, and what is wrong with those."""
    reasons: list[str] = []
    sides = (
        (args.do_train, "train", "training"),
        (args.do_eval, "evaluation", "evaluation"),
        (args.do_eval and data.test is not None, "test", "test"),
    )
    for used, side, what in sides:
        if used:
            rows, wrong = getattr(data, side).readable(what)
            data, reasons = replace(data, **{side: rows}), reasons + wrong
    if data_args.unreadable_images == "stop":
        raise_if_unreadable(reasons)
    return data, reasons


def _set_problem_type(model: PreTrainedModel, wanted: str, *, trained: bool) -> None:
    """
    Raises:
        `ValueError`: a network that isn't trained is for another kind of problem.
    """
    had = model.config.problem_type or SINGLE_LABEL
    if had != wanted and not trained:
        raise ValueError(f"The model's problem type is {had}, and the data's {wanted}: give --problem_type {had}.")
    if had != wanted:
        config: Any = model.config  # whose annotation has the three names
        config.problem_type = wanted


def _check_training(
    data: ImageData,
    model: PreTrainedModel,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    args: RefinerTrainingArguments,
) -> None:
    """Refuses what options, data and model can't do together."""
    assert data.train is not None  # it was needed
    if data.train.streamed:
        if args.max_steps <= 0:
            raise ValueError("A stream has no known length: give --max_steps, the number of training steps.")
        if args.class_weights == "balanced":
            raise ValueError("--class_weights balanced counts the labels first, and a stream's come one by one.")
        if augmentation_args.repeated_augmentation > 1:
            raise ValueError("--repeated_augmentation needs a data set of known length, not a stream.")
    elif data.train.count == 0:
        raise ValueError("There are no training images.")
    if data.problem_type != SINGLE_LABEL:
        _check_other_problem(data.problem_type, args)
    mixed = augmentation_args.mixup or augmentation_args.cutmix
    if mixed and args.per_device_train_batch_size % 2:
        raise ValueError("--mixup and --cutmix need an even --per_device_train_batch_size.")
    if data_args.label_map_dir and not isinstance(model, RefinerForImageClassification):
        raise ValueError(f"--label_map_dir is for a Refiner; {type(model).__name__} knows no labels of patches.")
    if data_args.label_map_dir and not model.config.use_dense_head:
        logger.warning(
            "There are label maps, but no dense head for their patches: only the class token learns of them."
        )


def _check_other_problem(problem_type: str, args: RefinerTrainingArguments) -> None:
    """What goes only with one label an image."""
    given = [
        name
        for name, value in (("--class_weights", args.class_weights != "none"), ("--calibrate", args.calibrate))
        if value
    ]
    if problem_type == REGRESSION:
        given += ["--label_smoothing_factor"] * (args.label_smoothing_factor > 0)
    if given:
        raise ValueError(f"{' and '.join(given)} can't be had with --problem_type {problem_type}.")
