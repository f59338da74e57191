"""Checks that a checkpoint is whole, before anything is loaded from it."""

import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError, loads
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import AutoConfig, AutoModelForImageClassification, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..data.streams import StreamPosition
from ..utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..utils.run_files import EMA_FOLDER
from ..utils.text import counted
from .arguments import RefinerTrainingArguments


_RANDOM_NUMBERS, _POSITIONS = "rng_state*.pth", "stream_position_*.json"
_NUMBER = (int, float)
# What is read of the Trainer's state when a run continues.
_STATE: dict[str, Any] = {
    "global_step": int, "max_steps": int, "num_train_epochs": int, "train_batch_size": int, "epoch": _NUMBER,
    "total_flos": _NUMBER, "log_history": list, "stateful_callbacks": dict,
    "best_metric": (*_NUMBER, type(None)), "best_model_checkpoint": (str, type(None)),
}  # fmt: skip


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint can't be used; the message names it and says why."""


def check_checkpoint(folder: Path, args: RefinerTrainingArguments, *, streamed: bool) -> None:
    """
    Opens every file that is needed to continue, without running code in it, and reads it to its end.

    Args:
        folder: of the checkpoint of an image classifier.
        args ([`RefinerTrainingArguments`]): of the run that continues.
        streamed (`bool`): whether its training images are a stream.

    Raises:
        [`DamagedCheckpointError`]: the first file found that is missing, cut, changed, of another shape than the
            Trainer writes, or that holds code.
    """
    state = _check_state(folder)
    if not (args.fsdp or args.deepspeed):  # these have formats of their own
        _check_weights(folder)
        if args.ema_decay and (folder / EMA_FOLDER).is_dir():
            _check_weights(folder / EMA_FOLDER)
    if not args.save_only_model:
        if not (args.fsdp or args.deepspeed):
            _check_optimizer(folder / OPTIMIZER_NAME)
        _check_scheduler(folder / SCHEDULER_NAME)
        _check_random_numbers(folder)
        if (folder / SCALER_NAME).exists():
            _load(folder / SCALER_NAME)
    _check_positions(folder, streamed)
    best = state.best_model_checkpoint and Path(state.best_model_checkpoint)
    if args.load_best_model_at_end and best and best.is_dir() and best.resolve() != folder.resolve():
        _check_weights(best)


@contextmanager
def explain_load_errors(checkpoint: str | Path) -> Iterator[None]:
    """
    While a checkpoint is loaded.

    Raises:
        `ValueError`: what is in it is of another network or another optimizer.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"The checkpoint {checkpoint} doesn't fit this training: {error}. Continue with the network and the "
            "options that it was made with."
        ) from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    name = f"{file.parent.name}/{file.name}" if file.parent.name == EMA_FOLDER else file.name
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{name} is missing") from error
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{name} {error}") from error
    except (
        OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, SafetensorError,
        StrictDataclassError, UnpicklingError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise DamagedCheckpointError(
            f"{name} can't be read ({(str(error) or repr(error)).splitlines()[0]})"
        ) from error


def _check_state(folder: Path) -> TrainerState:
    file = folder / TRAINER_STATE_NAME
    with _reading(file):
        state = TrainerState.load_from_json(str(file))
        for name, kind in _STATE.items():
            value = getattr(state, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise DamagedCheckpointError(f"says that {name} is {str(value)[:50]!r}")
        if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in state.log_history):
            raise DamagedCheckpointError("has a log of another shape")
        if "TrainerControl" not in state.stateful_callbacks:
            raise DamagedCheckpointError("lacks the state of the Trainer's control")
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) != state.global_step:
            raise DamagedCheckpointError(f"is of step {state.global_step}")
    return state


def _check_weights(folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).exists():
        _check_tensors(folder / ADAPTER_WEIGHTS, {})
        return
    with _reading(folder / CONFIG_NAME):
        _json(folder / CONFIG_NAME)
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights():
            expected = AutoModelForImageClassification.from_config(config).state_dict()
    files = [folder / SAFE_WEIGHTS_NAME]
    if not files[0].exists() and (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        with _reading(folder / SAFE_WEIGHTS_INDEX_NAME):
            files = sorted({folder / name for name in _json(folder / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values()})
    for file in files:
        _check_tensors(file, expected)
    if expected:
        with _reading(files[0]):
            raise DamagedCheckpointError(f"lacks {counted(len(expected), 'tensor')}, such as {next(iter(expected))}")


def _check_tensors(file: Path, expected: dict[str, torch.Tensor]) -> None:
    """Takes what is found out of `expected`."""
    with _reading(file), safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            tensor, wanted = tensors.get_tensor(name), expected.pop(name, None)
            if wanted is not None and tensor.shape != wanted.shape:
                raise DamagedCheckpointError(
                    f"has {name} in the shape {tuple(tensor.shape)} and not {tuple(wanted.shape)}"
                )
            if not tensor.isfinite().all():
                raise DamagedCheckpointError(f"holds infinite numbers or NaN in {name}")


def _check_optimizer(file: Path) -> None:
    content = _load(file)
    with _reading(file):
        for group in content["param_groups"]:
            if not {"params", "lr"} <= group.keys():
                raise DamagedCheckpointError("has groups of parameters of another shape")
        for state in content["state"].values():
            for value in state.values():
                if torch.is_tensor(value) and not value.isfinite().all():
                    raise DamagedCheckpointError("holds infinite numbers or NaN")


def _check_scheduler(file: Path) -> None:
    content = _load(file)
    with _reading(file):
        if not isinstance(content["last_epoch"], int):
            raise DamagedCheckpointError("doesn't say at which step it is")


def _check_random_numbers(folder: Path) -> None:
    files = sorted(folder.glob(_RANDOM_NUMBERS))
    if not files:
        raise DamagedCheckpointError("rng_state.pth is missing")
    for file in files:
        content = _load(file)
        with _reading(file):
            random.Random().setstate(content["python"])
            np.random.RandomState().set_state(content["numpy"])
            torch.Generator().set_state(content["cpu"])


def _check_positions(folder: Path, streamed: bool) -> None:
    ranks = [file.stem.rsplit("_", 1)[1] for file in folder.glob(_POSITIONS)]
    if streamed and not ranks:
        raise DamagedCheckpointError("stream_position_0.json is missing")
    for rank in ranks:
        try:
            StreamPosition.load(folder, int(rank))
        except ValueError as error:
            raise DamagedCheckpointError(str(error)) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = loads(file.read_text(encoding="utf-8"))
    except JSONDecodeError as error:
        raise DamagedCheckpointError(f"isn't JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedCheckpointError("has another shape")
    return content


def _load(file: Path) -> dict[str, Any]:
    """What torch saved, as the Trainer will load it, and with nothing in it that would be run."""
    with _reading(file), safe_globals():
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():  # reads all of it; torch doesn't look at these sums
                raise DamagedCheckpointError(f"was changed or damaged in its part {wrong}")
        if code := get_unsafe_globals_in_checkpoint(file):
            raise DamagedCheckpointError(f"holds code, which would be run by opening it: {', '.join(code)}")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise DamagedCheckpointError(f"holds a {type(content).__name__} in place of a dict")
        return content
