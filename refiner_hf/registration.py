# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Makes this package's classes known to transformers' Auto classes and to PEFT, without importing either.

Both have tables of classes. Whoever only wants `--help` or a configuration doesn't need them, and importing them with
what we put into them takes seconds. So a table is filled right after its module was imported, whoever imports it.
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version as version_of
from types import ModuleType
from typing import Any

from packaging.version import Version


def _configurations() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration_refiner import RefinerConfig
    from .encoder_configuration_refiner import RefinedConfig

    AutoConfig.register("refiner", RefinerConfig)
    AutoConfig.register("refined", RefinedConfig)


def _models() -> None:
    from transformers.models.auto import modeling_auto

    from . import encoder_models_refiner  # noqa: F401  (it makes a classifier of DINOv3 known)
    from .configuration_refiner import RefinerConfig
    from .modeling_refiner import (
        RefinerBackbone,
        RefinerForImageClassification,
        RefinerForMaskedImageModeling,
        RefinerModel,
    )

    modeling_auto.AutoModel.register(RefinerConfig, RefinerModel)
    modeling_auto.AutoModelForImageClassification.register(RefinerConfig, RefinerForImageClassification)
    modeling_auto.AutoModelForMaskedImageModeling.register(RefinerConfig, RefinerForMaskedImageModeling)
    modeling_auto.AutoBackbone.register(RefinerConfig, RefinerBackbone)


def _image_processors() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from .configuration_refiner import RefinerConfig
    from .image_processing_pil_refiner import RefinerImageProcessorPil
    from .image_processing_refiner import RefinerImageProcessor

    AutoImageProcessor.register(
        RefinerConfig,
        image_processor_classes={"torchvision": RefinerImageProcessor, "pil": RefinerImageProcessorPil},
    )


def _adapters() -> None:
    if Version(version_of("peft")) >= Version("0.21"):
        from .encoders import adapter  # noqa: F401


# Modules with tables, and what fills them; those that are imported but not filled yet are `_waiting`.
_TABLES: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _configurations,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.models.auto.image_processing_auto": _image_processors,
    "peft": _adapters,
}
_waiting: list[str] = []
_importing: list[str] = []  # modules of this package that aren't whole yet


def register() -> None:
    """Fills the tables that are there, and sees to it that the others are filled when they are imported."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):  # the package may be reloaded
        sys.meta_path.insert(0, _Watch())
    _waiting.extend(name for name in _TABLES if name in sys.modules)
    _fill()


def _fill() -> None:
    """Not while a module of ours is half imported, which filling might need."""
    while _waiting and not _importing:
        _TABLES[_waiting.pop(0)]()


class _Watch(MetaPathFinder):
    """Lets the usual finders find a module, and sees when it is whole."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_ours = fullname.startswith(f"{__package__}.")
        if not is_ours and fullname not in _TABLES:
            return None
        after = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((found for each in after if (found := each.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = copy(spec.loader)  # some load several modules
            spec.loader, execute = loader, loader.exec_module

            def exec_module(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)  # its class's is there again
                if is_ours:
                    _importing.append(fullname)
                try:
                    execute(module)
                finally:
                    if is_ours:
                        _importing.remove(fullname)
                if not is_ours:
                    _waiting.append(fullname)
                _fill()

            loader.exec_module = exec_module
        return spec
