"""Where a network's files are: in a folder or on the Hub, and perhaps with a PEFT adapter beside them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .errors import explain_errors, in_words
from .files import read_json


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Place(NamedTuple):
    """
    A folder or Hub name, and what the Hub needs to know beside it: `revision` (branch, tag or commit), `token` and
    `cache_dir`, as `from_pretrained` takes them.
    """

    name: str
    hub: dict[str, Any]

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

    def weight_files(self) -> list[Path]:
        """
        Its safetensors files.

        Raises:
            `ValueError`: the list of them is damaged, or one of the list isn't there.
        """
        if whole := self.find(SAFE_WEIGHTS_NAME):
            return [whole]
        index = self.find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            return []
        with explain_errors(f"The list of weights {index} is damaged"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        found = {name: self.find(name) for name in names}
        if missing := [name for name, file in found.items() if file is None]:
            raise ValueError(f"{self.name} lacks {', '.join(missing)}: its weights aren't all there.")
        return [file for file in found.values() if file is not None]

    def _unreached(self, error: HTTPError) -> OSError:
        return OSError(f"The connection to the Hub broke while {self.name} was looked at ({error}). Try again.")


class Source(NamedTuple):
    """Where a network comes from: its weights, and the adapter that changes them, where there is one."""

    name: str
    weights: Place
    adapter: Place | None = None

    def __str__(self) -> str:
        return self.name

    def place_of(self, file: str) -> Place:
        """Where a configuration is taken from: beside the adapter if it is there."""
        return self.adapter if self.adapter is not None and self.adapter.find(file) else self.weights

    def has(self, file: str) -> bool:
        """Whether there is such a file; where that can't be known, an `OSError`."""
        return any(place.has(file) for place in (self.weights, self.adapter) if place is not None)

    def weight_files(self) -> list[Path]:
        """All safetensors files of the network, those of the adapter last."""
        adapter = self.adapter and self.adapter.find(ADAPTER_WEIGHTS)
        return [*self.weights.weight_files(), *([adapter] if adapter else [])]

    def adapted_class(self) -> str | None:
        """The name of the class of the model that the adapter was made for, where it says so."""
        file = self.adapter and self.adapter.find(ADAPTER_CONFIG)
        return (read_json(file).get("auto_mapping") or {}).get("base_model_class") if file else None

    def new_in_adapter(self) -> list[str]:
        """The modules that the adapter holds whole, such as a new classifier: the base model needn't have them."""
        file = self.adapter and self.adapter.find(ADAPTER_CONFIG)
        return read_json(file).get("modules_to_save") or [] if file else []


def find_source(name: str | Source, **hub: Any) -> Source:
    """
    Args:
        name (`str`): folder or Hub name, of a network or of a PEFT adapter. What was found before is given back.
        hub (*optional*): `revision`, `token` and `cache_dir`, for names on the Hub.

    Raises:
        `ValueError`: a folder that isn't there, or an adapter that doesn't say what it adapts.
    """
    if isinstance(name, Source):
        return name
    if not Path(name).exists() and not _may_be_on_hub(name):
        raise ValueError(f"There is no folder {name}, and it can't be a name on the Hub.")
    place = Place(name, {option: value for option, value in hub.items() if value is not None})
    adapter = place.find(ADAPTER_CONFIG)
    if adapter is None or place.weight_files():
        return Source(name, place)
    try:
        content = json.loads(adapter.read_text(encoding="utf-8"))
        base = content["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The adapter's {adapter} is damaged: {in_words(error)}") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter} doesn't say which model it adapts (base_model_name_or_path).")
    revision = {"revision": content["revision"]} if content.get("revision") else {}
    return Source(name, Place(base, {**place.hub, "revision": "main"} | revision), place)


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
