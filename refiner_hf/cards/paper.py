"""What was published with the paper (arXiv 2106.03714). Nothing here was measured with this package."""

from dataclasses import dataclass

from ..configuration_refiner import RefinerConfig
from ..utils.markdown import markdown_table


@dataclass(frozen=True)
class PublishedNetwork:
    """
    One of the paper's networks: `maker` is the method of [`RefinerConfig`] that gives it, `drop_path` is plain /
    token-labelled, `top1` is ImageNet-1k top-1 in % by image size.
    """

    name: str
    maker: str
    crop_pct: float
    drop_path: str
    top1: dict[int, str]

    def table(self) -> str:
        """The accuracies as a Markdown table that says whose they are."""
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
