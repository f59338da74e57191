"""
Writes the cards of the published networks, S, M and L, from this package's own configurations.

The cards claim what is known: architectures that are built and counted here, and accuracies as published. No weights
come with them.

    python scripts/write_cards.py            # or: make cards
"""

import argparse
from pathlib import Path

import torch

from refiner_hf import RefinerConfig, RefinerForImageClassification
from refiner_hf.hub.card import CardFacts, describe_network, make_card, markdown_table


# ImageNet-1k top-1 in %, by image size, as published with arXiv 2106.03714; drop path plain / token-labelled.
PUBLISHED = {
    "small": ("S", "0.9", "0.1 / 0.2", {224: "83.6", 384: "84.6"}),
    "medium": ("M", "1.0", "0.2 / 0.25", {224: "84.6", 384: "85.6"}),
    "large": ("L", "1.13", "0.2 / 0.25", {224: "84.9", 384: "85.8", 448: "86.0 (also given as 85.9 and 86.03)"}),
}

USAGE = """from refiner_hf import RefinerConfig, RefinerForImageClassification

model = RefinerForImageClassification(RefinerConfig.{size}())  # random weights: train it, or convert a checkpoint"""


def card(size: str):
    letter, crop_pct, drop_path, accuracies = PUBLISHED[size]
    with torch.device("meta"):
        model = RefinerForImageClassification(getattr(RefinerConfig, size)())
    rows = [(f"{pixels} x {pixels}", accuracy) for pixels, accuracy in accuracies.items()]
    weights = (
        "Of the published networks only the weights of L at 448 pixels were ever released, by the paper's authors; "
        "they are not part of this package."
    )
    return make_card(
        CardFacts(
            title=f"Refiner-{letter}",
            summary=f"The architecture of Refiner-{letter} as `refiner_hf` builds it. **This card comes without "
            "weights.**",
            usage=USAGE.format(size=size),
            architecture=describe_network(model) + f"\n\nEvaluation crop: crop_pct {crop_pct}.",
            results="Top-1 accuracy on ImageNet-1k **as published** with the paper, in %. Nothing here was measured "
            "with this package.\n\n" + markdown_table(["image size", "published top-1"], rows),
            training="Published recipe: AdamW, weight decay 0.05, cosine schedule over 300 epochs with 5 of warm-up, "
            "RandAugment, random erasing, mixup, cutmix, label smoothing 0.1, averaged weights; optionally token "
            f"labels. Drop path {drop_path} (plain / token-labelled). It has not been run here. " + weights,
            limits="An untrained network classifies nothing. The published numbers hold for the authors' weights and "
            "data; whoever trains anew should measure anew and write a card of their own, as `refiner-train` does.",
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "model_cards")
    args = parser.parse_args()
    for size in PUBLISHED:
        card(size).save(args.output_dir / f"refiner-{size}.md")


if __name__ == "__main__":
    main()
