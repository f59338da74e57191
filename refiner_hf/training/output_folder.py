"""The folder of a run: whether it can be written, and whether a run in it is to go on."""

import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..hub.files import without_paths
from .arguments import RefinerTrainingArguments
from .card import RUN_FILE


logger = logging.get_logger(__name__)

FINISHED_FILE = "train_results.json"
# Options that may differ when a run is taken up again.
_MAY_CHANGE = {"cache_dir", "refine_implementation", "max_eval_samples"}


def prepare_output_folder(args: RefinerTrainingArguments, arguments: dict[str, Any]) -> str | None:
    """Checks that the folder can be written and holds nothing to lose. Returns the checkpoint to go on from."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"The output folder {folder} can't be written: {error}. Give another --output_dir.") from error
    if (folder / FINISHED_FILE).exists():
        push = f" To publish it: {push_command(args)}" if args.push_to_hub else ""
        raise ValueError(f"{folder} holds a finished training run. Give another --output_dir.{push}")
    if not args.do_train:
        return None
    if args.resume_from_checkpoint and args.resume_from_checkpoint not in ("True", "true"):
        if not os.path.isdir(args.resume_from_checkpoint):
            raise ValueError(f"There is no checkpoint {args.resume_from_checkpoint}.")
        return args.resume_from_checkpoint
    if any(folder.iterdir()) and not (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} isn't empty and holds no training run of ours. Give another --output_dir.")
    checkpoint = _last_whole_checkpoint(folder)
    if checkpoint:
        _check_same_run(folder, arguments)
        logger.warning(f"Going on from {checkpoint}.")
    elif args.resume_from_checkpoint:
        raise ValueError(f"There is no checkpoint in {folder} to resume from.")
    return checkpoint


def _check_same_run(folder: Path, arguments: dict[str, Any]) -> None:
    """A run may go on for longer or on other hardware, but with the network and the data that it began with."""
    begun = without_paths(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    arguments = without_paths(arguments)
    changed = [
        f"{name} was {begun[group].get(name)!r} and is now {value!r}"
        for group in ("model", "data", "augmentation")
        for name, value in arguments[group].items()
        if name not in _MAY_CHANGE and begun[group].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run that broke off, but its options differ: {'; '.join(changed)}. Start it with the "
            "same options to go on, or give another --output_dir."
        )


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint)
        except (OSError, ValueError):
            logger.warning(f"{checkpoint} is incomplete (the run broke off while saving it); leaving it aside.")
    return None


def repository(args: RefinerTrainingArguments) -> str:
    """The repository's name on the Hub, by default the folder's."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push_command(args: RefinerTrainingArguments) -> str:
    """The command that publishes the finished folder."""
    words = ["refiner-push", "--folder", args.output_dir, "--repo_id", repository(args)]
    words += ["--branch", args.hub_revision] if args.hub_revision else []
    return shlex.join(words + ["--verify"] * args.verify_push)
