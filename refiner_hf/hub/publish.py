"""A saved model's folder to a repository on the Hub, in one commit."""

import logging
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from transformers import PreTrainedModel

from .. import modeling_refiner
from ..cards.card import basic_card
from ..cards.options import public_options
from ..cards.usage import for_repository
from ..configuration_refiner import RefinerConfig
from ..encoder_models_refiner import RefinedConfigMixin
from ..utils.files import read_json, to_json
from ..utils.image_config import image_shape_of
from ..utils.loading import has_image_processor, load_config, load_image_processor, load_network
from ..utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_source
from ..utils.paths import without_paths
from ..utils.run_files import AUTO_RECIPE, RUN_FILE
from ..utils.same_answers import fingerprint_of
from .code import AUTO_MAP, code_for, has_code, without_code
from .repository import PublishError, hub, prepare_repository, with_retries


logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CARD = "README.md"
# What a Trainer keeps for itself: its checkpoints and their state, a pickle that holds paths and the token, and
# codecarbon's file, which tells where the machine stands.
_NOT_PUBLISHED = (
    "checkpoint-*", "last-checkpoint", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth",
    "training_args.bin", "emissions.csv", AUTO_RECIPE, "_*", ".*",
)  # fmt: skip
# JSON files in which a Trainer writes paths and options.
_WITH_PATHS = ("trainer_state.json", RUN_FILE, "adapter_config.json")

# Files of a repository by their path in it: a local file, or the content itself.
Files = dict[str, Path | bytes]


@dataclass
class Published:
    """
    Where a folder went: the repository, the commit and its page; what its model answers to one fixed picture, whether
    it loads with code of its own, and of an adapter the base model; `shape` is that of its images.
    """

    repo_id: str
    commit: str
    url: str
    model_class: str
    processed: bool
    remote_code: bool
    fingerprint: np.ndarray
    shape: tuple[int, int, int]
    base_model: str | None = None


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = "Upload with refiner_hf",
    with_code: bool = False,
) -> Published:
    """
    Publishes a folder in one commit: weights, configuration, image processor, card, pictures, results, and with
    `with_code` the model's code. The folder isn't changed. Weights of an earlier commit that the new ones replace
    under other names (other shards) are deleted in the same commit.

    First everything local is checked (the model loads and answers, nothing is missing, the card can be read), then the
    token and the repository; then the upload begins. Pushing again after a failure sends only what isn't there yet.

    Args:
        folder: as training, conversion or `save_pretrained` left it, or a PEFT adapter of a model on the Hub. A card
            is made where it has none.
        repo_id: "name" or "namespace/name".
        private, branch, tag, token: see [`prepare_repository`].
        create_pr (`bool`, *optional*): open a pull request instead, also in somebody else's repository.
        message: of the commit.
        with_code (`bool`, *optional*): the repository loads with `trust_remote_code=True` where this package isn't
            installed. A folder that holds the code already is published with it in any case.

    Raises:
        `ValueError`: the folder holds no whole model for images, or its card can't be read or is refused by the Hub.
        [`PublishError`], `ValueError`: as [`prepare_repository`]; or the upload failed. Nothing local is lost.
    """
    folder = Path(folder)
    files = files_to_publish(folder)
    base_model = check_adapter(folder) if is_adapter(folder) else None
    model = check_model(folder)
    fingerprint = check_fingerprint(folder, model)
    card = read_card(folder)
    if base_model and with_code:
        raise ValueError("An adapter carries no code: publish its base model with code, and the adapter without.")
    if with_code and not isinstance(model.config, RefinerConfig | RefinedConfigMixin):
        raise ValueError(f"A {type(model).__name__} is transformers' own and needs no code: leave out --with_code.")
    remote_code = base_model is None and (with_code or has_code(folder))
    if with_code:
        files |= code_for(folder)
    elif not remote_code:
        files |= without_code(folder)

    repo_id = prepare_repository(repo_id, private=private, branch=branch, tag=tag, create_pr=create_pr, token=token)
    if card is None:
        logger.warning(f"{folder} has no model card: publishing one that says what the model shows of itself.")
        card = basic_card(model, repo_id, base_model)
    files[CARD] = str(for_repository(card, repo_id, remote_code, branch)).encode("utf-8")
    api = hub(token)
    try:
        commit = (open_pull_request if create_pr else commit_files)(api, repo_id, files, message, branch)
        if tag is not None:
            with_retries(
                lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True), f"Making the tag {tag}"
            )
    except PublishError as error:
        raise PublishError(f"{error} Nothing is lost: {folder} is unchanged, and a second push continues.") from error
    return Published(
        repo_id=repo_id,
        commit=commit.oid,
        url=commit.pr_url or f"{api.endpoint}/{repo_id}/tree/{tag or branch or 'main'}",
        model_class=type(model).__name__,
        processed=has_image_processor(str(folder)),
        remote_code=remote_code,
        fingerprint=fingerprint,
        shape=image_shape_of(model.config),
        base_model=base_model,
    )


def files_to_publish(folder: Path) -> Files:
    """
    The files of a model folder, without what only the Trainer needs.

    Raises:
        `ValueError`: no folder, no configuration, or weights that are missing (they are named).
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if is_adapter(folder):
        files = public_files(folder)
        if ADAPTER_WEIGHTS not in files:
            raise ValueError(f"{folder} lacks {ADAPTER_WEIGHTS}: the adapter's weights aren't there.")
        return files
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: it has no config.json. Give the folder of a finished run.")
    files = public_files(folder)
    missing = sorted(_weight_files(folder) - files.keys())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: the model's weights aren't all there.")
    return files


def public_files(folder: Path) -> Files:
    """All files of a folder, except what only the Trainer needs, and without paths of this machine."""
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(fnmatch(part, no) for part in inside.parts for no in _NOT_PUBLISHED):
            continue
        files[inside.as_posix()] = to_json(public_content(path)).encode() if path.name in _WITH_PATHS else path
    return files


def public_content(path: Path) -> dict[str, Any]:
    """
    What may be published of a JSON file in which a Trainer writes: no paths of this machine, and of the options of a
    training only those that say what was trained.
    """
    content = read_json(path)
    if path.name == RUN_FILE and isinstance(content.get("training"), dict):
        content["training"] = public_options(content["training"])
    return without_paths(content)


def check_model(folder: Path) -> PreTrainedModel:
    """
    Loads the folder's model, to be sure that others can.

    Raises:
        `ValueError`: the folder's model isn't one for images, or its weights don't fit its configuration.
    """
    source = find_source(str(folder))
    config = load_config(source)
    name = (config.architectures or [""])[0]
    auto = getattr(transformers, auto_class_for(name))
    if type(config) not in auto._model_mapping or (isinstance(config, RefinerConfig) and name not in _OWN):
        raise ValueError(f"{folder} holds a {name or config.model_type}, not one of {', '.join(_OWN)} or the like.")
    kind = getattr(modeling_refiner, name) if isinstance(config, RefinerConfig) else auto
    model = load_network(source, kind, config=config)
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"{folder} holds a {name}, which isn't a model for images. Publish it with its own push_to_hub."
        )
    return model


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, and not the network that it adapts."""
    return (folder / ADAPTER_CONFIG).is_file() and not any(
        (folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)
    )


def check_adapter(folder: Path) -> str:
    """
    The Hub name of an adapter's base model.

    Raises:
        `ValueError`: the base model is a folder of this machine, so that nobody else could load the adapter.
    """
    base = find_source(str(folder)).weights.name
    if Path(base).exists():
        raise ValueError(
            f"{folder} adapts the model in {base}, a folder of this machine that others don't have. Publish that one "
            f"first, and put its name on the Hub into base_model_name_or_path of {folder / ADAPTER_CONFIG}."
        )
    return base


def check_fingerprint(folder: Path, model: PreTrainedModel) -> np.ndarray:
    """
    The output of the folder's model for one fixed picture, through its image processor if it has one.

    Raises:
        `ValueError`: the processor can't be loaded or doesn't fit the model, or the answer isn't finite.
    """
    prepares = has_image_processor(str(folder))
    if not prepares:
        logger.warning(f"{folder} has no image processor: pipelines won't know how to prepare images.")
    try:
        processor = load_image_processor(str(folder)) if prepares else None
        fingerprint = fingerprint_of(model, processor, image_shape_of(model.config))
    except Exception as error:
        raise ValueError(f"The model in {folder} doesn't work with its image processor: {error}") from error
    if not np.isfinite(fingerprint).all():
        raise ValueError(f"The model in {folder} answers with numbers that aren't finite: its training broke.")
    return fingerprint


# RefinerForImageClassification -> AutoModelForImageClassification
_OWN = {target.split(".")[-1]: auto for auto, target in AUTO_MAP.items() if auto != "AutoConfig"}


def auto_class_for(model_class: str) -> str:
    """The Auto class that loads a model of this class."""
    classifies = "ForImageClassification" in model_class
    return _OWN.get(model_class) or ("AutoModelForImageClassification" if classifies else "AutoModel")


def read_card(folder: Path) -> ModelCard | None:
    """
    The folder's card, `None` where it has none.

    Raises:
        `ValueError`: it can't be read; the message says where.
    """
    path = folder / CARD
    if not path.exists():
        return None
    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The card {path} can't be read: {error}") from error


def commit_files(api: HfApi, repo_id: str, files: Files, message: str, branch: str | None) -> CommitInfo:
    """One commit that adds `files` and deletes the weights that they replace under other names."""

    def commit() -> CommitInfo:
        there = api.list_repo_files(repo_id, revision=branch)
        stale = [path for path in there if fnmatch(path, "model*.safetensors*") and path not in files]
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()]
            + [CommitOperationDelete(path) for path in stale if "/" not in path],
            commit_message=message,
            revision=branch,
        )

    # Trying again is safe: what was uploaded is kept, and a commit that was made unheard is found to be there.
    return with_retries(commit, f"Publishing to {repo_id}")


def open_pull_request(api: HfApi, repo_id: str, files: Files, message: str, branch: str | None = None) -> CommitInfo:
    """The same commit as a pull request."""
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    with_retries(
        lambda: api.preupload_lfs_files(repo_id, additions, create_pr=True, free_memory=False),
        f"Uploading to {repo_id}",
    )
    # Once: had an answer been lost, a second try would open a second pull request.
    return with_retries(
        lambda: api.create_commit(repo_id, additions, commit_message=message, create_pr=True),
        f"Opening a pull request in {repo_id}",
        tries=1,
    )


def _weight_files(folder: Path) -> set[str]:
    if (folder / WEIGHTS).exists() or not (folder / WEIGHTS_INDEX).exists():
        return {WEIGHTS}
    return {WEIGHTS_INDEX, *read_json(folder / WEIGHTS_INDEX)["weight_map"].values()}
