"""
A network and its image processor or tokenizer from a folder or the Hub: whole and sound, or an error in words.

Every command loads its network here. transformers itself initialises missing weights at random and continues. A folder
or repository may also hold only a PEFT adapter: the network is then its base model with the adapter merged into it.
"""

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import CONFIG_NAME
from transformers.utils import IMAGE_PROCESSOR_NAME as PROCESSOR_NAME

from .errors import explain_errors
from .fitting import try_out
from .model_source import ADAPTER_WEIGHTS, Place, Source, find_source
from .text import name_some
from .weight_checks import NAMED, check_finite, check_sizes, check_tensors, shapes_in


# What a tokenizer is saved as; the first by all of today's.
_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", "tokenizer.model", "merges.txt",
)  # fmt: skip


def load_config(name: str | Source, **hub: Any) -> PreTrainedConfig:
    """
    The configuration of a network; arguments as [`find_source`]'s. First there is a look whether the weights can be a
    network's of such sizes: to build a million layers takes long.

    Raises:
        `ValueError`: the configuration is damaged, or the weights are clearly another network's.
        `OSError`: there is no such model.
    """
    source = find_source(name, **hub)
    place, shapes = source.place_of(CONFIG_NAME), shapes_in(source.weight_files())
    with explain_errors(f"The {CONFIG_NAME} of {source} can't be used"):
        content, _ = PreTrainedConfig.get_config_dict(place.name, **place.hub)
        check_sizes(content, shapes)
        return AutoConfig.from_pretrained(place.name, **place.hub)


def load_network(
    name: str | Source,
    kind: Any = AutoModelForImageClassification,
    *,
    may_lack: Callable[[str], bool] = lambda tensor: False,
    may_have: Callable[[str], bool] = lambda tensor: False,
    may_differ: Callable[[str], bool] = lambda tensor: False,
    **options: Any,
) -> PreTrainedModel:
    """
    A network in evaluation mode with all its weights, those of an adapter merged into it.

    Args:
        name: folder or Hub name, of a network or of a PEFT adapter, or what [`find_source`] found there.
        kind: class with `from_pretrained`, an Auto class or a model's own.
        may_lack, may_have, may_differ (`Callable`, *optional*): whether a tensor of this name may be missing, left
            over, or of another shape (the caller makes a new one, or never uses it).
        options: for `from_pretrained`.

    Raises:
        `ValueError`: the configuration or the weights are damaged; tensors are missing, left over or misshapen, or
            hold NaN or infinity.
        `OSError`: there is no such model, or it has no weights.
    """
    source = find_source(name)
    if "config" not in options:
        options["config"] = load_config(source)
    new = source.new_in_adapter()

    def in_adapter(tensor: str) -> bool:
        return any(f".{part}." in f".{tensor}" for part in new)

    with explain_errors(f"The weights of {source} are damaged, or don't fit its {CONFIG_NAME}"):
        # Misshapen tensors: our own words name them.
        model, loading = kind.from_pretrained(
            source.weights.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source.weights.hub,
            **options,
        )
    check_tensors(
        source.name,
        model,
        loading,
        lambda tensor: may_lack(tensor) or in_adapter(tensor),
        may_have,
        lambda tensor: may_differ(tensor) or in_adapter(tensor),
    )
    if source.adapter is not None:
        model = _with_adapter(model, source.adapter)
    check_finite(source.name, model)
    return model.eval()


def load_classifier(name: str | Source, revision: str | None = None) -> PreTrainedModel:
    """
    Any of transformers' image classifiers, in evaluation mode and in float32, however it was saved; errors as
    [`load_network`]'s, and a `ValueError` where it isn't an image classifier.
    """
    source = find_source(name, revision=revision)
    config = load_config(source)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name} is a {config.model_type!r} model, which isn't an image classifier.")
    return load_network(source, config=config, dtype=torch.float32)


def load_classifier_and_processor(
    name: str, revision: str | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier, as [`load_classifier`] gives it, and its image processor, tried out together."""
    source = find_source(name, revision=revision)
    model, processor = load_classifier(source), load_image_processor(source)
    try_out(name, model, processor)
    return model, processor


def load_image_processor(name: str | Source, **options: Any) -> BaseImageProcessor:
    """
    A network's image processor. `options` change what it says.

    Raises:
        `ValueError`: its configuration is damaged.
        `OSError`: there is none.
    """
    place = find_source(name).place_of(PROCESSOR_NAME)
    with explain_errors(f"The {PROCESSOR_NAME} of {name} is damaged"):
        return AutoImageProcessor.from_pretrained(place.name, **place.hub, **options)


def load_tokenizer(name: str | Source) -> PreTrainedTokenizerBase:
    """
    A network's tokenizer.

    Raises:
        `ValueError`: it is damaged.
        `OSError`: there is none. (transformers itself would silently make an empty one.)
    """
    source = find_source(name)
    file = next(filter(source.has, _TOKENIZER_FILES), None)
    if file is None:
        raise OSError(f"{name} has no tokenizer: none of {name_some(_TOKENIZER_FILES)} is there.")
    place = source.place_of(file)
    with explain_errors(f"The tokenizer of {name} can't be loaded"):
        return AutoTokenizer.from_pretrained(place.name, **place.hub)


def has_image_processor(name: str | Source) -> bool:
    """
    Whether there is one, sound or not.

    Raises:
        `OSError`: the Hub can't be asked, and the file isn't in the cache.
    """
    return find_source(name).has(PROCESSOR_NAME)


def _with_adapter(model: PreTrainedModel, adapter: Place) -> PreTrainedModel:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"{adapter.name} is a PEFT adapter. Install what it takes: pip install peft") from error
    weights = adapter.find(ADAPTER_WEIGHTS)
    if weights is None:
        raise ValueError(f"{adapter.name} has no {ADAPTER_WEIGHTS}: the adapter's weights aren't there.")
    with explain_errors(f"The adapter {adapter.name} doesn't fit its base model"):
        with safe_open(weights, "pt") as tensors:
            there = set(tensors.keys())
        adapted = PeftModel.from_pretrained(model, adapter.name, **adapter.hub)
        wanted = set(get_peft_model_state_dict(adapted))
        if there != wanted:
            raise ValueError(f"missing or left over are {name_some(sorted(there ^ wanted), NAMED)}.")
        return adapted.merge_and_unload()
