"""The options of a training as plain values, and as the arguments that a training takes."""

import json
from typing import Any

from transformers import HfArgumentParser

from ..data.arguments import AugmentationArguments, DataArguments
from ..training.arguments import RefinerTrainingArguments
from ..training.model_arguments import ModelArguments


Arguments = tuple[ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments]
KINDS: Any = (ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments)


def to_arguments(options: dict[str, Any]) -> Arguments:
    """
    Arguments of options by name; the others have their defaults.

    Raises:
        `ValueError`: an option that isn't one, or a value that doesn't fit.
    """
    as_text = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}
    arguments: Any = HfArgumentParser(KINDS).parse_dict(as_text)
    return arguments
