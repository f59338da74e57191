"""Measure what networks' maps and features are like, layer by layer: `refiner-analyze` from a checkout. See --help."""

from refiner_hf.commands.analyze import main


if __name__ == "__main__":
    main()
