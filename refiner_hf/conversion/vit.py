"""
A trained ViT or DeiT to a Refiner that starts as the same function.

A refined layer computes `output_norm(reduction_norm(W3 h) + A)` of its map A (section 3 of the paper). It starts as A
itself: the reduction's norm has weight and bias 0, so that the branch is silent and learns from there, and the output
norm's weight and bias undo its own statistics, measured on real images. In training the batch's statistics take their
place, which are nearly the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..attention_refiner import RefinerMapRefinement
from ..configuration_refiner import RefinerConfig
from ..modeling_refiner import RefinerForImageClassification
from ..utils.identity_start import start_as_identity
from ..utils.loading import load_classifier, load_config
from ..utils.model_source import Source, find_source
from ..utils.norm_statistics import reestimate_norm_statistics
from .weights import check_tensors


logger = logging.get_logger(__name__)

REFINABLE = ("vit", "deit")
_NOISE_IMAGES = 16
# Fields that mean the same in both configurations.
_SAME_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "id2label", "label2id", "problem_type",
)  # fmt: skip


def refine_vit(
    model_or_path: PreTrainedModel | str,
    images: torch.Tensor | Iterable[torch.Tensor] | None = None,
    *,
    attention_types: list[str] | None = None,
    refinement: str = "expansion_convolution",
    expansion_ratio: int = 3,
    refinement_kernel_size: int = 3,
) -> RefinerForImageClassification:
    """
    Turns an image classifier with plain attention into a Refiner that gives the same logits in evaluation, ready to be
    fine-tuned. Everything that the two have in common is copied; new are the refinements, which start as the
    identity, and a layer scale of ones.

    Args:
        model_or_path (`PreTrainedModel` or `str`): a `ViTForImageClassification`, `DeiTForImageClassification` or
            `DeiTForImageClassificationWithTeacher` of transformers, which stays as it is, or the folder or Hub name
            of one.
        images (`torch.Tensor` of shape (B, C, height, width), or several of them, *optional*): some dozens of
            pictures as the model's own image processor prepares them. The norms take their statistics from them, so
            that the refinement is near the identity in training as well. Without, noise is taken, with a warning.
        attention_types (`list[str]`, *optional*): `"refined"` or `"plain"` for each layer. Default: all refined.
        refinement, expansion_ratio, refinement_kernel_size (*optional*): as in [`RefinerConfig`].

    Returns:
        [`RefinerForImageClassification`]: in evaluation mode, in float32, on the model's device.

    Raises:
        `ValueError`: neither a ViT nor a DeiT, one without a trained classifier, a layer that shares its map with
            another, or images that don't fit the model.
        `StrictDataclassError` (of `huggingface_hub.errors`): sizes that make no Refiner.
        `OSError`: there is no such model.

    Example:

    ```python
    >>> from refiner_hf import refine_vit

    >>> model = refine_vit("google/vit-base-patch16-224", images=pixel_values)
    ```"""
    if "shared_refined" in (attention_types or ()):
        raise ValueError(
            "A 'shared_refined' layer has no map of its own, so it can't start as the layer of another model: choose "
            "'refined' or 'plain' for each."
        )
    source = load_refinable(find_source(model_or_path)) if isinstance(model_or_path, str) else model_or_path
    tensors = _renamed(source)
    config = _refiner_config(
        source.config,
        tensors,
        attention_types=attention_types or ["refined"] * source.config.num_hidden_layers,
        refinement=refinement,
        expansion_ratio=expansion_ratio,
        refinement_kernel_size=refinement_kernel_size,
    )
    refiner = RefinerForImageClassification(config)
    own = refiner.state_dict()
    check_tensors(
        tensors, {name: own[name] for name in own if ".refinement." not in name and "layer_scale" not in name}
    )
    refiner.load_state_dict(own | tensors)
    refiner.to(source.device).eval()
    refinements = [module for module in refiner.modules() if isinstance(module, RefinerMapRefinement)]

    def measure() -> None:
        measured = reestimate_norm_statistics(refiner, _batches(images, refiner))
        if refinements and measured == 0:
            raise ValueError("There are no images to take the norms' statistics from.")

    start_as_identity(refinements, measure, "images")
    return refiner


def check_refinable(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` where a model of this configuration is no ViT or DeiT."""
    if config.model_type not in REFINABLE:
        raise ValueError(
            f"This is a {config.model_type!r} model; only image classifiers of the kinds {', '.join(REFINABLE)} can "
            "be refined."
        )


def load_refinable(source: Source) -> PreTrainedModel:
    """A ViT or DeiT image classifier from a folder or the Hub; errors as [`refine_vit`]'s."""
    check_refinable(load_config(source))
    return load_classifier(source)


def _renamed(source: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The source's tensors in float32, under the names that they have in a Refiner."""
    if not isinstance(source, PreTrainedModel):
        raise ValueError(f"A {type(source).__name__} can't be refined: give a model of transformers, or its name.")
    check_refinable(source.config)
    if any(parameter.is_meta for parameter in source.parameters()):
        raise ValueError("Some of the model's weights are offloaded: load it whole, without a device_map.")
    prefix = f"{source.base_model_prefix}."
    renamed = {}
    for name, tensor in source.state_dict().items():
        name = name.replace("cls_classifier.", "classifier.", 1)
        if name.startswith(prefix):
            name = f"refiner.{name.removeprefix(prefix)}".replace("refiner.layernorm.", "refiner.norm.", 1)
        renamed[name] = tensor.float()
    if "classifier.weight" not in renamed:
        raise ValueError(
            f"A {type(source).__name__} has no classifier. Load it with AutoModelForImageClassification, with the "
            "labels that you will train."
        )
    return renamed


def _refiner_config(source: PreTrainedConfig, tensors: dict[str, torch.Tensor], **refinement: Any) -> RefinerConfig:
    return RefinerConfig(
        **{name: getattr(source, name) for name in _SAME_FIELDS},
        **refinement,
        accumulate_attention=False,
        residual_scale=1.0,
        layerscale_value=1.0,
        use_conv_stem=False,
        use_distillation_token="refiner.embeddings.distillation_token" in tensors,
        use_distillation_head="distillation_classifier.weight" in tensors,
    )


def _batches(images: torch.Tensor | Iterable[torch.Tensor] | None, model: RefinerForImageClassification):
    if images is None:
        logger.warning(
            "Without images the norms' statistics come from noise: the logits are the model's own all the same, but a "
            "training begins further from it. Give refine_vit some dozens of prepared images."
        )
        config = model.config
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(_NOISE_IMAGES, config.num_channels, *config.image_height_width, generator=noise)
    if isinstance(images, Mapping):  # what an image processor gives
        images = images["pixel_values"]
    for batch in [images] if isinstance(images, torch.Tensor) else images:
        if not isinstance(batch, torch.Tensor) or batch.ndim != 4:
            got = tuple(batch.shape) if isinstance(batch, torch.Tensor) else f"a {type(batch).__name__}"
            raise ValueError(
                "images must be tensors of shape (batch, channels, height, width), as the model's image processor "
                f"makes them with return_tensors='pt'; got {got}."
            )
        yield batch.to(model.device)
