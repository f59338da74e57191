"""Which attention modules of a model get a refinement, and of which kind; common to whole models and adapters."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..encoder_models_refiner import RefinedModelMixin, Sizes, is_loadable, refinement_config_of
from ..modeling_refiner import RefinerPreTrainedModel
from ..utils.errors import explain_errors
from ..utils.model_inputs import moved
from .probe import find_attention


def choose_modules(
    model: PreTrainedModel, inputs: Mapping[str, Any], layers: Iterable[int] | None
) -> dict[str, Sizes | None]:
    """
    Every attention module by name, with its sizes where it shall be refined, else with `None`.

    Args:
        model: runs once.
        inputs: a batch.
        layers: from 0; `None` for all.

    Raises:
        `ValueError`: there are none, or one that is chosen can't be refined, or isn't there.
    """
    found = find_attention(model, moved(model, inputs))
    if not found:
        raise ValueError(
            f"The attention of a {type(model).__name__} doesn't go through transformers' interface for attention "
            "functions, so its maps can't be refined."
        )
    there = range(len(found))
    chosen = set(there if layers is None else layers)
    if unknown := sorted(chosen - set(there)):
        raise ValueError(f"The model has the layers 0 to {len(found) - 1}, there is no layer {unknown[0]}.")
    for number, (name, seen) in enumerate(found.items()):
        if seen.obstacle is not None and number in chosen:
            raise ValueError(f"The maps of {name} can't be refined: {seen.obstacle}.")
    return {
        name: {"num_attention_heads": seen.heads, "hidden_size": seen.heads * seen.head_width}
        if number in chosen
        else None
        for number, (name, seen) in enumerate(found.items())
    }


def check_settings(settings: dict[str, Any]) -> None:
    """Raises a `ValueError` where there is no refinement with those fields of a [`RefinerConfig`]."""
    with explain_errors("There is no such refinement"):
        for sizes in settings["modules"].values():
            if sizes is not None:
                refinement_config_of(settings, sizes)


def check_loadable(model: PreTrainedModel) -> None:
    """Raises a `ValueError` where no Auto class could load a refined model of this one's class."""
    if not is_loadable(model):
        raise ValueError(
            f"No Auto class loads a {type(model).__name__}, so it couldn't be loaded again with its refinements. Take "
            "the class that AutoModel or an AutoModelFor... gives for it."
        )


def check_refinable(model: Any) -> None:
    """Raises a `ValueError` where a model isn't one of transformers', or whole, or is refined already."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"A {type(model).__name__} can't be refined: give a model of transformers.")
    if isinstance(model, RefinedModelMixin | RefinerPreTrainedModel):
        raise ValueError("The model is refined already.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Some of the model's weights are offloaded: load it whole, without a device_map.")


def detach(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Takes the refinements from attention modules, as far as they have any."""
    for module in map(model.get_submodule, modules):
        if hasattr(module, "refinement"):
            del module.refinement
