"""Write an ONNX graph: `refiner-export` from a checkout. See --help."""

from refiner_hf.commands.export_onnx import main


if __name__ == "__main__":
    main()
