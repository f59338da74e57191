"""Model cards, from what is known of a model."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling_refiner import RefinerForImageClassification, RefinerPreTrainedModel
from ..utils.markdown import markdown_text
from .architecture import describe_network


CLASSIFICATION = "image-classification"
CODE_TAG = "custom_code"
TEMPLATE = Path(__file__).with_name("card_template.md")

CITATION = """@article{zhou2021refiner,
  title   = {Refiner: Refining Self-attention for Vision Transformers},
  author  = {Zhou, Daquan and Shi, Yujun and Kang, Bingyi and Yu, Weihao and Jiang, Zihang and Li, Yuan and
             Jin, Xiaojie and Hou, Qibin and Feng, Jiashi},
  journal = {arXiv preprint arXiv:2106.03714},
  year    = {2021}
}"""


@dataclass
class CardContent:
    """
    What a card says. Texts are Markdown; a section whose text is empty is left out.

    `metrics` maps a metric's type on the Hub ("accuracy") to a name and a measured value; together with the dataset
    they become the model-index. `pictures` are (file in the folder, caption). `co2` is the metadata's
    `co2_eq_emissions` ("emissions" in grams, and what more the Hub knows).
    """

    title: str
    summary: str
    usage: str
    limits: str
    results: str = ""
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
    co2: dict[str, Any] | None = None
    language: str | None = None
    tags: list[str] = field(default_factory=list)


def make_card(facts: CardContent) -> ModelCard:
    """
    The card of a model, with its metadata.

    Args:
        facts ([`CardContent`]): what it says.
    """
    results = [
        EvalResult(
            task_type=CLASSIFICATION,
            task_name="Image Classification",
            dataset_type=facts.dataset_id or _slug(facts.dataset_name),
            dataset_name=facts.dataset_name,
            dataset_split=facts.dataset_split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, (name, value) in facts.metrics.items()
        if facts.dataset_name  # without, a number says nothing
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=facts.task,
        license=facts.license,
        language=facts.language,
        tags=list(dict.fromkeys(["refiner", "vision", facts.task, *facts.tags, *[CODE_TAG] * facts.remote_code])),
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=sorted(facts.metrics) or None,
        base_model=facts.base_model,
        model_name=facts.title if results else None,
        eval_results=results or None,
        co2_eq_emissions=facts.co2,
    )
    text = {name: getattr(facts, name) for name in _TEXTS} | {"title": markdown_text(facts.title)}
    return ModelCard.from_template(data, template_path=str(TEMPLATE), citation=CITATION, **text)


_TEXTS = ("title", "summary", "usage", "limits", "results", "pictures", "architecture", "data", "training")


def basic_card(model: RefinerPreTrainedModel, name: str, base_model: str | None = None) -> ModelCard:
    """A card that says what a model (an adapter with its `base_model`) shows of itself, where there is no other."""
    task = task_of(model)
    adapts = f", as a PEFT adapter of `{base_model}`" if base_model else ""
    return make_card(
        CardContent(
            title=name.split("/")[-1],
            summary=f"A Refiner (`{type(model).__name__}`){adapts}.",
            usage=usage_example(name, False, task),
            architecture=describe_network(model),
            limits="How this model was trained, on what, and how well it does was not recorded when it was published. "
            "Ask whoever published it.",
            base_model=base_model,
            task=task,
        )
    )


def for_repository(card: ModelCard, repo_id: str, remote_code: bool, revision: str | None = None) -> ModelCard:
    """A card whose [`usage_example`] names the repository; other code in it, and anything else, stays."""

    def usage(found: re.Match) -> str:
        return f"```python\n{usage_example(repo_id, remote_code, found['task'], revision)}\n```"

    card = ModelCard(str(card))
    card.text = _USAGE.sub(usage, card.text)
    tags = [tag for tag in card.data.tags or [] if tag != CODE_TAG] + [CODE_TAG] * remote_code
    card.data.tags = tags or None
    return card


# Exactly what `usage_example` writes, for any name.
_USAGE = re.compile(
    r"```python\n(?:import refiner_hf  # registers the model\n)?from transformers import pipeline\n\n"
    r"(?P<verb>classify|features) = pipeline\(\"(?P<task>[\w-]+)\", model=\"[^\"]*\"(?:, revision=\"[^\"]*\")?"
    r"(?:, trust_remote_code=True)?\)\nprint\((?P=verb)\(\"photo\.jpg\", (?:top_k=5|pool=True)\)\)\n```"
)


def task_of(model: RefinerPreTrainedModel) -> str:
    """The pipeline that a model answers in: a classifier classifies, everything else gives features."""
    return CLASSIFICATION if isinstance(model, RefinerForImageClassification) else "image-feature-extraction"


def usage_example(name: str, remote_code: bool, task: str = CLASSIFICATION, revision: str | None = None) -> str:
    """A few lines of Python that give an image to `name`, a folder or Hub name, in the pipeline of `task`."""
    options = f', revision="{revision}"' if revision else ""
    options += ", trust_remote_code=True" if remote_code else ""
    verb, result = ("classify", "top_k=5") if task == CLASSIFICATION else ("features", "pool=True")
    return "\n".join(
        [
            *([] if remote_code else ["import refiner_hf  # registers the model"]),
            "from transformers import pipeline",
            "",
            f'{verb} = pipeline("{task}", model="{name}"{options})',
            f'print({verb}("photo.jpg", {result}))',
        ]
    )


def _slug(name: str | None) -> str:
    return "-".join((name or "unknown").lower().split())
