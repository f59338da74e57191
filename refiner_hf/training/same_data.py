"""Whether an interrupted run continues with the images and labels that it began with."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

from ..data.arguments import DataArguments
from ..data.sources import ImageData
from ..utils.files import read_json
from ..utils.text import counted, name_some


logger = logging.get_logger(__name__)

DATA_FILE = "_data.json"  # names with _ in front are never published


def facts_of_data(data: ImageData, args: DataArguments, *, evaluated: bool) -> dict[str, Any]:
    """
    Facts about a run's data, to compare with later. Images are read, with a progress bar (`datasets` remembers the
    result). Of a stream only the number of files is known, and the number of images if the stream gives it.

    Args:
        data: as the run uses them.
        args ([`DataArguments`]): the data options.
        evaluated (`bool`): whether the run evaluates.
    """
    digest = not args.embedded  # the embedded digits don't change, and Pillow encodes them again each time
    return {
        "labels": data.labels,
        "training": data.train.facts("training", digest),
        "evaluation": data.evaluation.facts("evaluation", digest) if evaluated else None,
        "evaluated_at_most": args.max_eval_samples,  # which may change
    }


def check_same_data(checkpoint: str, now: dict[str, Any], *, named: bool) -> None:
    """
    Compares with what the run that a checkpoint is of began with.

    Args:
        checkpoint: the folder to continue from, in the run's folder.
        now: from [`facts_of_data`].
        named (`bool`): whether the user has named this checkpoint, to continue from it with the images of now. Then
            a warning says what changed.

    Raises:
        `ValueError`: there are other labels; or, unless `named`, other images. The message says what changed and what
            to do.
    """
    begun = _read(Path(checkpoint).parent / DATA_FILE)
    _check_labels(checkpoint, begun["labels"] if begun else _labels_of(checkpoint), now["labels"], ordered=bool(begun))
    if begun is None:
        logger.warning(f"Nothing says with which images {checkpoint} was made: whether they are the same is unknown.")
        return
    changes = _changes(begun["training"], now["training"], "training")
    if begun["evaluated_at_most"] == now["evaluated_at_most"] and begun["evaluation"] and now["evaluation"]:
        changes += _changes(begun["evaluation"], now["evaluation"], "evaluation")
    if not changes:
        return
    said = f"The images aren't those that the run began with: {'; '.join(changes)}."
    if named:
        logger.warning(f"{said} The training continues with them; its curve isn't that of one training.")
        return
    raise ValueError(
        f"{said} The order of the images, the epochs and the steps depend on them. Restore them to continue; or give "
        f"another --output_dir (with --model_name_or_path {checkpoint} to begin with the learned weights); or, to "
        f"continue with the images that there are now, --resume_from_checkpoint {checkpoint}."
    )


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        begun = read_json(file)
        return {name: begun[name] for name in ("labels", "training", "evaluation", "evaluated_at_most")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged: it doesn't say with which images the run began. Delete it to continue without a "
            "comparison."
        ) from error


def _labels_of(checkpoint: str) -> list[str]:
    config = PreTrainedConfig.from_json_file(str(Path(checkpoint) / CONFIG_NAME))
    return [config.id2label[i] for i in sorted(config.id2label)]


def _check_labels(checkpoint: str, begun: list[str], now: list[str], ordered: bool) -> None:
    if begun == now or (not ordered and set(begun) == set(now)):  # a network may have its labels in another order
        return
    new, gone = ([label for label in some if label not in others] for some, others in ((now, begun), (begun, now)))
    changed = [f"new: {name_some(new)}"] * bool(new) + [f"gone: {name_some(gone)}"] * bool(gone) or ["another order"]
    raise ValueError(
        f"The labels aren't those that {checkpoint} was made with ({'; '.join(changed)}). "
        "Restore them to continue; or give another --output_dir, with "
        f"--model_name_or_path {checkpoint} to begin with the learned weights."
    )


def _changes(begun: dict[str, Any], now: dict[str, Any], what: str) -> list[str]:
    if begun.keys() != now.keys():
        return [f"the {what} images come in another way (--streaming)"]
    if begun.get("files") != now.get("files"):
        return [f"the {what} images come in {counted(now['files'], 'file')} and no longer in {begun['files']:,}"]
    if begun["images"] != now["images"]:
        return [f"the number of {what} images is now {_count(now)} and was {_count(begun)}"]
    if begun.get("contents") != now.get("contents"):
        return [f"there are as many {what} images, {_count(now)}, but others among them"]
    if begun.get("rows") != now.get("rows"):
        return [f"the {what} images come in another order or have other labels"]
    return []


def _count(facts: dict[str, Any]) -> str:
    return "unknown" if facts["images"] is None else f"{facts['images']:,}"
