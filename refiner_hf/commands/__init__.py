"""
The command lines: parse, call, print. `scripts/` holds one file for each, for use in a checkout.

Here are the entry points of an installed package, which may lack what only training needs.
"""

import importlib
import sys


def _run(command: str, extra: str = "train") -> None:
    try:
        module = importlib.import_module(f".{command}", __name__)
    except ModuleNotFoundError as error:
        sys.exit(f"Error: this command needs {error.name}. Install it with: pip install 'refiner_hf[{extra}]'")
    except KeyboardInterrupt:  # importing takes seconds
        sys.exit(130)
    module.main()


def train() -> None:
    """`refiner-train`"""
    _run("train")


def convert() -> None:
    """`refiner-convert`"""
    _run("convert_checkpoint")


def refine_vit() -> None:
    """`refiner-refine-vit`"""
    _run("refine_vit")


def export() -> None:
    """`refiner-export`"""
    _run("export_onnx", "export")


def predict() -> None:
    """`refiner-predict`"""
    _run("predict")


def demo() -> None:
    """`refiner-demo`"""
    _run("demo")


def visualize() -> None:
    """`refiner-visualize`"""
    _run("visualize")


def analyze() -> None:
    """`refiner-analyze`"""
    _run("analyze")


def push() -> None:
    """`refiner-push`"""
    _run("push_to_hub")


def benchmark() -> None:
    """`refiner-benchmark`"""
    _run("benchmark")


def label_maps() -> None:
    """`refiner-label-maps`"""
    _run("make_label_maps")
