"""Draw what refinement does to attention: `refiner-show` from a checkout. See --help."""

from refiner_hf.commands.show_refinement import main


if __name__ == "__main__":
    main()
