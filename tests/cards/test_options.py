"""No option's value reaches what is published, but those that say what was trained; and nothing secret in any."""

import copy
import dataclasses
import json

import pytest
from transformers import Trainer

from refiner_hf import RefinerConfig, RefinerForImageClassification
from refiner_hf.cards.card import make_card
from refiner_hf.cards.options import public_options, public_value, training_rows
from refiner_hf.cards.training import training_content
from refiner_hf.data.arguments import AugmentationArguments, DataArguments
from refiner_hf.hub.publish import public_files
from refiner_hf.training.arguments import RefinerTrainingArguments
from refiner_hf.training.model_arguments import ModelArguments
from refiner_hf.utils.run_files import RUN_FILE


SECRETS = {
    "a path": "/home/MARKED/settings.json",
    "a Windows path": "C:\\Users\\MARKED\\settings.json",
    "a token": "hf_MARKEDabcdefgh",
    "a token among words": "key=hf_MARKEDabcdefgh",
    "an address": "https://user:MARKED@intern.example/x",
    "a bucket": "s3://MARKED-bucket/runs",
    "a repository": "MARKED/private-space",
}
# Given for the card: its repository and branch, its folder's name, the license, and whether there is code.
FOR_THE_CARD = {"hub_model_id", "hub_revision", "output_dir", "weights_license", "with_code"}
FIELDS = sorted({field.name for field in dataclasses.fields(RefinerTrainingArguments)} - FOR_THE_CARD)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    config = RefinerConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    args = RefinerTrainingArguments(str(tmp_path_factory.mktemp("run") / "out"), use_cpu=True, report_to="none")
    return Trainer(RefinerForImageClassification(config), args)


def marked(trainer: Trainer, secret, *names: str) -> Trainer:
    """The trainer with this value for these options, wherever it lies in them."""
    trainer = copy.copy(trainer)
    trainer.args = copy.copy(trainer.args)
    for number, name in enumerate(names):
        value = [secret, [secret], {"a": secret}, {secret: 1}][number % 4]
        setattr(trainer.args, name, value)
    return trainer


def card_of(trainer: Trainer) -> str:
    return str(make_card(training_content(trainer, {"eval_accuracy": 0.5, "eval_loss": 1.0})))


@pytest.fixture
def without_architecture(monkeypatch):
    """Counting operations is most of the work of a card."""
    monkeypatch.setattr("refiner_hf.cards.training.describe_network", lambda model: "")


@pytest.mark.usefixtures("without_architecture")
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
class TestCards:
    def test_one_option(self, trainer, secret):
        """An option that isn't allowed isn't named, and a secret in one that is isn't shown."""
        for name in FIELDS:
            assert "MARKED" not in card_of(marked(trainer, secret, name)), name

    def test_all_options(self, trainer, secret):
        assert "MARKED" not in card_of(marked(trainer, secret, *FIELDS))

    def test_other_options_of_a_run(self, trainer, secret):
        """Numbers and names of policies are shown, of whatever group."""
        kinds = {"model": ModelArguments, "data": DataArguments, "augmentation": AugmentationArguments}
        arguments = {
            group: {field.name: secret for field in dataclasses.fields(kind)} for group, kind in kinds.items()
        }
        arguments["model"]["model_name_or_path"] = None
        content = training_content(trainer, {}, arguments=arguments)
        assert "MARKED" not in str(make_card(content))

    def test_published_files(self, trainer, secret, tmp_path):
        training = marked(trainer, secret, *FIELDS).args
        content = {"training": {name: getattr(training, name) for name in FIELDS}}
        (tmp_path / RUN_FILE).write_text(json.dumps(content))
        assert b"MARKED" not in public_files(tmp_path)[RUN_FILE]


def test_of_the_folder_only_its_name(trainer):
    trainer = copy.copy(trainer)
    trainer.args = copy.copy(trainer.args)
    trainer.args.output_dir = "/home/MARKED/digits"
    card = card_of(trainer)
    assert "MARKED" not in card and "# refiner-digits" in card


def test_what_was_trained_is_shown(trainer):
    args = copy.copy(trainer.args)
    args.learning_rate, args.ema_decay, args.lr_scheduler_kwargs = 3e-4, 0.999, {"min_lr": 1e-5}
    args.save_total_limit, args.dataloader_num_workers = 3, 2
    rows = dict(training_rows(args))
    assert rows["learning_rate"] == "0.0003" and rows["ema_decay"] == "0.999"
    assert rows["lr_scheduler_kwargs"] == "{'min_lr': 1e-05}" and rows["optim"].startswith("adamw")
    assert not {"save_total_limit", "dataloader_num_workers", "layer_decay"} & rows.keys()


def test_a_hidden_value_is_said_to_be_there(trainer):
    """Otherwise the card would claim the default."""
    args = copy.copy(trainer.args)
    args.optim_args = "file=/home/me/x"
    assert dict(training_rows(args))["optim_args"] == "not shown"


@pytest.mark.parametrize(
    "value", ["rand-m9-mstd0.5-inc1", "betas=(0.9, 0.99),eps=1e-8", 0.5, True, None, ["fsdp", 1], {"a": 2}, "cosine"]
)
def test_harmless_values_stay(value):
    assert public_value(value) == value


def test_files_keep_switches_numbers_and_what_was_trained():
    options = {"seed": 3, "push_to_hub": True, "optim": "adamw_torch", "run_name": "mine", "trackio_bucket_id": "a/b"}
    assert public_options(options) == {"seed": 3, "push_to_hub": True, "optim": "adamw_torch"}
