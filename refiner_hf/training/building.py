"""The Trainer of a run, made from its plan."""

from datasets import Dataset
from timm.data import Mixup
from transformers import TrainerCallback, default_data_collator

from ..data.seeded_sampling import SeededImages
from ..data.sources import at_most, shuffled
from ..data.streams import StreamedImages, StreamPosition
from ..data.transforms import PrepareImages, PrepareTraining, evaluation_pixels, with_transform
from .ema import EmaCallback
from .metrics import ClassificationMetrics, rank_labels
from .plan import Plan
from .statistics import NormStatisticsCallback
from .targets import TrainingTargets
from .trainer import RefinerTrainer


def build_trainer(plan: Plan) -> tuple[RefinerTrainer, ClassificationMetrics]:
    """The Trainer, and the metrics that it computes, which keep the last confusion matrix."""
    args, mixes = plan.args, plan.augmentation_args
    for_evaluation = PrepareImages(evaluation_pixels(plan.processor), plan.label_ids)
    metrics = ClassificationMetrics(len(plan.model.config.label_names))
    mixup = Mixup(mixes.mixup, mixes.cutmix, label_smoothing=0.0) if mixes.mixup or mixes.cutmix else None
    trainer = RefinerTrainer(
        model=plan.model,
        args=args,
        train_dataset=_training_images(plan) if args.do_train else None,
        eval_dataset=with_transform(plan.data.evaluation, for_evaluation) if args.do_eval else None,
        processing_class=plan.processor,
        data_collator=default_data_collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=rank_labels,
        callbacks=_callbacks(plan, for_evaluation) if args.do_train else [],
        make_targets=TrainingTargets(mixup=mixup, transposed_boxes=plan.data_args.transposed_label_maps),
    )
    return trainer, metrics


def _training_images(plan: Plan) -> SeededImages | StreamedImages:
    args, images = plan.args, plan.data.train
    assert plan.augment is not None  # a plan with training has it
    prepare = PrepareTraining(plan.augment, plan.label_ids, plan.label_maps)
    if isinstance(images, Dataset):
        return SeededImages(images, prepare, plan.augmentation_args.repeated_augmentation)
    rank = args.process_index
    return StreamedImages(
        images,
        prepare,
        args.seed if args.data_seed is None else args.data_seed,
        rank=rank,
        world_size=args.world_size,
        skip_unreadable=plan.data_args.unreadable_images == "skip",
        position=StreamPosition.load(plan.checkpoint, rank) if plan.checkpoint else None,
    )


def _callbacks(plan: Plan, for_evaluation: PrepareImages) -> list[TrainerCallback]:
    args = plan.args
    ema = EmaCallback(args.ema_decay, args.ema_warmup) if args.ema_decay else None
    callbacks: list[TrainerCallback] = [ema] if ema else []
    if args.norm_statistics_images and not args.freeze_norms:
        # Always the same training images.
        some = at_most(shuffled(plan.data.train, args.seed), args.norm_statistics_images, args.seed)
        for_statistics = with_transform(some, for_evaluation)
        callbacks.append(NormStatisticsCallback(for_statistics, args.per_device_eval_batch_size, ema=ema))
    return callbacks
