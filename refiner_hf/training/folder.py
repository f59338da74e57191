"""The finished folder of a training run: pictures, code and card beside the weights."""

from pathlib import Path

from PIL import Image
from transformers import Trainer, pipeline

from ..data.arguments import AugmentationArguments
from ..data.sources import IMAGE_COLUMN, LABEL_COLUMN, ImageData
from ..data.transforms import decode_image
from ..hub.card import CardFacts, describe_network, make_card, markdown_table, usage_example, versions_and_machine
from ..hub.code import add_code
from ..hub.plots import plot_confusion_matrix, plot_learning_curve, plot_predictions
from .arguments import ModelArguments, RefinerTrainingArguments


CONFUSION_MATRIX = "confusion_matrix.csv"
LARGEST_EXAMPLE = 512

_METRICS = {
    "eval_accuracy": ("accuracy", "Top-1 accuracy"),
    "eval_top5_accuracy": ("top_5_accuracy", "Top-5 accuracy"),
}

# Options that say where things lie or how they are shown, not what was trained.
_NOT_IN_CARD = {
    "output_dir", "logging_dir", "run_name", "hub_model_id", "hub_token", "push_to_hub", "report_to", "disable_tqdm",
    "remove_unused_columns", "with_code", "weights_license", "example_pictures", "logging_steps", "logging_strategy",
    "logging_first_step", "eval_strategy", "save_strategy", "save_total_limit", "do_train", "do_eval",
    "resume_from_checkpoint", "dataloader_num_workers", "dataloader_pin_memory", "local_rank", "deepspeed_plugin",
    "distributed_state", "label_names", "project", "trackio_space_id",
}  # fmt: skip
_ALWAYS_IN_CARD = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "max_grad_norm",
    "label_smoothing_factor", "seed", "bf16", "fp16", "norm_statistics_images", "freeze_norms",
)  # fmt: skip


def finish_folder(
    trainer: Trainer,
    data: ImageData,
    model_args: ModelArguments,
    augmentation_args: AugmentationArguments,
    measured: dict[str, float],
    confusion_matrix: list[list[int]] | None,
) -> None:
    """
    Writes pictures, code (with `--with_code`) and card into the Trainer's output folder.

    Args:
        trainer: trained, its model saved.
        data: what it was trained and evaluated on.
        model_args, augmentation_args: the run's options.
        measured: all measured numbers, named as the Trainer does.
        confusion_matrix: that of the evaluation, if there was one.
    """
    args: RefinerTrainingArguments = trainer.args
    folder = Path(args.output_dir)
    # A pickle that holds local paths; the arguments are in a JSON file and in the card.
    (folder / "training_args.bin").unlink(missing_ok=True)

    config = trainer.model.config
    labels = [config.id2label[i] for i in range(config.num_labels)]
    caption = "Loss and accuracy during training; only the training loss has the regularisation in it"
    pictures = [("learning_curve.png", caption)]
    plot_learning_curve(trainer.state.log_history, folder / pictures[0][0])
    if confusion_matrix is not None:
        plot_confusion_matrix(confusion_matrix, labels, folder / "confusion_matrix.png")
        pictures.append(("confusion_matrix.png", f"Confusion matrix on {data.evaluation_split}"))
    if data.evaluation is not None and args.example_pictures:
        examples = predict_examples(folder, data, args.example_pictures)
        plot_predictions(
            [image for image, _, _ in examples],
            [f"{truth}: {answer['label']} {answer['score']:.0%}" for _, truth, answer in examples],
            folder / "predictions.png",
        )
        pictures.append(("predictions.png", "Pictures of the evaluation set, as 'true label: prediction, score'"))
        _save_pictures([image for image, _, _ in examples], folder / "examples")

    if args.with_code:
        add_code(folder)
    facts = _facts(trainer, data, model_args, augmentation_args, measured, pictures)
    make_card(facts).save(folder / "README.md")


def predict_examples(folder: Path, data: ImageData, count: int) -> list[tuple]:
    """
    What the saved folder's pipeline answers for a few evaluation images: (image, true label, its best answer).
    """
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    rows = list(data.evaluation.take(count))
    images = [decode_image(row[IMAGE_COLUMN]) for row in rows]
    answers = classify(images, top_k=1)
    return [(image, data.labels[row[LABEL_COLUMN]], answer[0]) for image, row, answer in zip(images, rows, answers)]


def _save_pictures(images: list[Image.Image], folder: Path) -> None:
    """folder/0.png and so on, at a size for looking."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        image.thumbnail((LARGEST_EXAMPLE, LARGEST_EXAMPLE))
        image.save(folder / f"{i}.png")


def _facts(
    trainer: Trainer,
    data: ImageData,
    model_args: ModelArguments,
    augmentation_args: AugmentationArguments,
    measured: dict[str, float],
    pictures: list[tuple[str, str]],
) -> CardFacts:
    args, config = trainer.args, trainer.model.config
    name = Path(args.output_dir).resolve().name
    title = (args.hub_model_id or f"refiner-{name}").split("/")[-1]
    source = "from scratch"
    if model_args.model_name_or_path:
        source = f"by fine-tuning `{Path(model_args.model_name_or_path).name}`"
    on_hub = model_args.model_name_or_path and not Path(model_args.model_name_or_path).exists()

    metrics = {kind: (text, round(measured[key], 6)) for key, (kind, text) in _METRICS.items() if key in measured}
    results = ""
    if metrics:
        rows = [(text, f"{value:.2%}") for text, value in metrics.values()]
        rows.append(("Loss", f"{measured['eval_loss']:.4f}"))
        count = f"{_length(data.evaluation)} images ({data.evaluation_split}) of {data.name}"
        results = f"Measured on {count}.\n\n" + markdown_table(["", ""], rows)

    return CardFacts(
        title=title,
        summary=f"A Refiner image classifier with {config.num_labels} labels, trained {source} on {data.name}.",
        usage=usage_example(args.hub_model_id or name, args.with_code),
        limits=_limits(data, config.num_labels),
        results=results,
        pictures=pictures,
        architecture=describe_network(trainer.model),
        data=f"{data.name}: {_length(data.train)} training images, {_length(data.evaluation)} evaluation images "
        f"({data.evaluation_split}). Labels: {_name_some([config.id2label[i] for i in range(config.num_labels)])}.",
        training=_training(args, augmentation_args, measured, trainer.state.global_step),
        metrics=metrics,
        dataset_name=data.name,
        dataset_id=data.hub_id,
        dataset_split=data.evaluation_split,
        license=args.weights_license,
        base_model=model_args.model_name_or_path if on_hub else None,
        remote_code=args.with_code,
    )


def _training(
    args: RefinerTrainingArguments, augmentation_args: AugmentationArguments, measured: dict[str, float], steps: int
) -> str:
    shown = args.to_sanitized_dict()
    defaults = type(args)(output_dir=args.output_dir).to_sanitized_dict()
    changed = [name for name, value in shown.items() if value != defaults[name] and name not in _NOT_IN_CARD]
    names = dict.fromkeys([*_ALWAYS_IN_CARD, *sorted(changed)])
    rows = [(name, _plain(shown[name])) for name in names if name in shown]
    rows += [(name, _plain(value)) for name, value in vars(augmentation_args).items()]
    seconds = measured.get("train_runtime")
    duration = f" in {seconds:.0f} s" if seconds else ""
    return (
        f"With `refiner_hf` and the Hugging Face Trainer: {steps} steps{duration} on {versions_and_machine()}. Every "
        f"option that isn't in this table has its default; all of them are in `training_arguments.json`.\n\n"
        + markdown_table(["option", "value"], rows)
    )


def _limits(data: ImageData, num_labels: int) -> str:
    return (
        f"The model knows {num_labels} labels and gives every picture one of them, also pictures of something else. "
        f"It has been measured on {data.name} only; expect less on pictures of another kind, size or origin. Its "
        "scores have not been calibrated, and its behaviour on different groups of people or things has not been "
        "examined."
    )


def _plain(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _length(data) -> str:
    return f"{len(data):,}" if hasattr(data, "__len__") else "a stream of"


def _name_some(labels: list[str], most: int = 20) -> str:
    return ", ".join(labels) if len(labels) <= most else ", ".join(labels[:most]) + f" and {len(labels) - most} more"
