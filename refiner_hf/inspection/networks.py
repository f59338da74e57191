"""Encoders whose maps can be looked at: Refiners and those of transformers, for images or texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel

from ..encoder_configuration_refiner import RefinedConfig
from ..encoder_models_refiner import class_as_saved
from ..encoders.inputs import longest_text
from ..utils.fitting import try_out, try_out_on_text
from ..utils.loading import load_config, load_image_processor, load_network, load_tokenizer
from ..utils.model_source import find_source


_LONGEST = 512  # tokens: the maps of ten times as many would take a hundred times the memory


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
    """An encoder in evaluation mode, its image processor or tokenizer, and its name in reports."""

    name: str
    model: PreTrainedModel
    processor: Any

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def reads_texts(self) -> bool:
        """Whether it takes texts, not images."""
        return reads_texts(self.model)

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Number of patches, down and across, of images (B, C, height, width)."""
        return patch_grid(self.model, pixel_values)

    def tokens_of(self, text: str | dict[str, str]) -> dict[str, torch.Tensor]:
        """
        What the model takes of one text, or of a pair as `text` and `text_pair`, cut to what it has places for, and to
        512 tokens.

        Raises:
            `ValueError`: the text is a single token, which has nothing to attend to.
        """
        text = {"text": text} if isinstance(text, str) else text
        longest = min(_LONGEST, longest_text(self.model, self.processor))
        inputs = self.processor(**text, truncation=True, max_length=longest, return_tensors="pt").to(self.device)
        if inputs["input_ids"].shape[1] < 2:
            raise ValueError(f"The text {text['text']!r} is a single token, which has nothing to attend to.")
        return dict(inputs)


def open_network(name: str, device: str = "cpu", revision: str | None = None, *, texts: bool = False) -> Network:
    """
    Args:
        name (`str`): folder or Hub name of a Refiner, or of a transformer in transformers whose layers attend to all
            patches or tokens: ViT, DeiT, DINOv2, BEiT, BERT and others.
        device (`str`, *optional*, defaults to `"cpu"`): where it shall run.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.
        texts (`bool`, *optional*, defaults to `False`): whether it shall be one for texts, not for images.

    Raises:
        `ValueError`, `OSError`: there is no such model, it is damaged, it takes something else, or it gives no such
            maps.
    """
    source = find_source(name, revision=revision)
    config = load_config(source)
    # Images: with the classifier, where there is one. An adapter's modules have the names of the class that it is for.
    classifies = any("ForImageClassification" in each for each in config.architectures or [])
    kind = AutoModelForImageClassification if classifies else AutoModel
    if (adapted := source.adapted_class()) is not None:
        kind = class_as_saved(config, adapted) or kind
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
    if reads_texts(model) != texts:
        takes, other = ("texts", "images") if reads_texts(model) else ("images", "texts")
        raise ValueError(f"{name} is a {type(model).__name__}, which takes {takes}, not {other}.")
    classes_of_layers(model)
    processor: Any = load_tokenizer(source) if texts else load_image_processor(source)
    network = Network(short_names([name])[0], model, processor)
    (try_out_on_text if texts else try_out)(name, model, processor)
    model.to(device)
    return network


def reads_texts(model: PreTrainedModel) -> bool:
    """Whether a model takes texts, not images."""
    return model.main_input_name == "input_ids"


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
    on_patches = model.main_input_name == "pixel_values" and patches_last
    if isinstance(layer, type) and isinstance(attention, type) and (on_patches or reads_texts(model)):
        return layer, attention
    raise ValueError(
        f"A {type(model).__name__} isn't a transformer over patches or tokens whose layers give their maps. Take a "
        "Refiner, a ViT, DeiT, DINOv2, BERT or the like."
    )
