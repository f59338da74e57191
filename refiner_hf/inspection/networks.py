"""Vision transformers to look into: ours and those of transformers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)


def short_names(names: list[str]) -> list[str]:
    """What to call several networks: the last names of folders, and as much before them as tells them apart."""
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
    """A vision transformer in evaluation, the processor of its images, and what to call it."""

    name: str
    model: PreTrainedModel
    processor: BaseImageProcessor

    @property
    def device(self) -> torch.device:
        return self.model.device

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Number of patches, down and across, of images (B, C, height, width)."""
        return patch_grid(self.model, pixel_values)


def open_network(name: str, device: str = "cpu") -> Network:
    """
    Args:
        name (`str`): folder or Hub name of a Refiner, or of a transformer in transformers whose layers attend to all
            patches alike: ViT, DeiT, DINOv2, BEiT and others.
        device (`str`, *optional*, defaults to `"cpu"`): where it shall run.

    Raises:
        `ValueError`, `OSError`: there is no such model, or one without maps of this kind.
    """
    config = AutoConfig.from_pretrained(name)
    # With its classifier, where it has one: what is left out or made anew, transformers reports at length.
    classifies = any("ForImageClassification" in kind for kind in config.architectures or [])
    kind = AutoModelForImageClassification if classifies else AutoModel
    # In float32 however it was saved, since rounding looks like directions in a smooth map.
    try:
        model = kind.from_pretrained(name, attn_implementation="eager", dtype=torch.float32).eval().to(device)
    except SafetensorError as error:
        raise ValueError(f"The weights in {name} are damaged: {error}") from error
    classes_of_layers(model)
    return Network(short_names([name])[0], model, AutoImageProcessor.from_pretrained(name))


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
    found = recorded.get("hidden_states"), recorded.get("attentions")
    fits = all(isinstance(kind, type) for kind in found) and model.main_input_name == "pixel_values"
    patches_last = hasattr(model.config, "patch_size") and not hasattr(model.config, "num_detection_tokens")
    if not fits or not patches_last:
        raise ValueError(
            f"A {type(model).__name__} isn't a transformer over patches whose layers show their maps. Take a Refiner, "
            "ViT, DeiT, DINOv2 or the like."
        )
    return found
