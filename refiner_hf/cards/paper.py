"""The paper's networks and numbers (arXiv 2106.03714), and their cards. This package measured nothing of it."""

from dataclasses import dataclass

import torch
from huggingface_hub import ModelCard

from ..configuration_refiner import RefinerConfig
from ..modeling_refiner import RefinerForImageClassification
from ..utils.markdown import markdown_table
from .architecture import describe_network
from .card import CardContent, make_card


@dataclass(frozen=True)
class PublishedNetwork:
    """
    One of the paper's networks. `maker` is the method of [`RefinerConfig`] that gives it; `drop_path` is the rate
    without and with token labels; `top1` is top-1 accuracy on ImageNet-1k in %, by image size.
    """

    name: str
    maker: str
    crop_pct: float
    drop_path: str
    top1: dict[int, str]

    def table(self) -> str:
        """The accuracies as a Markdown table, which says where they come from."""
        rows = [(f"{pixels} x {pixels}", accuracy) for pixels, accuracy in self.top1.items()]
        return (
            "Top-1 accuracy on ImageNet-1k **as published** with the paper, in %. Nothing here was measured with this "
            "package.\n\n" + markdown_table(["image size", "published top-1"], rows)
        )


PUBLISHED = [
    PublishedNetwork("Refiner-S", "small", 0.9, "0.1 / 0.2", {224: "83.6", 384: "84.6"}),
    PublishedNetwork("Refiner-M", "medium", 1.0, "0.2 / 0.25", {224: "84.6", 384: "85.6"}),
    PublishedNetwork(
        "Refiner-L",
        "large",
        1.13,
        "0.2 / 0.25",
        {224: "84.9", 384: "85.8", 448: "86.0 (also given as 85.9 and 86.03)"},
    ),
]


def published_network(config: RefinerConfig) -> PublishedNetwork | None:
    """The paper's network that has this one's layers, width and heads."""
    for network in PUBLISHED:
        theirs = getattr(RefinerConfig, network.maker)()
        if all(
            getattr(config, field) == getattr(theirs, field)
            for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "attention_types")
        ):
            return network
    return None


_USAGE = """```python
from refiner_hf import RefinerConfig, RefinerForImageClassification

model = RefinerForImageClassification(RefinerConfig.{maker}())  # random weights: train it, or convert a checkpoint
```"""


def network_card(network: PublishedNetwork) -> ModelCard:
    """The card of one of the paper's networks, without weights."""
    with torch.device("meta"):
        model = RefinerForImageClassification(getattr(RefinerConfig, network.maker)())
    return make_card(
        CardContent(
            title=network.name,
            summary=f"The architecture of {network.name} in `refiner_hf`. **This card comes without weights.**",
            usage=_USAGE.format(maker=network.maker),
            architecture=describe_network(model) + f"\n\nEvaluation crop: crop_pct {network.crop_pct}.",
            results=network.table(),
            training="Published recipe: AdamW, weight decay 0.05, cosine schedule over 300 epochs with 5 epochs of "
            "warm-up, RandAugment, random erasing, mixup, cutmix, label smoothing 0.1, averaged weights; optionally "
            f"token labels. Drop path {network.drop_path} (without / with token labels). This package was not used to "
            "run it. The paper's authors released only the weights of L at 448 pixels; they are not part of this "
            "package.",
            limits="An untrained network can't classify. The published numbers hold for the authors' weights and "
            "data. If you train the network, measure it again and write a new card, as `refiner train` does.",
        )
    )
