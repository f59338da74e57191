"""Hand a network pictures on a page in the browser: `refiner-demo` from a checkout. See --help."""

from refiner_hf.commands.demo import main


if __name__ == "__main__":
    main()
