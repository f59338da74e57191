"""Model cards, from what is known of a model."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling_refiner import RefinerForImageClassification


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
    they become the model-index. `pictures` are (file in the folder, caption).
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


def make_card(facts: CardFacts) -> ModelCard:
    """
    The card of a model, with its metadata.

    Args:
        facts ([`CardFacts`]): what it says.
    """
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=facts.dataset_id or _slug(facts.dataset_name),
            dataset_name=facts.dataset_name,
            dataset_split=facts.dataset_split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, (name, value) in facts.metrics.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=facts.license,
        tags=["refiner", "vision", "image-classification"] + (["custom_code"] if facts.remote_code else []),
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=sorted(facts.metrics) or None,
        base_model=facts.base_model,
        model_name=facts.title if results else None,
        eval_results=results or None,
    )
    text = {name: getattr(facts, name) for name in _TEXTS}
    return ModelCard.from_template(data, template_path=str(TEMPLATE), citation=CITATION, **text)


_TEXTS = ("title", "summary", "usage", "limits", "results", "pictures", "architecture", "data", "training")


def describe_network(model: RefinerForImageClassification) -> str:
    """A table of a network's architecture and its number of parameters."""
    config = model.config
    types = {name: config.attention_types.count(name) for name in dict.fromkeys(config.attention_types)}
    height, width = config.image_height_width
    patch = " x ".join(map(str, config.patch_height_width))
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "images": f"{height} x {width} pixels, {config.num_channels} channels, patches of {patch}",
        "layers": f"{config.num_hidden_layers} ("
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in types.items())
        + ")",
        "width, MLP width": f"{config.hidden_size}, {config.intermediate_size}",
        "attention heads": str(config.num_attention_heads),
        "embedding": "convolutional stem" if config.use_conv_stem else "patch projection",
        "dense head": "yes" if config.use_dense_head else "no",
        "labels": str(config.num_labels),
    }
    if set(config.attention_types) != {"plain"}:
        rows["refinement"] = config.refinement.replace("_", " ")
        if config.refinement != "convolution":
            rows["refinement"] += f", expansion ratio {config.expansion_ratio}"
        if config.refinement != "expansion":
            rows["refinement"] += f", kernel {config.refinement_kernel_size} x {config.refinement_kernel_size}"
    return markdown_table(["", ""], rows.items())


def usage_example(model: str, remote_code: bool) -> str:
    """A few lines of Python that classify an image with `model`, a folder or Hub name."""
    load = "import refiner_hf  # registers the model" if not remote_code else ""
    trust = ", trust_remote_code=True" if remote_code else ""
    lines = [
        *([load] if load else []),
        "from transformers import pipeline",
        "",
        f'classify = pipeline("image-classification", model="{model}"{trust})',
        'print(classify("photo.jpg", top_k=5))',
    ]
    return "\n".join(lines)


def versions_and_machine() -> str:
    """One line on the software and the device of this process."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets"))
    return f"{device}; Python {platform.python_version()}, {packages}"


def markdown_table(head: list[str], rows: Any) -> str:
    """A Markdown table of rows of text."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines)


def _slug(name: str | None) -> str:
    return "-".join((name or "unknown").lower().split())
