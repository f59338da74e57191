"""
Any encoder of transformers, refined in place, so that it starts as the same function.

A refinement starts as the identity up to its output norm, whose weight and bias undo its own statistics. As no map
changes, the statistics of all layers can be measured at once: a pass over the inputs for each norm of a refinement.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..encoder_models_refiner import become_refined
from .identity_start import start_as_identity
from .inputs import Inputs, batches_of
from .modules import check_loadable, check_refinable, check_settings, choose_modules, detach


def refine(
    model: PreTrainedModel,
    inputs: Inputs | Iterable[Inputs],
    processing_class: Any = None,
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
        inputs (`dict`, or several, or a `Dataset`): what a processor or tokenizer makes of some dozens of examples
            like those that it will be trained on, with padding where they are texts. The norms take their statistics
            from them. Or a data set, with `processing_class`.
        processing_class (*optional*): the image processor or tokenizer of a data set with a column of pictures, or
            with one of texts or a pair.
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

    >>> model = refine(model, dataset["train"], tokenizer)
    ```"""
    check_refinable(model)
    check_loadable(model)
    batches = batches_of(model, inputs, processing_class)
    settings = {
        "refinement": refinement,
        "expansion_ratio": expansion_ratio,
        "refinement_kernel_size": refinement_kernel_size,
        "modules": choose_modules(model, batches[0], layers),
    }
    check_settings(settings)
    before = type(model), type(model.config), model.config._attn_implementation
    names = vars(model).get("_weight_conversions")
    try:
        start_as_identity(model, become_refined(model, settings), batches)
    except BaseException:
        _restore(model, *before)
        model.__dict__["_weight_conversions"] = names
        raise
    return model


def _restore(
    model: PreTrainedModel, kind: type[PreTrainedModel], config: type[PreTrainedConfig], attention: str
) -> None:
    """Makes the model what it was before."""
    detach(model, model.config.refinement_config["modules"])
    model.__class__, model.config.__class__ = kind, config
    vars(model.config).pop("refinement_config", None)
    model.set_attn_implementation(attention)
