"""Model cards, from what is known of a model."""

import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.flop_counter import FlopCounterMode

from ..modeling_refiner import RefinerForImageClassification, RefinerPreTrainedModel
from ..utils.text import markdown_text


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
class CardFacts:
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


def make_card(facts: CardFacts) -> ModelCard:
    """
    The card of a model, with its metadata.

    Args:
        facts ([`CardFacts`]): what it says.
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
        CardFacts(
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


def count_flops(model: RefinerPreTrainedModel) -> int:
    """Floating-point operations for one image of the model's own size in evaluation, 2 per multiply-add."""
    config = model.config
    with torch.device("meta"):
        shapes_only = type(model)(config).eval()
        image = torch.empty(1, config.num_channels, *config.image_height_width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes_only(image)
    return counter.get_total_flops()


def describe_network(model: RefinerPreTrainedModel) -> str:
    """A table of a network's architecture, its number of parameters and its cost."""
    config = model.config
    types = {name: config.attention_types.count(name) for name in dict.fromkeys(config.attention_types)}
    height, width = config.image_height_width
    patch = " x ".join(map(str, config.patch_height_width))
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "cost of an image": f"{_giga(count_flops(model))} GFLOP (2 per multiply-add)",
        "images": f"{height} x {width} pixels, {config.num_channels} channels, patches of {patch}",
        "layers": f"{config.num_hidden_layers} ("
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in types.items())
        + ")",
        "width, MLP width": f"{config.hidden_size}, {config.intermediate_size}",
        "attention heads": str(config.num_attention_heads),
        "embedding": "convolutional stem" if config.use_conv_stem else "patch projection",
    }
    if isinstance(model, RefinerForImageClassification):
        rows |= {"dense head": "yes" if config.use_dense_head else "no", "labels": str(config.num_labels)}
    if set(config.attention_types) != {"plain"}:
        rows["refinement"] = config.refinement.replace("_", " ")
        if config.refinement != "convolution":
            rows["refinement"] += f", expansion ratio {config.expansion_ratio}"
        if config.refinement != "expansion":
            rows["refinement"] += f", kernel {config.refinement_kernel_size} x {config.refinement_kernel_size}"
    return markdown_table(["", ""], rows.items())


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


def device_name(device: str | None = None) -> str:
    """What this process computes on: `device` ("cpu" or "cuda"), by default CUDA where there is some."""
    if device != "cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"CPU ({_cpu_name()}, {threads} thread{'s' * (threads > 1)})"


def versions() -> str:
    """The versions of Python and of what computes."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))
    return f"Python {platform.python_version()}, {packages}"


def markdown_table(head: list[str], rows: Any) -> str:
    """A Markdown table of rows of text."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines)


def _giga(number: float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e11 else f"{number / 1e9:.0f}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _slug(name: str | None) -> str:
    return "-".join((name or "unknown").lower().split())
