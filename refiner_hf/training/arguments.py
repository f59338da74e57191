"""The training options, with those of transformers."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from .optimization import optimizer_of_timm
from .options import RefinerTrainingOptions


@dataclass
class RefinerTrainingArguments(RefinerTrainingOptions, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the defaults and options that Refiners need."""

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
