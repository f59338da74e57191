"""A Trainer that pushes to the Hub what should be there."""

import os
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..cards.card import make_card
from ..cards.training import last_measured, training_content
from ..hub.code import code_for
from ..hub.publish import CARD, Files, Published, check_adapter, commit_files, public_files, publish_folder
from ..hub.repository import hub, prepare_repository


logger = logging.get_logger(__name__)

# Beginnings of the names that a model, its processor or an adapter is saved under; the rest is the Trainer's.
_MODEL_FILES = ("adapter", "config", "model", "preprocessor", "ema/", CARD)
# And of what is needed to continue from a checkpoint, beside these and `trainer_state.json`.
_STATE_FILES = ("optimizer", "scheduler", "scaler", "rng_state")
# Folders of links to a checkpoint that is being pushed. Names with _ in front are never published.
_LINKS = "_push-"


class PushingTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose `push_to_hub`, argument and method, with every `hub_strategy`,

    - checks the token's rights, the repository's name and its visibility *before* training, and makes the repository
      and the branch `hub_revision`;
    - makes one commit a push, with a card of what was measured and without files that hold paths of this machine; with
      `with_code` in its arguments also the model's code. See [`~refiner_hf.hub.publish.publish_folder`];
    - never stops a training because a push failed: a warning says so, and the next push uploads everything.

    An adapter (PEFT) is pushed the same way, with the card that PEFT makes. Its base model's configuration, which
    knows the labels, is saved beside it.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not isinstance(self.model, PreTrainedModel) and hasattr(self.model, "peft_config"):
            self.model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)
        # A pickle of the arguments, with paths and the token in plain text, that nothing reads.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        args = self.args
        self.hub_model_id = args.hub_model_id = prepare_repository(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            private=args.hub_private_repo if private is None else private,
            branch=args.hub_revision,
            token=token or args.hub_token,
        )
        for left in Path(args.output_dir).glob(f"{_LINKS}*"):  # by a run that was killed while it pushed
            shutil.rmtree(left, ignore_errors=True)
        self.push_in_progress = None
        self._hub = hub(token or args.hub_token)  # one client, whose background jobs run one after the other

    def create_model_card(self, **kwargs) -> None:
        """Writes a card of what was trained and measured. Keywords as [`~transformers.Trainer.create_model_card`]."""
        if not self._trains_a_network():
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            self._card(**kwargs).save(Path(self.args.output_dir) / CARD)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Published | CommitInfo | Future | None:
        """
        Saves the model, writes its card and publishes the output folder, see [`~transformers.Trainer.push_to_hub`].

        Returns:
            [`~refiner_hf.hub.publish.Published`] (for an adapter, the `CommitInfo`), or a `Future` of it unless
            `blocking`; `None` in other processes.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        return self.publish(commit_message, blocking=blocking, token=token, branch=revision)

    def publish(
        self, message: str, *, blocking: bool = True, token: str | None = None, branch: str | None = None
    ) -> Published | CommitInfo | Future | None:
        """Publishes the output folder as it is, once pushes that are under way have ended."""
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()

        folder, branch = Path(self.args.output_dir), branch or self.args.hub_revision
        token = token or self.args.hub_token

        def push() -> Published | CommitInfo:
            if self._trains_a_network():
                return publish_folder(
                    folder, self.hub_model_id, branch=branch, token=token, message=message, with_code=self._with_code
                )
            try:
                check_adapter(folder)
            except ValueError as error:
                logger.warning(str(error))
            prepare_repository(self.hub_model_id, branch=branch, token=token)
            return commit_files(hub(token), self.hub_model_id, public_files(folder), message, branch)

        return push() if blocking else self._hub.run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        The Trainer calls this after each save. One commit, made in the background during the training: the model
        at this step with its card so far, and with the strategies `checkpoint` and `all_checkpoints` everything that
        is needed to continue from here, in `last-checkpoint` or `checkpoint-STEP`.
        """
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        links = Path(args.output_dir) / f"{_LINKS}{self.state.global_step}"
        try:
            # The upload reads the files later, when the Trainer may have deleted this checkpoint: keep links to them.
            checkpoint = links / Path(checkpoint_folder).name
            shutil.copytree(checkpoint_folder, checkpoint, copy_function=_link)
            files, message = self._files_of(checkpoint), f"Training in progress, step {self.state.global_step}"
        except Exception as error:
            _push_failed(error, links)
            return

        def push() -> None:
            try:
                commit_files(self._hub, self.hub_model_id, files, message, args.hub_revision)
                shutil.rmtree(links, ignore_errors=True)
            except Exception as error:
                _push_failed(error, links)

        job = self._hub.run_as_future(push)
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _files_of(self, checkpoint: Path) -> Files:
        """The files of one push during the training."""
        saved = public_files(checkpoint)
        files = {name: path for name, path in saved.items() if name.startswith(_MODEL_FILES)}
        if self._trains_a_network():
            files |= code_for(checkpoint) if self._with_code else {}
            files[CARD] = str(self._card()).encode("utf-8")
        if self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            return files
        folder = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        state = {path.name: path for path in checkpoint.iterdir() if path.name.startswith(_STATE_FILES)}
        return files | {f"{folder}/{name}": content for name, content in (saved | state).items()}

    def _card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,  # the model knows its task
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> ModelCard:
        facts = training_content(self, last_measured(self))
        said = {
            "language": language,
            "license": license,
            "title": model_name,
            "base_model": finetuned_from,
            "dataset_id": _first(dataset_tags),
            "dataset_name": _first(dataset) or _first(dataset_tags),
            "dataset_split": _first(dataset_args),
        }
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        tags += getattr(self.model, "model_tags", None) or []
        return make_card(replace(facts, tags=tags, **{name: value for name, value in said.items() if value}))

    @property
    def _with_code(self) -> bool:
        return getattr(self.args, "with_code", False)

    def _trains_a_network(self) -> bool:
        return isinstance(self.model, PreTrainedModel)


def _first(values: str | list[str] | None) -> str | None:
    return values if isinstance(values, str) or not values else values[0]


def _push_failed(error: Exception, links: Path) -> None:
    shutil.rmtree(links, ignore_errors=True)
    logger.warning(f"A push during the training failed. The training continues: {error}")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
