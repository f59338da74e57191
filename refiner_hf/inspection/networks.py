"""Vision transformers whose maps can be shown: Refiners and those of transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from ..encoder_models_refiner import RefinedConfig
from ..utils.fitting import try_out
from ..utils.loading import load_config, load_image_processor, load_network
from ..utils.model_source import find_source


def short_names(names: list[str]) -> list[str]:
    """Short names for several networks: the last parts of each path, as many as it takes to tell them apart."""
    parts = [Path(name).resolve().parts[1:] if Path(name).exists() else (name,) for name in names]
    short = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in set(parts)) > 1:
            length += 1
        short.append("/".join(own[-length:]))
    return short


@dataclass
class Network:
    """A vision transformer in evaluation mode, its image processor, and its name in reports."""

    name: str
    model: PreTrainedModel
    processor: BaseImageProcessor

    @property
    def device(self) -> torch.device:
        return self.model.device

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Number of patches, down and across, of images (B, C, height, width)."""
        return patch_grid(self.model, pixel_values)


def open_network(name: str, device: str = "cpu", revision: str | None = None) -> Network:
    """
    Args:
        name (`str`): folder or Hub name of a Refiner, or of a transformer in transformers whose layers attend to all
            patches: ViT, DeiT, DINOv2, BEiT and others.
        device (`str`, *optional*, defaults to `"cpu"`): where it shall run.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.

    Raises:
        `ValueError`, `OSError`: there is no such model, it is damaged, or it gives no such maps.
    """
    source = find_source(name, revision=revision)
    config = load_config(source)
    # With its classifier, where it has one: otherwise transformers warns about weights that aren't used.
    classifies = any("ForImageClassification" in kind for kind in config.architectures or [])
    kind = AutoModelForImageClassification if classifies else AutoModel
    # Always in float32: in half precision, rounding errors would raise the effective rank of a smooth map.
    options = {"config": config, "dtype": torch.float32}
    if config.model_type != RefinedConfig.model_type:  # a refined model's own attention always makes its maps
        options["attn_implementation"] = "eager"
    model = load_network(
        source,
        kind,
        may_lack=lambda tensor: "pooler." in tensor,  # not needed for maps, and some models are saved without it
        may_have=lambda tensor: tensor.endswith("mask_token"),  # of masked image modelling
        **options,
    )
    classes_of_layers(model)
    network = Network(short_names([name])[0], model, load_image_processor(source))
    try_out(name, model, network.processor)
    model.to(device)
    return network


def patch_grid(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Number of patches, down and across, of images (B, C, height, width)."""
    patch = model.config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width


def classes_of_layers(model: PreTrainedModel) -> tuple[type[nn.Module], type[nn.Module]]:
    """
    The classes of a model's layers and of their attention, which gives the map second.

    Raises:
        `ValueError`: the model has none, or other kinds of them.
    """
    recorded = getattr(model, "_can_record_outputs", None) or {}
    layer, attention = recorded.get("hidden_states"), recorded.get("attentions")
    patches_last = hasattr(model.config, "patch_size") and not hasattr(model.config, "num_detection_tokens")
    on_pixels = model.main_input_name == "pixel_values"
    if isinstance(layer, type) and isinstance(attention, type) and on_pixels and patches_last:
        return layer, attention
    raise ValueError(
        f"A {type(model).__name__} isn't a transformer over patches whose layers give their maps. Take a Refiner, a "
        "ViT, DeiT, DINOv2 or the like."
    )
