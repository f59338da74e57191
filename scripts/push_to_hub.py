"""Publish a finished folder on the Hub: `refiner-push` from a checkout. See --help."""

from refiner_hf.commands.push_to_hub import main


if __name__ == "__main__":
    main()
