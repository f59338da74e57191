"""Whether weights are those of a network: all there, none left over, of its shapes, and finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .errors import explain_errors
from .text import counted, name_some


NAMED = 3  # tensors in an error


def shapes_in(files: list[Path]) -> list[tuple[int, ...]]:
    """
    The shapes of all tensors in safetensors files.

    Raises:
        `ValueError`: a file is damaged.
    """
    shapes: list[tuple[int, ...]] = []
    for file in files:
        with explain_errors(f"The weights in {file} are damaged"), safe_open(file, "pt") as tensors:
            shapes += [tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    return shapes


def check_sizes(config: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    """
    What can be seen without building a network. Every layer has some tensor, and every label a row in one.

    Raises:
        `ValueError`: the weights, if there are any, are another network's than the configuration's.
    """
    if not shapes:
        return
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(shapes):
        raise ValueError(
            f"it has {counted(layers, 'layer')}, but there are only {counted(len(shapes), 'weight tensor')}."
        )
    labels = config.get("id2label") or range(0)
    most = max(max(shape, default=0) for shape in shapes)
    if "ForImageClassification" in str(config.get("architectures")) and len(labels) > most:
        raise ValueError(f"it names {len(labels):,} labels, but no weight tensor has as many rows.")


def check_tensors(
    name: str,
    model: PreTrainedModel,
    loading: dict[str, Any],
    may_lack: Callable[[str], bool],
    may_have: Callable[[str], bool],
    may_differ: Callable[[str], bool],
) -> None:
    """
    Args:
        name (`str`): of the weights, for an error.
        model (`PreTrainedModel`): the network that they were loaded into.
        loading (`dict`): transformers' loading information.
        may_lack, may_have, may_differ (`Callable`): whether a tensor of this name may be missing, left over, or of
            another shape.

    Raises:
        `ValueError`: tensors are missing, left over or misshapen; the message names them.
    """
    # A base model is often loaded from a file with a head. The head's tensors are unexpected, but outside of the base.
    own = {key.split(".")[0] for key in model.state_dict()}
    is_base, prefix = model.base_model is model, f"{model.base_model_prefix}."
    unexpected = [
        key for key in loading["unexpected_keys"] if not is_base or key.removeprefix(prefix).split(".")[0] in own
    ]
    # Many published classifiers have a pooler, which they never use.
    unexpected = [key for key in unexpected if "pooler." not in key and not may_have(key)]
    misshapen = [key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]]
    problems = {
        "lack": [key for key in loading["missing_keys"] if not may_lack(key)],
        "have tensors that don't belong to the network:": unexpected,
        "have another shape than the network's in": [key for key in misshapen if not may_differ(key)],
    }
    told = [f"{what} {name_some(sorted(keys), NAMED)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(
            f"The weights of {name} don't fit its network ({type(model).__name__}): they {'; they '.join(told)}. "
            "Is the folder complete? If a head was never trained, fine-tune the model first."
        )


def check_finite(name: str, model: PreTrainedModel) -> None:
    """
    Raises:
        `ValueError`: a weight is NaN or infinite.
    """
    for key, tensor in model.state_dict().items():
        # Quantized weights are of classes of their own, which needn't know this.
        plain = type(tensor) is torch.Tensor and tensor.is_floating_point() and not tensor.is_meta
        if plain and not tensor.isfinite().all():
            raise ValueError(f"The weights of {name} hold NaN or infinity in {key}: its training broke.")
