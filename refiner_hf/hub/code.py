"""The model's code beside its weights, for `trust_remote_code=True` where this package isn't installed."""

import json
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


def code_for(folder: str | Path) -> dict[str, bytes]:
    """
    The code's files for a saved model's folder, and its `config.json` and `preprocessor_config.json` with the code
    named in them for every Auto class. (`register_for_auto_class` would name the saved class alone.)

    Args:
        folder: holds `config.json` and, if images are prepared by this package, `preprocessor_config.json`.
    """
    files = {name: (PACKAGE / name).read_bytes() for name in CODE_FILES}
    for file, auto_map in (("config.json", AUTO_MAP), ("preprocessor_config.json", PROCESSOR_AUTO_MAP)):
        path = Path(folder) / file
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
            files[file] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
    return files


def without_code(folder: str | Path) -> dict[str, bytes]:
    """The folder's configurations that name code, without the names: fine-tuning a model with code keeps those."""
    files = {}
    for file in ("config.json", "preprocessor_config.json"):
        path = Path(folder) / file
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if content.pop("auto_map", None):
            files[file] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
    return files


def has_code(folder: str | Path) -> bool:
    """Whether a folder loads with its own code: it names code, and all of it is there."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return "auto_map" in config and all((Path(folder) / name).exists() for name in CODE_FILES)


def add_code(folder: str | Path) -> None:
    """Puts the files of [`code_for`] into the folder."""
    for name, content in code_for(folder).items():
        (Path(folder) / name).write_bytes(content)
