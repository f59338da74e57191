"""`python -m refiner_hf COMMAND`: the same as `refiner COMMAND`."""

from .commands import main


if __name__ == "__main__":
    main()
