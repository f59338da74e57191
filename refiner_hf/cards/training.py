"""What the card of a trained model says."""

import csv
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Trainer

from ..choices_refiner import MULTI_LABEL, REGRESSION
from ..data.sources import ImageData
from ..modeling_refiner import RefinerForMaskedImageModeling
from ..utils.confusions import most_confused, scores_by_label
from ..utils.image_config import label_names_of
from ..utils.machine import device_name, versions
from ..utils.markdown import markdown_table, markdown_text
from ..utils.run_files import EMA_FOLDER, EMISSIONS_FILE, RUN_FILE
from ..utils.text import counted, name_some
from .architecture import describe_network
from .captions import MOST_NAMED_LABELS
from .card import CardContent, kind_of, refines, task_of
from .options import public_rows, training_rows
from .usage import CLASSIFICATION, usage_example


# By the name of an evaluation: the Hub's name, and the card's.
_METRICS = {
    "eval_accuracy": ("accuracy", "Top-1 accuracy"),
    "eval_top5_accuracy": ("top_5_accuracy", "Top-5 accuracy"),
    "eval_map": ("mAP", "Mean average precision"),
    "eval_f1_macro": ("f1", "Macro F1"),
    "eval_f1_micro": ("f1_micro", "Micro F1, at a score of 1/2"),
    "eval_accuracy_of_all": ("exact_match", "Images with all labels right"),
    "eval_mae": ("mae", "Mean absolute error"),
    "eval_rmse": ("rmse", "Root of the mean squared error"),
    "eval_r2": ("r_squared", "R squared"),
}
_NUMBERS = ("mae", "rmse", "r_squared", "r2")  # which aren't shares

_NETWORK_IN_CARD = (
    "drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "layerscale_value", "initializer_range",
    "dense_loss_weight", "dense_logits_weight", "token_mixing", "cosine_regularizer_weight", "batch_norm_momentum",
)  # fmt: skip


def training_content(
    trainer: Trainer,
    measured: dict[str, float],
    *,
    data: ImageData | None = None,
    arguments: dict[str, dict[str, Any]] | None = None,
    pictures: list[tuple[str, str]] | None = None,
    beside: dict[str, tuple[str, float]] | None = None,
    confusion_matrix: list[list[int]] | None = None,
) -> CardContent:
    """
    What a trained model's card says.

    Args:
        trainer: with the model as it is saved.
        measured: all measured numbers, named as the Trainer does.
        data: what it was trained and evaluated on, if it is known.
        arguments: a run's options by group (model, data, augmentation, training), if they are known.
        pictures: (file in the folder, caption).
        beside: by what they are, what other models reach on the same images: the metric's name and its value.
        confusion_matrix: of the evaluation, true labels down.
    """
    args, model, adapter = trainer.args, trainer.model, None
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapter = next(iter(model.peft_config.values()))
        model = model.get_base_model()
    name = Path(args.output_dir).resolve().name
    task, remote_code = task_of(model), getattr(args, "with_code", False)
    base = (arguments or {}).get("model", {}).get("model_name_or_path")
    source = f"by fine-tuning `{Path(base).name}`" if base else "from scratch" if arguments else "with the HF Trainer"
    kind = _kind(model, task)
    on = f" on {markdown_text(data.name)}" if data else ""
    metrics = {kind: (text, round(measured[key], 6)) for key, (kind, text) in _METRICS.items() if key in measured}
    emissions = _emissions(Path(args.output_dir)) if "train_runtime" in measured else None
    return CardContent(
        title=(args.hub_model_id or (f"refiner-{name}" if refines(model) else name)).split("/")[-1],
        summary=f"{kind_of(model)} {kind}, trained {source}{on}.{_adapts(adapter)}{_unfinished(trainer)}",
        refines=refines(model) or getattr(adapter, "peft_type", None) == "REFINEMENT",
        usage=usage_example(args.hub_model_id or name, remote_code, task, args.hub_revision, adapts=adapter and base),
        limits=_limits(data, model.config, "temperature" in measured) if task == CLASSIFICATION else _UNMEASURED,
        results=_results(trainer, measured, metrics, data, beside or {}),
        by_label=_by_label(confusion_matrix, label_names_of(model.config)) if confusion_matrix else "",
        pictures=pictures or [],
        architecture=describe_network(model),
        data=_data(trainer, data),
        training=_training(trainer, measured, arguments, emissions),
        metrics=metrics,
        dataset_name=data.name if data else None,
        dataset_id=data.hub_id if data else None,
        dataset_split=data.evaluation_split if data else None,
        license=getattr(args, "weights_license", None),
        base_model=base if base and not Path(base).exists() else None,
        remote_code=remote_code,
        task=task,
        co2=emissions
        and {
            "emissions": emissions["grams"],
            "source": "codecarbon",
            "training_type": "fine-tuning" if base else "pre-training",
            "geographical_location": emissions["country"],
            "hardware_used": emissions["hardware"],
        },
    )


def _kind(model: Any, task: str) -> str:
    """What the model does, as a sentence goes on with it."""
    if isinstance(model, RefinerForMaskedImageModeling):
        return "masked image model, which paints hidden patches from the others"
    if task != CLASSIFICATION:
        return "image model"
    names = label_names_of(model.config)
    if model.config.problem_type == REGRESSION:
        return f"image model that estimates a number ({markdown_text(names[0])})"
    several = ", any number of which a picture may have" if model.config.problem_type == MULTI_LABEL else ""
    return f"image classifier with {counted(len(names), 'label')}{several}"


def last_measured(trainer: Trainer) -> dict[str, float]:
    """What the Trainer's log says of the model as it is now: the numbers of its evaluation, and of the training."""
    state = trainer.state
    entries = state.log_history
    if trainer.args.load_best_model_at_end and not trainer.is_in_train and state.best_global_step:
        # The weights are those of the best evaluation, not of the last.
        entries = [
            e for e in entries if not any(k.startswith("eval_") for k in e) or e["step"] <= state.best_global_step
        ]
    return {key: value for entry in entries for key, value in entry.items() if key.startswith(("eval_", "train_"))}


def _adapts(adapter: Any) -> str:
    if adapter is None:
        return ""
    kind = {"REFINEMENT": "that refines attention maps"}.get(adapter.peft_type, f"({adapter.peft_type})")
    return f" This is a PEFT adapter {kind}, with a trained head; the base model's own weights didn't change."


def _unfinished(trainer: Trainer) -> str:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    return f" **Training is still going on: step {step} of {steps}.**" if step < steps and trainer.is_in_train else ""


def _results(
    trainer: Trainer,
    measured: dict[str, float],
    metrics: dict,
    data: ImageData | None,
    beside: dict[str, tuple[str, float]],
) -> str:
    if "eval_loss" not in measured:
        return ""
    rows = [(text, _shown(kind, value)) for kind, (text, value) in metrics.items()]
    for key, (kind, text) in _METRICS.items():
        if (averaged := measured.get(key.replace("eval_", "eval_ema_"))) is not None:
            rows.append((f"{text} of the averaged weights, in the folder `{EMA_FOLDER}`", _shown(kind, averaged)))
        if (on_test := measured.get(key.replace("eval_", "test_"))) is not None and data is not None:
            rows.append(
                (f"{text} on {_count(data.test, 'test image')}, measured once at the end", _shown(kind, on_test))
            )
    rows += [(markdown_text(name), _shown(metric, value)) for name, (metric, value) in beside.items()]
    if (error := measured.get("eval_calibration_error")) is not None:
        rows.append((f"Expected calibration error of the scores, in 15 bins{_divided(measured)}", f"{error:.2%}"))
    masked = isinstance(trainer.model, RefinerForMaskedImageModeling)
    name = "Mean absolute difference of the hidden pixels, in the scale of the processor" if masked else "Loss"
    rows.append((name, f"{measured['eval_loss']:.4f}"))
    if speed := measured.get("eval_samples_per_second"):
        rows.append(("Evaluation speed, reading images included", f"{speed:.1f} images/s on {device_name()}"))
    count = _count(data.evaluation if data else trainer.eval_dataset, "image")
    of = f" ({data.evaluation_split}) of {markdown_text(data.name)}" if data else ""
    return f"Measured on {count}{of}.\n\n" + markdown_table(["", ""], rows)


def _shown(metric: str, value: float) -> str:
    return f"{value:.4g}" if metric in _NUMBERS else f"{value:.2%}"


def _divided(measured: dict[str, float]) -> str:
    temperature = measured.get("temperature")
    return "" if temperature is None else f" (logits divided by {temperature:.3g}, fitted on the same images)"


def _by_label(counts: list[list[int]], labels: list[str]) -> str:
    names = [markdown_text(label) for label in labels]
    parts = []
    if len(labels) <= MOST_NAMED_LABELS:
        rows = [
            (name, f"{each.images:,}", *(f"{share:.2%}" for share in each[1:]))
            for name, each in zip(names, scores_by_label(counts))
        ]
        parts.append(markdown_table(["label", "images", "precision", "recall", "F1"], rows))
    pairs = [f"{names[i]} taken for {names[j]} ({n:,} of {sum(counts[i]):,})" for i, j, n in most_confused(counts)]
    if pairs:
        parts.append(f"Most often confused: {', '.join(pairs)}.")
    return "\n\n".join(parts)


def _data(trainer: Trainer, data: ImageData | None) -> str:
    if data is None:
        counts = [_count(trainer.train_dataset, "training image"), _count(trainer.eval_dataset, "evaluation image")]
        return f"{', '.join(counts)}. Which ones was not recorded."
    labels = [markdown_text(label) for label in label_names_of(trainer.model.config)]
    return (
        f"{markdown_text(data.name)}: {_count(data.train, 'training image')}, "
        f"{_count(data.evaluation, 'evaluation image')} ({data.evaluation_split}). Labels: {name_some(labels, 20)}."
    )


def _training(
    trainer: Trainer,
    measured: dict[str, float],
    arguments: dict[str, dict[str, Any]] | None,
    emissions: dict[str, Any] | None,
) -> str:
    args, config = trainer.args, trainer.model.config
    rows = training_rows(args) + public_rows(vars(config), [name for name in _NETWORK_IN_CARD if name in vars(config)])
    where = ""
    if arguments:
        rows += public_rows(arguments["augmentation"])
        rows += public_rows(arguments["data"], ("train_val_split", "max_train_samples"))
        where = f" The file `{RUN_FILE}` has more options."
    if hasattr(trainer.processing_class, "crop_pct"):
        rows += public_rows({"crop_pct (evaluation)": trainer.processing_class.crop_pct})
    duration = f" in {measured['train_runtime']:.0f} s" if "train_runtime" in measured else ""
    if speed := measured.get("train_samples_per_second"):
        duration += f" ({speed:.1f} images/s, evaluations and saving included)"
    if 0 < trainer.state.global_step < trainer.state.max_steps and not trainer.is_in_train:
        duration += f" of {trainer.state.max_steps:,}, where it was stopped early"
    processes = f"{args.world_size} processes, each on " if args.world_size > 1 else ""
    return (
        f"With `refiner_hf` and the Hugging Face Trainer: {counted(trainer.state.global_step, 'step')}{duration} on "
        f"{processes}{device_name()}; {versions()}.{_footprint(emissions)} Options that decide "
        f"what is learned, and aren't in this table, have their defaults.{where}\n\n"
        + markdown_table(["option", "value"], rows)
    )


def _emissions(folder: Path) -> dict[str, Any] | None:
    """What codecarbon (`--report_to codecarbon`) wrote about the last training in this folder."""
    path = folder / EMISSIONS_FILE
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    last = rows[-1]
    return {
        "grams": float(f"{1000 * float(last['emissions']):.3g}"),
        "kilowatt_hours": float(f"{float(last['energy_consumed']):.3g}"),
        "country": last["country_name"],
        "hardware": last["gpu_model"] or last["cpu_model"],
    }


def _footprint(emissions: dict[str, Any] | None) -> str:
    if emissions is None:
        return ""
    return (
        f" By codecarbon's estimate it took {emissions['kilowatt_hours']:g} kWh and emitted {emissions['grams']:g} g "
        f"of CO2 equivalent, with the electricity of {emissions['country']}, where codecarbon took the machine to be."
    )


def _limits(data: ImageData | None, config: PreTrainedConfig, calibrated: bool) -> str:
    known = markdown_text(data.name) if data else "the data above"
    scores = "are calibrated for pictures like these only" if calibrated else "have not been calibrated"
    knows = f"The model knows {counted(len(label_names_of(config)), 'label')} and gives every picture"
    answers = {
        MULTI_LABEL: f"{knows} a score for each, also pictures of something else.",
        REGRESSION: "The model gives every picture a number, also pictures of something else.",
    }
    said = answers.get(str(config.problem_type), f"{knows} one of them, also pictures of something else.")
    return (
        f"{said} It has been measured on {known} only; expect less on pictures of another kind, size or origin. Its "
        f"scores {scores}, and its behaviour on different groups of people or things has not been examined."
    )


_UNMEASURED = "What the features are good for has not been measured."


def _count(data, noun: str) -> str:
    """How many images a data set has; those of a stream aren't counted."""
    if data is None:
        return f"no {noun}s"
    return counted(len(data), noun) if hasattr(data, "__len__") else f"a stream of {noun}s"
