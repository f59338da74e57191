# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""The code that a saved configuration names lies beside it, or isn't named."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


@contextmanager
def named_code_beside(configuration: Any, folder: str | Path) -> Iterator[None]:
    """
    While a configuration (of a model or of an image processor) is saved into `folder`, its `auto_map` names only what
    is there.

    Where the configuration was loaded with code from a repository or folder, `auto_map` names that code. If its class
    is of that code, the code is copied along; if it is this package's own, there is nothing to copy, and the names go.
    """
    named = vars(configuration).get("auto_map")
    if not named:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = type(configuration)
    module, registered = sys.modules[kind.__module__], kind._auto_class
    if module.__name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        for file in Path(module.__file__).parent.glob("*_refiner.py"):
            shutil.copyfile(file, folder / file.name)
        kind._auto_class = None  # transformers would name this class alone in place of all
    there = {auto_class: _there(names, folder) for auto_class, names in named.items()}
    there = {auto_class: names for auto_class, names in there.items() if names}
    if there:
        configuration.auto_map = there
    else:
        del configuration.auto_map
    try:
        yield
    finally:
        configuration.auto_map, kind._auto_class = named, registered


def _there(names: Any, folder: Path) -> Any:
    """What of "module.Class", or of a `dict` or list of such, has its module in `folder`."""
    if isinstance(names, dict):
        return {backend: there for backend, name in names.items() if (there := _there(name, folder))}
    if isinstance(names, (list, tuple)):
        return [there for name in names if (there := _there(name, folder))]
    name = (names or "").rpartition("--")[2]  # behind the name of the repository that it was loaded from
    return name if name and (folder / f"{name.split('.')[0]}.py").is_file() else None
