"""`refiner train` as a file, which torchrun and accelerate can start."""

from refiner_hf.commands.train import main


if __name__ == "__main__":
    main()
