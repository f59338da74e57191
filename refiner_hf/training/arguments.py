"""The model and training options."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..attention_refiner import REFINE_IMPLEMENTATIONS
from ..configuration_refiner import RefinerConfig
from .optimization import optimizer_of_timm


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
            "choices": ["auto", *REFINE_IMPLEMENTATIONS],
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


@dataclass
class RefinerTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the defaults and options that Refiners need."""

    # The stock default drops the column `image` before our transform sees it.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off: it drops the images."})
    norm_statistics_images: int = field(
        default=512,
        metadata={
            "help": "Training images over which the batch norms' statistics are re-estimated before each evaluation "
            "and save. 0 uses the running averages."
        },
    )
    synchronize_norms: bool = field(
        default=True,
        metadata={"help": "With several processes, normalise with the statistics of all their batches together."},
    )
    freeze_norms: bool = field(
        default=False, metadata={"help": "Keep the batch norms' statistics as they are (fine-tuning, small batches)."}
    )
    learning_rate_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "How many images a step has that --learning_rate is meant for. It is scaled in proportion to "
            "how many it really has (processes x images of each x accumulation). Default: the rate is taken as it is."
        },
    )
    cooldown_steps: float = field(
        default=0.0,
        metadata={
            "help": "Steps at the end, or below 1 their share of all steps, through which the learning rate stays "
            "where the schedule, --warmup_steps included, has ended before."
        },
    )
    class_weights: str = field(
        default="none",
        metadata={
            "help": "Balanced: an image counts in the loss by how rare its label is among the training images, so "
            "that each label has the same weight.",
            "choices": ["none", "balanced"],
        },
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "After training, divide the logits by the temperature that fits the evaluation images best, so "
            "that a score says how often it is right. The division goes into the heads' weights; answers stay."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End the training once so many evaluations in a row weren't better than the best (by "
            "--metric_for_best_model). Needs --load_best_model_at_end."
        },
    )
    timm_optim: str | None = field(
        default=None,
        metadata={
            "help": "Name of an optimizer of timm, in place of --optim: nmuon learns small networks with fewer steps "
            "than AdamW (its learning rate means the same)."
        },
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Each layer's learning rate is this times that of the layer after it."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Average the weights, with so much of the average left after each step. It is evaluated and saved "
            "(in the folder ema) beside the raw weights. 0 makes none."
        },
    )
    ema_warmup: bool = field(
        default=True,
        metadata={
            "help": "Let the average forget the first weights quickly: a decay of at most 1 - (1 + step)^(-2/3)."
        },
    )
    with_code: bool = field(
        default=False,
        metadata={
            "help": "Put the model's code into the folder, for trust_remote_code where this package isn't installed."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: say what would be trained, and draw a batch as the network would see it, with "
            "augmentation and all, into the output folder. Nothing goes to the Hub."
        },
    )
    example_pictures: int = field(
        default=0,
        metadata={
            "help": "So many evaluation pictures go into the folder and its card, with the model's answers. Mind that "
            "they are published with it."
        },
    )
    analysis_images: int = field(
        default=0,
        metadata={
            "help": "Measure on so many evaluation images what the trained network's attention maps and features are "
            "like, for its card (as refiner analyze does); with --example_pictures also draw where it looks in one."
        },
    )
    verify_push: bool = field(
        default=False,
        metadata={"help": "After --push_to_hub, load the model back from the Hub in a fresh process and compare."},
    )
    weights_license: str | None = field(
        default=None, metadata={"help": "License of the weights for the model card, such as apache-2.0."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns otherwise
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns would drop the images before they are read; leave it off.")
        # A hyperparameter search turns what it tries into the type of what was there before: 0.1 of the steps into 0.
        self.warmup_steps = float(self.warmup_steps)
        self.check()

    def check(self) -> None:
        """
        Raises:
            `ValueError`: an option out of its range; also where it was changed after the construction.
        """
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"--label_smoothing_factor must be in [0, 1), got {self.label_smoothing_factor}.")
        for name in ("norm_statistics_images", "example_pictures", "analysis_images", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay must be in (0, 1], got {self.layer_decay}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be in [0, 1), got {self.ema_decay}.")
        if self.early_stopping_patience is not None:
            self._check_early_stopping(self.early_stopping_patience)
        if self.timm_optim is not None:
            optimizer_of_timm(self.timm_optim)
        if self.learning_rate_batch_size is not None and self.learning_rate_batch_size < 1:
            raise ValueError(f"--learning_rate_batch_size must be at least 1, got {self.learning_rate_batch_size}.")

    def _check_early_stopping(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"--early_stopping_patience must be at least 1, got {patience}.")
        if not self.load_best_model_at_end:
            raise ValueError(
                "--early_stopping_patience needs --load_best_model_at_end, with an --eval_strategy and the same "
                "--save_strategy: otherwise the weights would be those after the best."
            )

    def get_cooldown_steps(self, num_training_steps: int) -> int:
        """Steps at the end through which the learning rate stays where it is; like `get_warmup_steps`."""
        share = num_training_steps if self.cooldown_steps < 1 else 1
        return min(round(share * self.cooldown_steps), num_training_steps)
