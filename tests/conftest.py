import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file


GOLDEN = Path(__file__).parent / "fixtures" / "golden"


class Golden:
    """One golden file: its tensors, and those under a prefix."""

    def __init__(self, name: str):
        path = GOLDEN / f"{name}.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.settings = {k: _parse(v) for k, v in (file.metadata() or {}).items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def _parse(value: str):
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return json.loads(value.lower()) if value.startswith("[") else value


@pytest.fixture(scope="session")
def golden():
    cache = {}
    return lambda name: cache.setdefault(name, Golden(name)) if name in cache else cache.setdefault(name, Golden(name))
