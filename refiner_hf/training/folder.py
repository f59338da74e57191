"""The finished folder of a training run: pictures, code and card beside the weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Trainer, pipeline

from ..data.sources import IMAGE_COLUMN, LABEL_COLUMN, ImageData
from ..data.transforms import decode_image
from ..hub.card import CardFacts, describe_network, make_card, markdown_table, usage_example, versions_and_machine
from ..hub.code import add_code
from ..hub.plots import plot_confusion_matrix, plot_learning_curve, plot_predictions
from .arguments import RefinerTrainingArguments


CONFUSION_MATRIX = "confusion_matrix.csv"
RUN_FILE = "training_arguments.json"
EXAMPLES = 8
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
    "distributed_state", "label_names", "train_batch_size",
    "eval_batch_size", "per_device_eval_batch_size", "project", "trackio_space_id",
}  # fmt: skip
_ALWAYS_IN_CARD = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "max_grad_norm",
    "label_smoothing_factor", "seed", "bf16", "fp16", "norm_statistics_images", "freeze_norms",
)  # fmt: skip
_NETWORK_IN_CARD = (
    "drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "layerscale_value", "initializer_range",
    "dense_loss_weight", "dense_logits_weight", "token_mixing", "cosine_regularizer_weight", "batch_norm_momentum",
)  # fmt: skip


@dataclass
class Example:
    """An evaluation picture, its true label, and the model's best answer with its score."""

    image: Image.Image
    label: str
    answer: str
    score: float


def finish_folder(
    trainer: Trainer,
    data: ImageData,
    arguments: dict[str, dict[str, Any]],
    measured: dict[str, float],
    confusion_matrix: list[list[int]] | None,
) -> list[Example]:
    """
    Writes pictures, code (with `--with_code`) and card into the Trainer's output folder.

    Args:
        trainer: trained, its model saved.
        data: what it was trained and evaluated on.
        arguments: the run's options by group: model, data, augmentation, training.
        measured: all measured numbers, named as the Trainer does.
        confusion_matrix: that of the evaluation, if there was one.

    Returns:
        what the saved model answers for a few evaluation pictures.
    """
    args: RefinerTrainingArguments = trainer.args
    folder = Path(args.output_dir)
    # A pickle; the arguments are in a JSON file and in the card.
    (folder / "training_args.bin").unlink(missing_ok=True)
    for name in (RUN_FILE, "trainer_state.json"):
        write_json(folder / name, without_paths(json.loads((folder / name).read_text(encoding="utf-8"))))

    caption = "Loss and accuracy during training; only the training loss has the regularisation in it"
    pictures = [("learning_curve.png", caption)]
    plot_learning_curve(trainer.state.log_history, folder / pictures[0][0])
    if confusion_matrix is not None:
        plot_confusion_matrix(confusion_matrix, trainer.model.config.label_names, folder / "confusion_matrix.png")
        pictures.append(("confusion_matrix.png", f"Confusion matrix on {data.evaluation_split}"))
    examples = predict_examples(folder, data, args.example_pictures or EXAMPLES) if data.evaluation is not None else []
    if examples and args.example_pictures:
        titles = [f"{example.label}: {example.answer} {example.score:.0%}" for example in examples]
        plot_predictions([example.image for example in examples], titles, folder / "predictions.png")
        pictures.append(("predictions.png", "Pictures of the evaluation set, as 'true label: prediction, score'"))
        _save_pictures([example.image for example in examples], folder / "examples")

    if args.with_code:
        add_code(folder)
    make_card(_facts(trainer, data, arguments, measured, pictures)).save(folder / "README.md")
    return examples


def predict_examples(folder: Path, data: ImageData, count: int) -> list[Example]:
    """What the saved folder's pipeline answers for `count` evaluation images, spread over the set."""
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    if hasattr(data.evaluation, "__len__"):
        size = len(data.evaluation)
        rows = [data.evaluation[i * size // count] for i in range(count)] if size > count else list(data.evaluation)
    else:
        rows = list(data.evaluation.take(count))
    images = [decode_image(row[IMAGE_COLUMN]) for row in rows]
    answers = [answer[0] for answer in classify(images, top_k=1)] if images else []
    return [
        Example(image, data.labels[row[LABEL_COLUMN]], answer["label"], answer["score"])
        for image, row, answer in zip(images, rows, answers)
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`, readably."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_paths(content: Any) -> Any:
    """The same with every path of this machine cut down to its last name: the folder will be published."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and Path(content).name != content and Path(content).exists():
        return Path(content).resolve().name
    return content


def _save_pictures(images: list[Image.Image], folder: Path) -> None:
    """folder/0.png and so on, at a size for looking."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        image.thumbnail((LARGEST_EXAMPLE, LARGEST_EXAMPLE))
        image.save(folder / f"{i}.png")


def _facts(
    trainer: Trainer,
    data: ImageData,
    arguments: dict[str, dict[str, Any]],
    measured: dict[str, float],
    pictures: list[tuple[str, str]],
) -> CardFacts:
    args, config = trainer.args, trainer.model.config
    name = Path(args.output_dir).resolve().name
    title = (args.hub_model_id or f"refiner-{name}").split("/")[-1]
    base, source = arguments["model"]["model_name_or_path"], "from scratch"
    if base:
        source = f"by fine-tuning `{Path(base).name}`"
    on_hub = base and not Path(base).exists()

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
        f"({data.evaluation_split}). Labels: {_name_some(config.label_names)}.",
        training=_training(trainer, arguments, measured),
        metrics=metrics,
        dataset_name=data.name,
        dataset_id=data.hub_id,
        dataset_split=data.evaluation_split,
        license=args.weights_license,
        base_model=base if on_hub else None,
        remote_code=args.with_code,
    )


def _training(trainer: Trainer, arguments: dict[str, dict[str, Any]], measured: dict[str, float]) -> str:
    args, config = trainer.args, trainer.model.config
    shown = args.to_sanitized_dict()
    defaults = type(args)(output_dir=args.output_dir).to_sanitized_dict()
    changed = [name for name, value in shown.items() if value != defaults[name] and name not in _NOT_IN_CARD]
    rows = [(name, _plain(shown[name])) for name in dict.fromkeys([*_ALWAYS_IN_CARD, *sorted(changed)])]
    rows += [(name, _plain(getattr(config, name))) for name in _NETWORK_IN_CARD]
    rows += [(name, _plain(value)) for name, value in arguments["augmentation"].items()]
    rows += [(name, _plain(arguments["data"][name])) for name in ("train_val_split", "max_train_samples")]
    rows.append(("crop_pct (evaluation)", _plain(trainer.processing_class.crop_pct)))
    seconds = measured.get("train_runtime")
    duration = f" in {seconds:.0f} s" if seconds else ""
    return (
        f"With `refiner_hf` and the Hugging Face Trainer: {trainer.state.global_step} steps{duration} on "
        f"{versions_and_machine()}. Every option that isn't in this table has its default; all of them are in "
        f"`{RUN_FILE}`.\n\n" + markdown_table(["option", "value"], rows)
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
