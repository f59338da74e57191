"""The folder of a run: whether it can be written, and whether it holds a run that is to be continued."""

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..utils.files import check_writable, read_json
from ..utils.locking import LOCK, locked_folder
from ..utils.paths import without_paths
from ..utils.resuming import changed_facts
from ..utils.run_files import RUN_FILE
from .arguments import RefinerTrainingArguments
from .checkpoints import DamagedCheckpointError, check_checkpoint


logger = logging.get_logger(__name__)

FINISHED_FILE = "train_results.json"
DRY_RUN = "_dry_run.png"  # names with _ in front are never published
# Options that may differ when a run is continued.
_MAY_CHANGE = {"cache_dir", "refine_implementation", "max_eval_samples"}


def prepare_output_folder(args: RefinerTrainingArguments, arguments: dict[str, Any], held: ExitStack) -> str | None:
    """
    Checks that the folder can be written and holds nothing that would be lost. Returns the checkpoint to continue
    from: the newest whole one, or the one that was named. The first process checks for all of them, and keeps other
    runs out of the folder until `held` is left.

    Raises:
        `OSError`: the folder can't be written, or another run is writing to it.
        `ValueError`: it holds a finished run, another run or something else; or there are checkpoints, but none
            that is whole.
    """
    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            check_writable(Path(args.output_dir), "The output folder", "Give another --output_dir.")
            held.enter_context(locked_folder(args.output_dir))
            found = [_prepare(args, arguments)]
        except (OSError, ValueError) as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _prepare(args: RefinerTrainingArguments, arguments: dict[str, Any]) -> str | None:
    folder = Path(args.output_dir)
    if (folder / FINISHED_FILE).exists():
        push = f" To publish it: {push_command(args)}" if args.push_to_hub else ""
        raise ValueError(f"{folder} holds a finished training run. Give another --output_dir.{push}")
    if not args.do_train:
        return None
    streamed = arguments["data"]["streaming"]
    if args.resume_from_checkpoint and args.resume_from_checkpoint not in ("True", "true"):
        named = Path(args.resume_from_checkpoint)
        if not named.is_dir():
            raise ValueError(f"There is no checkpoint {named}.")
        try:
            check_checkpoint(named, args, streamed=streamed)
        except DamagedCheckpointError as error:
            raise ValueError(f"The checkpoint {named} can't be used: {error}. Name another one.") from error
        return args.resume_from_checkpoint
    if any(path.name not in (LOCK, DRY_RUN) for path in folder.iterdir()) and not (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} isn't empty and holds no training run of ours. Give another --output_dir.")
    checkpoint = _last_whole_checkpoint(folder, args, streamed)
    if checkpoint:
        _check_same_run(folder, arguments, checkpoint)
        logger.warning(f"Continuing from {checkpoint}.")
    elif args.resume_from_checkpoint:
        raise ValueError(f"There is no checkpoint in {folder} to resume from.")
    return checkpoint


def _check_same_run(folder: Path, arguments: dict[str, Any], checkpoint: str) -> None:
    """A run may continue for longer or on other hardware, but only with the network and data that it began with."""
    groups = ("model", "data", "augmentation")
    try:
        begun = without_paths(read_json(folder / RUN_FILE))
        begun = {group: dict(begun[group]) for group in groups}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RUN_FILE} is damaged: it doesn't say with which options the run began. Give another "
            f"--output_dir; or, to continue with the options given now, --resume_from_checkpoint {checkpoint}."
        ) from error
    arguments = without_paths(arguments)
    changed = [
        change
        for group in groups
        for change in changed_facts(
            begun[group], {name: value for name, value in arguments[group].items() if name not in _MAY_CHANGE}
        )
    ]
    if changed:
        raise ValueError(
            f"{folder} holds an interrupted run, but its options differ: {'; '.join(changed)}. Start it with the same "
            "options to continue it, or give another --output_dir."
        )


def _last_whole_checkpoint(folder: Path, args: RefinerTrainingArguments, streamed: bool) -> str | None:
    """The newest checkpoint that was written to its end, and of which every file is still what was written."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    damaged = []
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if not (checkpoint / TRAINER_STATE_NAME).exists():  # the Trainer writes it last
            logger.warning(
                f"{checkpoint} is incomplete, because the run was interrupted while it was saved. It is not used."
            )
            continue
        try:
            check_checkpoint(checkpoint, args, streamed=streamed)
            return str(checkpoint)
        except DamagedCheckpointError as error:
            damaged.append(f"{checkpoint.name}: {error}")
            logger.warning(f"{checkpoint} is damaged: {error}. It is not used.")
    if damaged:
        raise ValueError(
            f"No checkpoint in {folder} can be used ({'; '.join(damaged)}). To begin again from the start, delete "
            "them or give another --output_dir."
        )
    return None


def repository(args: RefinerTrainingArguments) -> str:
    """The repository's name on the Hub, by default the folder's."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push_command(args: RefinerTrainingArguments) -> str:
    """The command that publishes the finished folder."""
    words = ["refiner", "push", "--folder", args.output_dir, "--repo_id", repository(args)]
    words += ["--branch", args.hub_revision] if args.hub_revision else []
    return shlex.join(words + ["--verify"] * args.verify_push)
