"""The model's code beside its weights, for `trust_remote_code=True` where this package isn't installed."""

import json
from pathlib import Path
from typing import Any

from ..utils.files import read_json


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
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_refiner.RefinerImageProcessor",
        "pil": "image_processing_pil_refiner.RefinerImageProcessorPil",
    }
}
# The files that name the code.
_NAMING = {"config.json": AUTO_MAP, "preprocessor_config.json": PROCESSOR_AUTO_MAP}


def code_for(folder: str | Path) -> dict[str, bytes]:
    """
    The code's files for a saved model's folder, and its `config.json` and `preprocessor_config.json` with the code
    named in them for every Auto class. (`register_for_auto_class` would name the saved class alone.)

    Args:
        folder: holds `config.json` and, if images are prepared by this package, `preprocessor_config.json`.
    """
    files = {name: (PACKAGE / name).read_bytes() for name in CODE_FILES}
    configurations = _configurations(folder)
    prepared_by = configurations.get("preprocessor_config.json", {}).get("image_processor_type", "")
    if not prepared_by.startswith("RefinerImageProcessor"):  # a Refiner that was a ViT has the ViT's
        configurations.pop("preprocessor_config.json", None)
    named = {file: content | {"auto_map": _NAMING[file]} for file, content in configurations.items()}
    return files | {file: _to_bytes(content) for file, content in named.items()}


def without_code(folder: str | Path) -> dict[str, bytes]:
    """The folder's configurations that name code, without the names; for code that isn't there."""
    naming = {file: content for file, content in _configurations(folder).items() if content.pop("auto_map", None)}
    return {file: _to_bytes(content) for file, content in naming.items()}


def has_code(folder: str | Path) -> bool:
    """Whether a folder loads with its own code: it names code, and all of it is there."""
    config = _configurations(folder)["config.json"]
    return "auto_map" in config and all((Path(folder) / name).exists() for name in CODE_FILES)


def add_code(folder: str | Path) -> None:
    """Puts the files of [`code_for`] into the folder."""
    for name, content in code_for(folder).items():
        (Path(folder) / name).write_bytes(content)


def _configurations(folder: str | Path) -> dict[str, dict[str, Any]]:
    paths = [Path(folder) / file for file in _NAMING]
    return {path.name: read_json(path) for path in paths if path.exists()}


def _to_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
