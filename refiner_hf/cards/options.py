"""Which options of a training may be published, in a card and in files: an allow-list."""

import dataclasses
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

from transformers import TrainingArguments


# Options that say what was trained. In a card even if they have their defaults:
_ALWAYS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "max_grad_norm",
    "label_smoothing_factor", "seed", "bf16", "fp16", "norm_statistics_images", "freeze_norms",
)  # fmt: skip
# And if they don't:
_IF_CHANGED = (
    "activation_checkpointing", "activation_checkpointing_kwargs", "adam_epsilon", "auto_find_batch_size",
    "average_tokens_across_devices", "bf16_full_eval", "class_weights", "cooldown_steps", "data_seed",
    "dataloader_drop_last", "early_stopping_patience",
    "ema_decay", "ema_warmup", "eval_accumulation_steps", "eval_steps", "fp16_full_eval", "fsdp", "full_determinism",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "greater_is_better", "layer_decay",
    "learning_rate_batch_size", "load_best_model_at_end", "lr_scheduler_kwargs", "metric_for_best_model",
    "neftune_noise_alpha", "optim_args", "optim_target_modules", "save_steps", "synchronize_norms", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cpu", "use_liger_kernel",
)  # fmt: skip
_ALLOWED = {*_ALWAYS, *_IF_CHANGED}

# Names of things, numbers and settings such as "rand-m9-mstd0.5-inc1" or "betas=(0.9, 0.99)": no path, no address.
_HARMLESS = re.compile(r"[\w.+\-=, ()]{0,200}")
_TOKEN = re.compile(r"(?:hf|api_org|sk|gh[a-z]|xox[a-z])[_-]\w{8,}")
_HIDDEN = "not shown"


def training_rows(args: TrainingArguments) -> list[tuple[str, str]]:
    """Names and values of a training's options for its card: those of the allow-list that the version knows."""
    known = {field.name for field in dataclasses.fields(args)}
    names = (*_ALWAYS, *(name for name in _IF_CHANGED if name in known and _is_changed(args, name)))
    return public_rows({name: getattr(args, name) for name in names if name in known})


def public_rows(options: dict[str, Any], names: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Rows of a table, of all options or of some. A value that mustn't be published is said to be there."""
    return [(name, _text(public_value(options[name]))) for name in (options if names is None else names)]


def public_value(value: Any) -> Any:
    """
    A value of an option, without what must not be published: a path, a token or an address in it becomes "not shown".
    """
    if isinstance(value, dict):
        return {str(public_value(key)): public_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(each) for each in value]
    value = value.value if isinstance(value, Enum) else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    return text if _HARMLESS.fullmatch(text) and not _TOKEN.search(text) else _HIDDEN


def public_options(training: dict[str, Any]) -> dict[str, Any]:
    """The options of a training that may be published in a file: switches and numbers, and those of the allow-list."""
    return {
        name: public_value(value)
        for name, value in training.items()
        if name in _ALLOWED or value is None or isinstance(value, (bool, int, float))
    }


def _is_changed(args: TrainingArguments, name: str) -> bool:
    """Whether an option hasn't its default. (A second instance to compare with would reset the devices.)"""
    field = next(field for field in dataclasses.fields(args) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = getattr(args, name)
    return bool(value) and value != default


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
