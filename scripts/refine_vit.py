"""Make a Refiner of a trained ViT: `refiner-refine-vit` from a checkout. See --help."""

from refiner_hf.commands.refine_vit import main


if __name__ == "__main__":
    main()
