"""The model's code beside its weights, for `trust_remote_code=True` where this package isn't installed."""

import json
import shutil
from pathlib import Path


PACKAGE = Path(__file__).parent.parent
# The flat files that the Auto classes need; they import each other only.
CODE_FILES = sorted(path.name for path in PACKAGE.glob("*_refiner.py"))

AUTO_MAP = {
    "AutoConfig": "configuration_refiner.RefinerConfig",
    "AutoModel": "modeling_refiner.RefinerModel",
    "AutoModelForImageClassification": "modeling_refiner.RefinerForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_refiner.RefinerForMaskedImageModeling",
    "AutoBackbone": "modeling_refiner.RefinerBackbone",
}
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_refiner.RefinerImageProcessor"}


def add_code(folder: str | Path) -> None:
    """
    Copies the code into a saved model's folder and names it in `config.json` and `preprocessor_config.json`, for
    every Auto class. (`register_for_auto_class` would
    name the saved class alone.)

    Args:
        folder: holds `config.json` and, if images are prepared by this package, `preprocessor_config.json`.
    """
    folder = Path(folder)
    for name in CODE_FILES:
        shutil.copyfile(PACKAGE / name, folder / name)
    for file, auto_map in (("config.json", AUTO_MAP), ("preprocessor_config.json", PROCESSOR_AUTO_MAP)):
        path = folder / file
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            content["auto_map"] = auto_map
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
