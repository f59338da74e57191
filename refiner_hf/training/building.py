"""The Trainer of a run, made from its plan."""

from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup
from transformers import TrainerCallback, default_data_collator

from ..data.augmentation import NormalizeViews
from ..data.columns import LABEL_COLUMN
from ..data.labels import LabelValues
from ..data.rows import Rows, TrainingOrder
from ..data.transforms import PrepareImages, PrepareTraining, evaluation_pixels
from ..utils.image_config import label_names_of
from .early_stopping import EarlyStopping
from .ema import EmaCallback
from .metrics import Metrics, metrics_for
from .norm_statistics_callback import NormStatisticsCallback
from .plan import Plan
from .targets import TrainingTargets
from .trainer import RefinerTrainer


def build_trainer(plan: Plan) -> tuple[RefinerTrainer, Metrics]:
    """The Trainer, and the metrics that it computes."""
    args, mixes = plan.args, plan.augmentation_args
    for_evaluation = _prepare_for_evaluation(plan)
    metrics = metrics_of(plan)
    mixup = Mixup(mixes.mixup, mixes.cutmix, label_smoothing=0.0) if mixes.mixup or mixes.cutmix else None
    trainer = RefinerTrainer(
        model=plan.model,
        args=args,
        train_dataset=_training_images(plan) if args.do_train else None,
        eval_dataset=_prepared(plan.data.evaluation, for_evaluation) if args.do_eval else None,
        processing_class=plan.processor,
        data_collator=default_data_collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.reduce,
        callbacks=_callbacks(plan, for_evaluation) if args.do_train else [],
        make_targets=TrainingTargets(
            normalize=NormalizeViews(plan.processor, mixes.random_erasing),
            mixup=mixup,
            transposed_boxes=plan.data_args.transposed_label_maps,
            class_weights=_class_weights(plan) if args.do_train and args.class_weights == "balanced" else None,
        ),
    )
    return trainer, metrics


def _training_images(plan: Plan) -> torch.utils.data.Dataset:
    args = plan.args
    assert plan.augment is not None and plan.data.train is not None  # a plan with training has them
    prepare = PrepareTraining(plan.augment, _label_values(plan), plan.label_maps)
    order = TrainingOrder(
        repeats=plan.augmentation_args.repeated_augmentation,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rank=args.process_index,
        world_size=args.world_size,
        skip_unreadable=plan.data_args.unreadable_images == "skip",
        checkpoint=plan.checkpoint,
    )
    return plan.data.train.for_training(prepare, order)


def _class_weights(plan: Plan) -> torch.Tensor:
    """Of each label of the network, so that all training images weigh 1 on average, and all labels the same."""
    assert plan.data.train is not None
    labels = np.array(plan.data.train.labels(LABEL_COLUMN))
    present = np.unique(labels)
    weights = torch.zeros(len(label_names_of(plan.model.config)))
    balanced = compute_class_weight("balanced", classes=present, y=labels)
    weights[[plan.label_ids[label] for label in present]] = torch.tensor(balanced, dtype=weights.dtype)
    return weights


def metrics_of(plan: Plan) -> Metrics:
    """Those of the plan's kind of labels."""
    return metrics_for(plan.data.problem_type, len(label_names_of(plan.model.config)))


def test_images(plan: Plan) -> Any:
    """The test images of a plan that has some, for the Trainer."""
    return _prepared(plan.data.test, _prepare_for_evaluation(plan))


def _prepare_for_evaluation(plan: Plan) -> PrepareImages:
    return PrepareImages(evaluation_pixels(plan.processor), _label_values(plan))


def _label_values(plan: Plan) -> LabelValues:
    return LabelValues(plan.data.problem_type, len(label_names_of(plan.model.config)), plan.label_ids)


def _prepared(rows: Rows | None, prepare: PrepareImages) -> Any:
    assert rows is not None  # a plan with evaluation, or with a test, has them
    return rows.prepared(prepare)


def _callbacks(plan: Plan, for_evaluation: PrepareImages) -> list[TrainerCallback]:
    args = plan.args
    ema = EmaCallback(args.ema_decay, args.ema_warmup) if args.ema_decay else None
    callbacks: list[TrainerCallback] = [ema] if ema else []
    if args.norm_statistics_images and not args.freeze_norms:
        assert plan.data.train is not None
        # Always the same training images.
        for_statistics = plan.data.train.sample(args.norm_statistics_images, args.seed).prepared(for_evaluation)
        callbacks.append(NormStatisticsCallback(for_statistics, args.per_device_eval_batch_size, ema=ema))
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(args.early_stopping_patience))
    return callbacks
