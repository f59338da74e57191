"""Which modules of a classifier are its head, and not the encoder."""

import copy
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel


def head_modules(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> list[str]:
    """
    The top modules that belong to the head.

    Args:
        config: of an image classifier.
        model (*optional*): the classifier, if there is one already.

    Raises:
        `ValueError`: it can't be told.
    """
    if model is None:
        model = _without_weights(config)
    body = model.base_model_prefix
    children = [name for name, _ in model.named_children()]
    if body in children:
        return [name for name in children if name != body]
    # Without one module for the encoder, as in SigLIP: what another number of labels changes.
    other: Any = copy.deepcopy(config)
    other.id2label = {number: str(number) for number in range(len(other.id2label) + 1)}
    shapes = {name: parameter.shape for name, parameter in _without_weights(other).named_parameters()}
    found = {name.split(".")[0] for name, each in model.named_parameters() if each.shape != shapes.get(name)}
    if not found or found == set(children):
        raise ValueError(f"It can't be told which part of a {type(model).__name__} is its head.")
    return [name for name in children if name in found]


def _without_weights(config: PreTrainedConfig) -> Any:
    if config.architectures is None:  # of several classes it says which
        config = copy.deepcopy(config)
        config.architectures = []
    with init_empty_weights():
        return AutoModelForImageClassification.from_config(config)
