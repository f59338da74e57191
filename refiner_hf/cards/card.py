"""What a model card holds, and the card that is made of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..encoder_models_refiner import RefinedConfigMixin
from ..modeling_refiner import RefinerPreTrainedModel
from ..utils.markdown import markdown_text
from .architecture import describe_network
from .usage import CLASSIFICATION, CODE_TAG, usage_example


TEMPLATE = Path(__file__).with_name("card_template.md")


@dataclass
class CardContent:
    """
    What a card says. Texts are Markdown; a section with an empty text is left out.

    `metrics` maps a metric's type on the Hub ("accuracy") to its name and measured value; together with the dataset
    they become the model-index. `pictures` are pairs of a file in the folder and a caption. `refines` says whether the
    network refines its attention maps, which a card explains. `co2` is the metadata's `co2_eq_emissions` ("emissions"
    in grams, and what more the Hub knows).
    """

    title: str
    summary: str
    usage: str
    limits: str
    results: str = ""
    by_label: str = ""
    pictures: list[tuple[str, str]] = field(default_factory=list)
    architecture: str = ""
    data: str = ""
    training: str = ""
    metrics: dict[str, tuple[str, float]] = field(default_factory=dict)
    dataset_name: str | None = None
    dataset_id: str | None = None
    dataset_split: str | None = None
    license: str | None = None
    base_model: str | None = None
    remote_code: bool = False
    task: str = CLASSIFICATION
    refines: bool = True
    co2: dict[str, Any] | None = None
    language: str | None = None
    tags: list[str] = field(default_factory=list)


_TEXTS = ("title", "summary", "usage", "limits", "results", "by_label", "pictures", "architecture", "data", "training")


def make_card(content: CardContent) -> ModelCard:
    """The card of a model, with its metadata."""
    results = [
        EvalResult(
            task_type=CLASSIFICATION,
            task_name="Image Classification",
            dataset_type=content.dataset_id or _slug(content.dataset_name),
            dataset_name=content.dataset_name,
            dataset_split=content.dataset_split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, (name, value) in content.metrics.items()
        if content.dataset_name  # a number without its data says nothing
    ]
    tags = ["refiner"] * content.refines + ["vision"] * content.task.startswith("image")
    tags += [content.task, *content.tags, *[CODE_TAG] * content.remote_code]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=content.task,
        license=content.license,
        language=content.language,
        tags=list(dict.fromkeys(tags)),
        datasets=[content.dataset_id] if content.dataset_id else None,
        metrics=sorted(content.metrics) or None,
        base_model=content.base_model,
        model_name=content.title if results else None,
        eval_results=results or None,
        co2_eq_emissions=content.co2,
    )
    texts = {name: getattr(content, name) for name in _TEXTS} | {"title": markdown_text(content.title)}
    texts["refines"] = content.refines
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **texts)


def license_card(license: str) -> ModelCard:
    """A card with nothing but a license, which the Hub can be asked about before a training."""
    return make_card(CardContent(title="", summary="", usage="", limits="", license=license))


def basic_card(model: PreTrainedModel, name: str, base_model: str | None = None) -> ModelCard:
    """A card for a folder that has none: what the model itself shows. An adapter comes with its `base_model`."""
    task = task_of(model)
    adapts = f", as a PEFT adapter of `{base_model}`" if base_model else ""
    return make_card(
        CardContent(
            title=name.split("/")[-1],
            summary=f"{kind_of(model)} (`{type(model).__name__}`){adapts}.",
            refines=refines(model),
            usage=usage_example(name, False, task),
            architecture=describe_network(model),
            limits="How this model was trained, on which data, and how accurate it is was not recorded when it was "
            "published. Ask the person who published it.",
            base_model=base_model,
            task=task,
        )
    )


_TASKS = {
    "ForImageClassification": CLASSIFICATION,
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}


def task_of(model: PreTrainedModel) -> str:
    """The task of the pipeline for a model; one that doesn't classify gives features."""
    on_images = model.main_input_name == "pixel_values"
    found = (task for part, task in _TASKS.items() if part in type(model).__name__)
    return next(found, "image-feature-extraction" if on_images else "feature-extraction")


def refines(model: PreTrainedModel) -> bool:
    """Whether a model refines its attention maps."""
    return isinstance(model, RefinerPreTrainedModel) or isinstance(model.config, RefinedConfigMixin)


def kind_of(model: PreTrainedModel) -> str:
    """What a model is, as the beginning of a sentence."""
    if isinstance(model, RefinerPreTrainedModel):
        return "A Refiner"
    base = type(model).__name__.removeprefix("Refined").split("For")[0].removesuffix("Model")
    return f"A refined {base}" if refines(model) else f"{'An' if base[0] in 'AEIO' else 'A'} {base}"


def _slug(name: str | None) -> str:
    return "-".join((name or "unknown").lower().split())
