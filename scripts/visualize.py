"""Draw where a network looks in a picture: `refiner-visualize` from a checkout. See --help."""

from refiner_hf.commands.visualize import main


if __name__ == "__main__":
    main()
