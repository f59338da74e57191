"""Write a classifier's answers to many pictures into a table: `refiner-predict` from a checkout. See --help."""

from refiner_hf.commands.predict import main


if __name__ == "__main__":
    main()
