"""
What we override and call of transformers' Trainer is as it was when we wrote it. A new release that changes it breaks
this test, and not a training.
"""

import ast
import inspect

import pytest
from transformers import Trainer

from refiner_hf import RefinerTrainingArguments
from refiner_hf.training.pushing import PushingTrainer
from refiner_hf.training.trainer import RefinerTrainer


# Methods that our trainers override, with their parameters. transformers 5.17 has the ones in brackets not yet.
OVERRIDDEN = {
    "_get_train_sampler": "train_dataset",
    "_hp_search_setup": "trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    "_push_from_checkpoint": "checkpoint_folder",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_rng_state": "output_dir",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "create_model_card": "language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "get_decay_parameter_names": "model",
    "get_eval_dataloader": "eval_dataset",
    "get_optimizer_cls_and_kwargs": "model",  # after the arguments: it is static
    "get_train_dataloader": "",
    "init_hf_repo": "token [private]",
    "log": "logs start_time",
    "push_to_hub": "commit_message blocking token revision [private] kwargs",
    "save_model": "output_dir _internal_call",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "training_step": "model inputs num_items_in_batch",
}
# Private methods that they call.
CALLED = {"_finish_current_push": "", "_get_output_dir": "trial"}
# Attributes of the Trainer that ours give another value on purpose.
SET_ON_PURPOSE = {"hub_model_id", "label_names", "label_smoother", "model", "push_in_progress"}


def parameters(name: str) -> list[str]:
    return list(inspect.signature(getattr(Trainer, name)).parameters)[1:]


def test_every_method_that_is_overridden_is_named_here():
    ours = {name for kind in (RefinerTrainer, PushingTrainer) for name in vars(kind) if not name.startswith("__")}
    assert {name for name in ours if hasattr(Trainer, name)} == OVERRIDDEN.keys()


def test_their_parameters():
    for name, expected in (OVERRIDDEN | CALLED).items():
        newest = expected.replace("[", "").replace("]", "").split()
        oldest = [each for each in expected.split() if not each.startswith("[")]
        assert parameters(name) in (newest, oldest), name


def names_of_self(setting: bool) -> set[str]:
    """The X of every `self.X` and `super().X` in our trainers: those that are set, or those that are read."""
    found = set()
    for kind in (RefinerTrainer, PushingTrainer):
        for node in ast.walk(ast.parse(inspect.getsource(kind))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) == setting:
                if ast.unparse(node.value) in ("self", "super()"):
                    found.add(node.attr)
    return found


@pytest.fixture
def stock(tiny_model, tmp_path):
    return Trainer(tiny_model(), RefinerTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_what_they_use_is_there(stock):
    ours = {name for kind in (RefinerTrainer, PushingTrainer) for name in vars(kind)}
    used = names_of_self(setting=False) - names_of_self(setting=True) - ours
    assert len(used) > 15 and [name for name in used if not hasattr(stock, name)] == []


def test_their_own_attributes_are_not_the_trainers(stock):
    """A new release that uses one of these names would have it overwritten."""
    assert {name for name in names_of_self(setting=True) if hasattr(stock, name)} <= SET_ON_PURPOSE
