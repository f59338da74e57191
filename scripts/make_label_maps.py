"""Make label maps for token labelling: `refiner-label-maps` from a checkout. See --help."""

from refiner_hf.commands.make_label_maps import main


if __name__ == "__main__":
    main()
