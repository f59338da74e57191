"""
Writes the cards of the published networks, S, M and L, from this package's own configurations.

    python scripts/write_cards.py            # or: make cards
"""

import argparse
from pathlib import Path

from refiner_hf.cards.paper import PUBLISHED, network_card


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "model_cards")
    args = parser.parse_args()
    for network in PUBLISHED:
        network_card(network).save(args.output_dir / f"refiner-{network.maker}.md")


if __name__ == "__main__":
    main()
