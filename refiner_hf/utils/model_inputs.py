"""What a model takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


Inputs = Mapping[str, Any]


def moved(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Inputs on a model's device, and those of floating point numbers in its type."""
    like = next(model.parameters())

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}
