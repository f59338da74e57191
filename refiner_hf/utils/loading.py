"""
A network and its image processor from a folder or the Hub: whole and sound, or an error in words.

Every command loads its network here. transformers itself initialises missing weights at random and continues. A folder
or repository may also hold only a PEFT adapter: the network is then its base model with the adapter merged into it.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import safe_open
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import IMAGE_PROCESSOR_NAME as PROCESSOR_NAME

from .files import read_json
from .text import name_some


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAMED = 3  # tensors in an error


Hub = dict[str, Any]  # `revision` (branch, tag or commit), `token`, `cache_dir`, as `from_pretrained` takes them


class Place(NamedTuple):
    """A folder or Hub name, and what the Hub needs to know beside it."""

    name: str
    hub: Hub

    def find(self, file: str) -> Path | None:
        """A file in it, downloaded if need be; `None` where it has none."""
        try:
            found = cached_file(self.name, file, **self.hub)
        except (OSError, ValueError):  # whatever is wrong with the name itself, loading the configuration says
            return None
        except HTTPError as error:
            raise self._unreached(error) from error
        return None if found is None else Path(found)

    def has(self, file: str) -> bool:
        """Whether it has a file; where that can't be known, an `OSError`."""
        if Path(self.name).is_dir():
            return (Path(self.name) / file).is_file()
        try:
            return cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.hub) is not None
        except HTTPError as error:
            raise self._unreached(error) from error

    def _unreached(self, error: HTTPError) -> OSError:
        return OSError(f"The connection to the Hub broke while {self.name} was looked at ({error}). Try again.")


class Source(NamedTuple):
    """Where a network comes from: its weights, and the adapter that changes them, where there is one."""

    weights: Place
    adapter: Place | None = None

    def place_of(self, file: str) -> Place:
        """Where a configuration is taken from: beside the adapter if it is there."""
        return self.adapter if self.adapter is not None and self.adapter.find(file) else self.weights

    def weight_files(self) -> list[Path]:
        """All safetensors files of the network, those of the adapter last."""
        files = _weight_files(self.weights)
        adapter = self.adapter and self.adapter.find(ADAPTER_WEIGHTS)
        return [*files, *([adapter] if adapter else [])]


def find_source(name: str, **hub: Any) -> Source:
    """
    Args:
        name (`str`): folder or Hub name, of a network or of a PEFT adapter.
        hub (*optional*): `revision`, `token` and `cache_dir`, for names on the Hub.

    Raises:
        `ValueError`: a folder that isn't there, or an adapter that doesn't say what it adapts.
    """
    if not Path(name).exists() and not _may_be_on_hub(name):
        raise ValueError(f"There is no folder {name}, and it can't be a name on the Hub.")
    place = Place(name, {option: value for option, value in hub.items() if value is not None})
    adapter = place.find(ADAPTER_CONFIG)
    if adapter is None or _weight_files(place):
        return Source(place)
    try:
        content = json.loads(adapter.read_text(encoding="utf-8"))
        base = content["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The adapter's {adapter} is damaged: {_in_words(error)}") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter} doesn't say which model it adapts (base_model_name_or_path).")
    revision = {"revision": content["revision"]} if content.get("revision") else {}
    return Source(Place(base, {**place.hub, "revision": "main"} | revision), place)


def load_config(name: str, **hub: Any) -> PreTrainedConfig:
    """
    The configuration of a network; arguments as [`find_source`]'s. First there is a look whether the weights can be a
    network's of such sizes: to build a million layers takes long.

    Raises:
        `ValueError`: the configuration is damaged, or the weights are clearly another network's.
        `OSError`: there is no such model.
    """
    return _load_config(name, find_source(name, **hub))


def load_network(
    name: str,
    kind: Any = AutoModelForImageClassification,
    *,
    hub: Hub | None = None,
    may_lack: Callable[[str], bool] = lambda tensor: False,
    may_have: Callable[[str], bool] = lambda tensor: False,
    **options: Any,
) -> PreTrainedModel:
    """
    A network in evaluation mode with all its weights, those of an adapter merged into it.

    Args:
        name (`str`): folder or Hub name, of a network or of a PEFT adapter.
        kind: class with `from_pretrained`, an Auto class or a model's own.
        hub (`dict`, *optional*): see [`find_source`].
        may_lack, may_have (`Callable`, *optional*): whether a tensor of this name may be missing (the caller makes a
            new one, or never uses it) or left over.
        options: for `from_pretrained`.

    Raises:
        `ValueError`: the configuration or the weights are damaged; tensors are missing, left over or misshapen, or
            hold NaN or infinity.
        `OSError`: there is no such model, or it has no weights.
    """
    source = find_source(name, **hub or {})
    if "config" not in options:
        options["config"] = _load_config(name, source)
    trained = _trained_by_adapter(source)

    def absent(tensor: str) -> bool:
        return may_lack(tensor) or any(f".{part}." in f".{tensor}" for part in trained)

    with said_in_words(f"The weights of {name} are damaged, or don't fit its {CONFIG_NAME}"):
        # Misshapen tensors: our own words name them.
        model, loading = kind.from_pretrained(
            source.weights.name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source.weights.hub,
            **options,
        )
    _check_tensors(name, model, loading, absent, may_have)
    if source.adapter is not None:
        model = _with_adapter(name, model, source.adapter)
    _check_finite(name, model)
    return model.eval()


def load_classifier(name: str, revision: str | None = None) -> PreTrainedModel:
    """
    Any of transformers' image classifiers, in evaluation mode and in float32, however it was saved; errors as
    [`load_network`]'s, and a `ValueError` where it isn't an image classifier.
    """
    config = load_config(name, revision=revision)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{name} is a {config.model_type!r} model, which isn't an image classifier.")
    return load_network(name, hub={"revision": revision}, config=config, dtype=torch.float32)


def load_classifier_and_processor(
    name: str, revision: str | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier, as [`load_classifier`] gives it, and its image processor, tried out together."""
    model, processor = load_classifier(name, revision), load_image_processor(name, {"revision": revision})
    try_out(name, model, processor)
    return model, processor


def load_image_processor(name: str, hub: Hub | None = None, **options: Any) -> BaseImageProcessor:
    """
    A network's image processor. `options` change what it says.

    Raises:
        `ValueError`: its configuration is damaged.
        `OSError`: there is none.
    """
    place = find_source(name, **hub or {}).place_of(PROCESSOR_NAME)
    with said_in_words(f"The {PROCESSOR_NAME} of {name} is damaged"):
        return AutoImageProcessor.from_pretrained(place.name, **place.hub, **options)


def has_image_processor(name: str, hub: Hub | None = None) -> bool:
    """
    Whether there is one, sound or not.

    Raises:
        `OSError`: the Hub can't be asked, and the file isn't in the cache.
    """
    source = find_source(name, **hub or {})
    return any(place.has(PROCESSOR_NAME) for place in (source.weights, source.adapter) if place is not None)


@torch.no_grad()
def try_out(name: str, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """
    Gives a picture to the processor and what it makes of it to the network, before anything long begins.

    Raises:
        `ValueError`: one can't take what the other makes, or the answer isn't finite.
    """
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    with said_in_words(f"The network of {name} can't take what its image processor makes of a picture"):
        pixels = processor(Image.new(mode, (48, 32), 128), return_tensors="pt").pixel_values
        answer = model(pixel_values=pixels.to(model.device)).to_tuple()[0]
    if not answer.isfinite().all():
        raise ValueError(
            f"{name} answers with numbers that aren't finite: its weights are damaged, its training broke, or its "
            f"{PROCESSOR_NAME} is wrong."
        )


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _load_config(name: str, source: Source) -> PreTrainedConfig:
    place, shapes = source.place_of(CONFIG_NAME), _shapes(source.weight_files())
    with said_in_words(f"The {CONFIG_NAME} of {name} can't be used"):
        content, _ = PreTrainedConfig.get_config_dict(place.name, **place.hub)
        if shapes:
            _check_sizes(content, shapes)
        return AutoConfig.from_pretrained(place.name, **place.hub)


def _check_sizes(content: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    """What can be seen without building a network. Every layer has some tensor, and every label a row in one."""
    layers = content.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(shapes):
        raise ValueError(f"it has {layers:,} layers, but there are only {len(shapes):,} weight tensors.")
    labels = content.get("id2label") or range(0)
    if "ForImageClassification" in str(content.get("architectures")) and len(labels) > max(map(max, shapes)):
        raise ValueError(f"it names {len(labels):,} labels, but no weight tensor has as many rows.")


def _shapes(files: list[Path]) -> list[tuple[int, ...]]:
    shapes = []
    for file in files:
        with said_in_words(f"The weights in {file} are damaged"), safe_open(file, "pt") as tensors:
            shapes += [(0, *tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
    return shapes


def _weight_files(place: Place) -> list[Path]:
    if whole := place.find(SAFE_WEIGHTS_NAME):
        return [whole]
    index = place.find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    with said_in_words(f"The list of weights {index} is damaged"):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: place.find(name) for name in names}
    if missing := [name for name, file in found.items() if file is None]:
        raise ValueError(f"{place.name} lacks {', '.join(missing)}: its weights aren't all there.")
    return [file for file in found.values() if file is not None]


def _check_tensors(
    name: str,
    model: PreTrainedModel,
    loading: dict[str, Any],
    absent: Callable[[str], bool],
    left_over: Callable[[str], bool],
) -> None:
    # A base model is often loaded from a file with a head. The head's tensors are unexpected, but outside of the base.
    own = {key.split(".")[0] for key in model.state_dict()}
    is_base, prefix = model.base_model is model, f"{model.base_model_prefix}."
    unexpected = [
        key for key in loading["unexpected_keys"] if not is_base or key.removeprefix(prefix).split(".")[0] in own
    ]
    # Of many published classifiers, which never use it.
    unexpected = [key for key in unexpected if "pooler." not in key and not left_over(key)]
    problems = {
        "lack": [key for key in loading["missing_keys"] if not absent(key)],
        "have tensors that don't belong to the network:": unexpected,
        "have another shape than the network's in": [
            key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]
        ],
    }
    problems = {what: sorted(keys) for what, keys in problems.items()}
    told = [f"{what} {name_some(keys, _NAMED)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(
            f"The weights of {name} don't fit its network ({type(model).__name__}): they {'; they '.join(told)}. "
            "Is the folder complete? If a head was never trained, fine-tune the model first."
        )


def _check_finite(name: str, model: PreTrainedModel) -> None:
    for key, tensor in model.state_dict().items():
        # Quantized weights are of classes of their own, which needn't know this.
        plain = type(tensor) is torch.Tensor and tensor.is_floating_point() and not tensor.is_meta
        if plain and not tensor.isfinite().all():
            raise ValueError(f"The weights of {name} hold NaN or infinity in {key}: its training broke.")


def _trained_by_adapter(source: Source) -> list[str]:
    """The modules that the adapter holds whole, such as a new classifier: the base model needn't have them."""
    file = source.adapter and source.adapter.find(ADAPTER_CONFIG)
    return read_json(file).get("modules_to_save") or [] if file else []


def _with_adapter(name: str, model: PreTrainedModel, adapter: Place) -> PreTrainedModel:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"{name} is a PEFT adapter. Install what it takes: pip install peft") from error
    weights = adapter.find(ADAPTER_WEIGHTS)
    if weights is None:
        raise ValueError(f"{name} has no {ADAPTER_WEIGHTS}: the adapter's weights aren't there.")
    with said_in_words(f"The adapter {name} doesn't fit its base model"):
        with safe_open(weights, "pt") as tensors:
            there = set(tensors.keys())
        adapted = PeftModel.from_pretrained(model, adapter.name, **adapter.hub)
        wanted = set(get_peft_model_state_dict(adapted))
        if there != wanted:
            raise ValueError(f"missing or left over are {name_some(sorted(there ^ wanted), _NAMED)}.")
        return adapted.merge_and_unload()


@contextmanager
def said_in_words(what: str) -> Iterator[None]:
    """
    Loading calls into libraries each of which has errors of its own for a damaged file. All but an `OSError`, which
    says that there is no file, become a `ValueError` that begins with `what`.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    """An error's text; where it is no sentence (`KeyError: 'x'`), with its kind."""
    if isinstance(error, StrictDataclassError):  # "Class validation error for validator '...':\n    ValueError: ..."
        return " ".join(str(error.__cause__ or error).split())
    if isinstance(error, pickle.UnpicklingError):  # torch's own text says how to run the code
        return "they are a pickle that may hold code, which isn't run. Ask for safetensors."
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, RuntimeError)) and text else f"{type(error).__name__}: {text}"
