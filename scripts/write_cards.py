"""
Writes the cards of the published networks, S, M and L, from this package's own configurations.

The cards claim what is known: architectures that are built and counted here, and accuracies as published. No weights
come with them.

    python scripts/write_cards.py            # or: make cards
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from refiner_hf import RefinerConfig, RefinerForImageClassification
from refiner_hf.cards.architecture import describe_network
from refiner_hf.cards.card import CardContent, make_card
from refiner_hf.cards.paper import PUBLISHED, PublishedNetwork


USAGE = """from refiner_hf import RefinerConfig, RefinerForImageClassification

model = RefinerForImageClassification(RefinerConfig.{size}())  # random weights: train it, or convert a checkpoint"""


def card(network: PublishedNetwork) -> ModelCard:
    with torch.device("meta"):
        model = RefinerForImageClassification(getattr(RefinerConfig, network.maker)())
    weights = (
        "Of the published networks only the weights of L at 448 pixels were ever released, by the paper's authors; "
        "they are not part of this package."
    )
    return make_card(
        CardContent(
            title=network.name,
            summary=f"The architecture of {network.name} as `refiner_hf` builds it. **This card comes without "
            "weights.**",
            usage=USAGE.format(size=network.maker),
            architecture=describe_network(model) + f"\n\nEvaluation crop: crop_pct {network.crop_pct}.",
            results=network.table(),
            training="Published recipe: AdamW, weight decay 0.05, cosine schedule over 300 epochs with 5 of warm-up, "
            "RandAugment, random erasing, mixup, cutmix, label smoothing 0.1, averaged weights; optionally token "
            f"labels. Drop path {network.drop_path} (plain / token-labelled). It has not been run here. " + weights,
            limits="An untrained network classifies nothing. The published numbers hold for the authors' weights and "
            "data; whoever trains anew should measure anew and write a card of their own, as `refiner train` does.",
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "model_cards")
    args = parser.parse_args()
    for network in PUBLISHED:
        card(network).save(args.output_dir / f"refiner-{network.maker}.md")


if __name__ == "__main__":
    main()
