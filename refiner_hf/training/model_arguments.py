"""The options of the network that is trained."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..choices_refiner import REFINE_IMPLEMENTATION_CHOICES


@dataclass
class ModelArguments:
    """The network: a checkpoint to start from, or a new one."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of an image classifier, or of an encoder that can be one, to fine-tune or "
            "evaluate: a Refiner, a refined model, ViT, DINOv2 and v3, SigLIP and others. Else a new Refiner."
        },
    )
    model_size: str = field(
        default="small",
        metadata={"help": "Published architecture of a new network.", "choices": ["small", "medium", "large"]},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the network's configuration to change, as JSON: '{\"drop_path_rate\": 0.1}'."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels. Default: the model's own."}
    )
    crop_pct: float | None = field(
        default=None, metadata={"help": "Share of the resized image that the evaluation crop keeps."}
    )
    refine_implementation: str = field(
        default="auto",
        metadata={
            "help": "How attention maps are refined; every choice gives the same numbers.",
            "choices": REFINE_IMPLEMENTATION_CHOICES,
        },
    )
    adapter: str = field(
        default="none",
        metadata={
            "help": "Train an adapter of some KB and the head alone: refinements of the attention maps, or LoRA.",
            "choices": ["none", "refinement", "lora"],
        },
    )
    adapter_options: str | None = field(
        default=None,
        metadata={
            "help": "Fields of RefinementAdapterConfig or LoraConfig, as JSON: '{\"layers_to_transform\": [10, 11]}'."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for a private model on the Hub."})

    def __post_init__(self):
        self.overrides = _object("--config_overrides", self.config_overrides)
        self.adapter_fields = _object("--adapter_options", self.adapter_options)
        if self.adapter_fields and self.adapter == "none":
            raise ValueError("--adapter_options without --adapter have no effect.")
        if self.adapter != "none" and self.model_name_or_path is None:
            raise ValueError("An --adapter adapts a network that has learned: give --model_name_or_path.")
        if self.model_name_or_path is None:
            self._check_fields_of_a_refiner()
        if self.crop_pct is not None and self.crop_pct <= 0:
            raise ValueError(f"--crop_pct must be positive, got {self.crop_pct}.")

    def _check_fields_of_a_refiner(self) -> None:
        if not self.overrides:
            return
        from ..configuration_refiner import RefinerConfig

        fields = {
            f.name
            for f in dataclasses.fields(RefinerConfig)
            if f.name in RefinerConfig.__annotations__ and f.name[0] != "_"
        }
        if unknown := sorted(self.overrides.keys() - fields):
            raise ValueError(f"--config_overrides has {unknown}, but the fields of a network are {sorted(fields)}.")


def _object(option: str, value: str | None) -> dict[str, Any]:
    """A JSON object."""
    try:
        given = json.loads(value) if value else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} must be a JSON object: {error}. Got {value}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{option} must be a JSON object, got {value}.")
    return given
