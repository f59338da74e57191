"""Train, fine-tune or evaluate a Refiner: `refiner train` from a checkout. See --help."""

from refiner_hf.commands.train import main


if __name__ == "__main__":
    main()
