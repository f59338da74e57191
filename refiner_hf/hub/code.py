"""The model's code beside its weights, for `trust_remote_code=True` where this package isn't installed."""

import json
import re
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from ..utils.files import read_json


PACKAGE = Path(__file__).parent.parent

AUTO_MAP = {
    "AutoConfig": "configuration_refiner.RefinerConfig",
    "AutoModel": "modeling_refiner.RefinerModel",
    "AutoModelForImageClassification": "modeling_refiner.RefinerForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_refiner.RefinerForMaskedImageModeling",
    "AutoBackbone": "modeling_refiner.RefinerBackbone",
}
# A refined model of transformers: the configuration's class knows those of the models.
REFINED_AUTO_MAP = {"AutoConfig": "encoder_configuration_refiner.RefinedConfig"}
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_refiner.RefinerImageProcessor",
        "pil": "image_processing_pil_refiner.RefinerImageProcessorPil",
    }
}


def _files_of(*auto_maps: dict[str, Any]) -> list[str]:
    """The flat files in which the named classes are, with those that they import."""
    modules = {name for each in auto_maps for name in re.findall(r"(\w+_refiner)\.", str(each))}
    entries = [PACKAGE / f"{module}.py" for module in modules]
    found = {*entries, *(Path(file) for entry in entries for file in get_relative_import_files(entry))}
    return sorted(path.name for path in found)


CODE_FILES = _files_of(AUTO_MAP, PROCESSOR_AUTO_MAP)
REFINED_CODE_FILES = _files_of(REFINED_AUTO_MAP)
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"


def code_for(folder: str | Path) -> dict[str, bytes]:
    """
    The code's files for a saved model's folder, and its `config.json` and `preprocessor_config.json` with the code
    named in them for every Auto class. (`register_for_auto_class` would name the saved class alone.)

    Args:
        folder: holds `config.json` and, if images are prepared by this package, `preprocessor_config.json`.
    """
    configurations = _configurations(folder)
    config, processor = configurations[_CONFIG], configurations.get(_PROCESSOR, {})
    files = {name: (PACKAGE / name).read_bytes() for name in _code_files(config)}
    config["auto_map"] = REFINED_AUTO_MAP if _is_refined(config) else AUTO_MAP
    if processor.get("image_processor_type", "").startswith("RefinerImageProcessor"):
        processor["auto_map"] = PROCESSOR_AUTO_MAP
    return files | {file: _to_bytes(content) for file, content in configurations.items() if "auto_map" in content}


def without_code(folder: str | Path) -> dict[str, bytes]:
    """The folder's configurations that name code, without the names; for code that isn't there."""
    naming = {file: content for file, content in _configurations(folder).items() if content.pop("auto_map", None)}
    return {file: _to_bytes(content) for file, content in naming.items()}


def has_code(folder: str | Path) -> bool:
    """Whether a folder loads with its own code: it names code, and all of it is there."""
    config = _configurations(folder)[_CONFIG]
    return "auto_map" in config and all((Path(folder) / name).exists() for name in _code_files(config))


def add_code(folder: str | Path) -> None:
    """Puts the files of [`code_for`] into the folder."""
    for name, content in code_for(folder).items():
        (Path(folder) / name).write_bytes(content)


def _is_refined(config: dict[str, Any]) -> bool:
    return config["model_type"] == "refined"


def _code_files(config: dict[str, Any]) -> list[str]:
    return REFINED_CODE_FILES if _is_refined(config) else CODE_FILES


def _configurations(folder: str | Path) -> dict[str, dict[str, Any]]:
    paths = [Path(folder) / file for file in (_CONFIG, _PROCESSOR)]
    return {path.name: read_json(path) for path in paths if path.exists()}


def _to_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
