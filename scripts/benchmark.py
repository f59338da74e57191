"""Measure what a Refiner costs, beside its peers: `refiner-benchmark` from a checkout. See --help."""

from refiner_hf.commands.benchmark import main


if __name__ == "__main__":
    main()
