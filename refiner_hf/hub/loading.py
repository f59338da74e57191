"""A classifier from a folder or the Hub, whole or not at all."""

import pickle

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
)


def load_classifier(name: str) -> PreTrainedModel:
    """
    Any of transformers' image classifiers, in evaluation mode and in float32, however it was saved.

    Args:
        name (`str`): folder or Hub name.

    Raises:
        `ValueError`: it isn't an image classifier; its weights are damaged, or some were never saved, which
            transformers would make up (a folder without a classifier, say).
        `OSError`: there is no such model.
    """
    config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name} is a {config.model_type!r} model, which isn't an image classifier.")
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"The weights in {name} are damaged, or don't fit its config.json: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{name} isn't a trained image classifier: its weights lack {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}. Fine-tune it first."
        )
    return model.eval()
