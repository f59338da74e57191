"""Convert a reference checkpoint: `refiner-convert` from a checkout. See --help."""

from refiner_hf.commands.convert_checkpoint import main


if __name__ == "__main__":
    main()
