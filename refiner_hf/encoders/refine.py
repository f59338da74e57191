"""
Any encoder of transformers, refined in place, so that it starts as the same function.

A refinement starts as the identity up to its output norm, whose weight and bias undo its own statistics. As no map
changes, the statistics of all layers can be measured at once: a pass over the inputs for each norm of a refinement.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention_refiner import RefinerMapRefinement
from ..configuration_refiner import RefinerConfig
from ..normalization_refiner import RefinerBatchNorm2d, combine_moments
from ..utils.errors import explain_errors
from ..utils.identity_start import start_as_identity
from ..utils.modes import in_evaluation
from .attention import SeenAttention, find_attention
from .models import RefinedModelMixin, become_refined, is_loadable


Inputs = Mapping[str, Any]


def refine(
    model: PreTrainedModel,
    inputs: Inputs | Iterable[Inputs],
    *,
    layers: Iterable[int] | None = None,
    refinement: str = "expansion_convolution",
    expansion_ratio: int = 3,
    refinement_kernel_size: int = 3,
) -> PreTrainedModel:
    """
    Refines the attention maps of an encoder, in place. In evaluation the model then gives what it gave before; its
    refinements are ready to be trained, with the rest or alone. `save_pretrained`, `push_to_hub` and the Trainer's
    checkpoints hold it whole, and the Auto classes load it again in a process that has imported `refiner_hf`.

    Args:
        model (`PreTrainedModel`): an encoder of transformers for images or texts, with any head or none, whose
            attention goes through transformers' interface: ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP's vision model,
            BEiT, BERT, RoBERTa, ELECTRA, DistilBERT, ModernBERT and others.
        inputs (`dict`, or several): what a processor or tokenizer makes of some dozens of examples like those that it
            will be trained on, with padding where they are texts. The norms take their statistics from them.
        layers (`Iterable[int]`, *optional*): which layers refine their map, from 0. Default: all.
        refinement, expansion_ratio, refinement_kernel_size (*optional*): as in [`RefinerConfig`].

    Returns:
        `model`, whose class is now a refined one.

    Raises:
        `ValueError`: attention that can't be refined (a decoder's, or cross attention; the message says which and
            why), a model that doesn't go through the interface, layers that aren't there, no inputs, or maps that
            aren't finite. The model is then as it was.

    Example:

    ```python
    >>> from refiner_hf import refine

    >>> model = refine(model, tokenizer(texts, padding=True, return_tensors="pt"))
    ```"""
    _check_model(model)
    batches = [{**batch} for batch in ([inputs] if isinstance(inputs, Mapping) else inputs)]
    if not batches:
        raise ValueError("There are no inputs to take the norms' statistics from.")
    batches = [{name: _on(model, value) for name, value in batch.items() if name != "labels"} for batch in batches]
    found = find_attention(model, batches[0])
    if not found:
        raise ValueError(
            f"The attention of a {type(model).__name__} doesn't go through transformers' interface for attention "
            "functions, so its maps can't be refined."
        )
    chosen = set(range(len(found)) if layers is None else layers)
    if unknown := sorted(chosen - set(range(len(found)))):
        raise ValueError(f"The model has the layers 0 to {len(found) - 1}, there is no layer {unknown[0]}.")
    for number, (name, seen) in enumerate(found.items()):
        if seen.obstacle is not None and number in chosen:
            raise ValueError(f"The maps of {name} can't be refined: {seen.obstacle}.")

    settings = {
        "refinement": refinement,
        "expansion_ratio": expansion_ratio,
        "refinement_kernel_size": refinement_kernel_size,
        "modules": {
            name: seen.heads if number in chosen else None for number, (name, seen) in enumerate(found.items())
        },
    }
    heads = next(iter(found.values())).heads
    with explain_errors("There is no such refinement"):
        RefinerConfig(
            hidden_size=heads,
            num_attention_heads=heads,
            refinement=refinement,
            expansion_ratio=expansion_ratio,
            refinement_kernel_size=refinement_kernel_size,
        )
    config = type(model.config)
    before = type(model), config, model.config._attn_implementation
    try:
        _start_as_identity(model, become_refined(model, settings), batches)
    except BaseException:
        _restore(model, found, *before)
        raise
    return model


def _restore(
    model: PreTrainedModel,
    found: dict[str, SeenAttention],
    kind: type[PreTrainedModel],
    config: type[PreTrainedConfig],
    attention: str,
) -> None:
    """Makes the model what it was before."""
    for seen in found.values():
        if hasattr(seen.module, "refinement"):
            del seen.module.refinement
    model.__class__, model.config.__class__ = kind, config
    vars(model.config).pop("refinement_config", None)
    model.set_attn_implementation(attention)


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"A {type(model).__name__} can't be refined: give a model of transformers.")
    if isinstance(model, RefinedModelMixin) or any(isinstance(m, RefinerMapRefinement) for m in model.modules()):
        raise ValueError("The model is refined already.")
    if not is_loadable(model):
        raise ValueError(
            f"No Auto class loads a {type(model).__name__}, so it couldn't be loaded again with its refinements. Take "
            "the class that AutoModel or an AutoModelFor... gives for it."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Some of the model's weights are offloaded: load it whole, without a device_map.")


def _on(model: PreTrainedModel, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _start_as_identity(
    model: PreTrainedModel, refinements: list[RefinerMapRefinement], batches: list[dict[str, Any]]
) -> None:
    def measure() -> None:
        # In the order in which they run, so that each sees what the ones before it make of all inputs.
        norms = ([m for m in r.modules() if isinstance(m, RefinerBatchNorm2d)] for r in refinements)
        for together in zip(*norms, strict=True):
            _measure(model, list(together), batches)

    with in_evaluation(model):
        start_as_identity(refinements, measure, "inputs")


def _measure(model: PreTrainedModel, norms: list[Any], batches: list[dict[str, Any]]) -> None:
    """Sets the running statistics of one norm of each refinement to those of all batches together."""
    moments: dict[Any, list[tuple[torch.Tensor, ...]]] = {norm: [] for norm in norms}

    def note(norm: RefinerBatchNorm2d, arguments: tuple) -> None:
        values, mask = arguments[0].double(), arguments[1] if len(arguments) > 1 else None
        values = values.transpose(0, 1).flatten(1)
        if mask is not None:
            values = values[:, mask.flatten()]
        mean = values.mean(1)
        scatter = (values - mean[:, None]).square().sum(1)
        moments[norm].append((mean.new_tensor(values.shape[1]), mean, scatter))

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, parts in moments.items():
        counts, means, scatters = (torch.stack(each) for each in zip(*parts))
        count, mean, _, scatter = combine_moments(counts, means, means, scatters)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(scatter / (count - 1).clamp(min=1))
