"""`--push_to_hub`, with every strategy, to the local Hub."""

import json
import shlex
import threading

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load
from transformers import TrainerCallback, TrainingArguments

from refiner_hf import RefinerForImageClassification
from refiner_hf.commands.push import main as push
from refiner_hf.commands.train import main
from refiner_hf.hub.publish import publish_folder
from refiner_hf.hub.repository import PublishError
from refiner_hf.hub.verification import verify
from refiner_hf.training import pushing, run
from refiner_hf.training.trainer import RefinerTrainer

from ..conftest import save_with_processor
from ..images import write_folder
from ..parsed_card import Card, shown
from .test_run import QUICK
from .test_trainer import Images, arguments, losses


FINISHED = {
    ".gitattributes", "README.md", "model.safetensors", "config.json", "preprocessor_config.json",
    "learning_curve.png", "confusion_matrix.png", "confusion_matrix.csv", "by_label.csv", "all_results.json",
    "eval_results.json", "baseline_results.json", "train_results.json", "trainer_state.json",
    "training_arguments.json",
}  # fmt: skip
ON_THE_WAY = {".gitattributes", "README.md", "model.safetensors", "config.json", "preprocessor_config.json"}
CHECKPOINT = {
    "model.safetensors", "config.json", "preprocessor_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture
def token(hub, monkeypatch):
    monkeypatch.setattr("refiner_hf.hub.repository.time.sleep", lambda seconds: None)
    hub.add_user("alice")
    return hub.add_token("alice")


@pytest.fixture
def options(photos, tmp_path, token):
    return [
        "defaults",
        "--train_dir", str(photos), "--output_dir", str(tmp_path / "out"), *QUICK, "--num_train_epochs", "2",
        "--train_val_split", "0.25", "--save_strategy", "epoch", "--eval_strategy", "epoch",
        "--push_to_hub", "--hub_token", token, "--hub_model_id", "model",
    ]  # fmt: skip


class TestStrategies:
    """Two epochs, so two saves: what is on the Hub after each, and at the end."""

    def history(self, hub):
        return [(commit.title, commit.files) for commit in reversed(hub.repositories["alice/model"].history())][1:]

    def test_end(self, hub, options):
        result = main([*options, "--hub_strategy", "end"])
        ((title, files),) = self.history(hub)
        assert title == "End of training" and set(files) == FINISHED
        assert result.published.repo_id == "alice/model"
        assert 'model="alice/model")' in files["README.md"].decode()

    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
    def test_on_the_way(self, hub, options, tmp_path, token, strategy):
        options = [*options, "--hub_strategy", strategy, "--hub_always_push", "--save_total_limit", "1"]
        result = main([*options, "--load_best_model_at_end"])
        (first, after_first), (second, after_second), (last, in_the_end) = self.history(hub)
        assert (first, second) == ("Training in progress, step 3", "Training in progress, step 6")

        folders = {"every_save": [[], []], "checkpoint": [["last-checkpoint"]] * 2}
        folders["all_checkpoints"] = [["checkpoint-3"], ["checkpoint-3", "checkpoint-6"]]
        for files, there, base in (
            (after_first, folders[strategy][0], ON_THE_WAY),
            (after_second, folders[strategy][1], ON_THE_WAY),
            (in_the_end, folders[strategy][1], FINISHED),
        ):
            assert set(files) == base | {f"{folder}/{name}" for folder in there for name in CHECKPOINT}
        assert "Training is still going on: step 3 of 6" in after_first["README.md"].decode()
        assert "still going on" not in in_the_end["README.md"].decode()
        assert (
            load(bytes(after_first["model.safetensors"])).keys() == load(bytes(in_the_end["model.safetensors"])).keys()
        )
        assert after_first["model.safetensors"] != in_the_end["model.safetensors"]

        for files in (after_first, after_second, in_the_end):
            for name, content in files.items():
                assert str(tmp_path).encode() not in content and token.encode() not in content, name
        assert not [path for path in result.folder.iterdir() if path.name.startswith("_push")]

    def test_training_is_the_same_as_without(self, hub, options, tmp_path):
        pushed = main([*options, "--hub_strategy", "every_save", "--hub_always_push"])
        alone = main([*options[:3], "--output_dir", str(tmp_path / "alone"), *options[5:-5]])
        assert alone.published is None
        a, b = (load((folder / "model.safetensors").read_bytes()) for folder in (pushed.folder, alone.folder))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    def test_fine_tuned_from_the_hub(self, hub, options, token, tiny_model, tmp_path):
        base = tiny_model(num_hidden_layers=2, num_attention_heads=2)
        publish_folder(save_with_processor(base, tmp_path / "base"), "alice/base", token=token)
        main([*options, "--model_name_or_path", "alice/base", "--num_train_epochs", "1"])
        assert Card(hub.repositories["alice/model"].files()["README.md"]).data["base_model"] == "alice/base"

    def test_named_after_its_folder_by_default(self, hub, options):
        options = options[: options.index("--hub_model_id")]
        assert main([*options, "--hub_strategy", "end"]).published.repo_id == "alice/out"
        with pytest.raises(SystemExit, match="finished training run.* --repo_id out"):
            main(options)

    def test_private_branch_with_code_and_verified(self, hub, options, monkeypatch):
        verified = []
        monkeypatch.setattr(run, "verify", lambda published, token: verified.append(verify(published, token=token)))
        options = [*options, "--hub_private_repo", "True", "--hub_revision", "trial", "--with_code", "--verify_push"]
        main([*options, "--hub_strategy", "every_save", "--hub_always_push"])
        assert len(verified) == 1 and verified[0] < 1e-5
        on_the_way = hub.repositories["alice/model"].history("trial")[1].files
        assert "modeling_refiner.py" in on_the_way and "auto_map" in json.loads(on_the_way["config.json"])
        assert 'revision="trial", trust_remote_code=True' in on_the_way["README.md"].decode()
        repository = hub.repositories["alice/model"]
        assert repository.private and set(repository.files()) == {".gitattributes"}
        assert FINISHED < repository.files("trial").keys() and "modeling_refiner.py" in repository.files("trial")
        assert 'revision="trial", trust_remote_code=True' in repository.files("trial")["README.md"].decode()


class TestBeforeTraining:
    @pytest.mark.parametrize("role", ["read", "expired", "wrong"])
    def test_a_token_that_can_not_push(self, hub, options, tmp_path, role):
        bad = "hf_wrong" if role == "wrong" else hub.add_token("alice", "read", expired=role == "expired")
        with pytest.raises(SystemExit, match="may only read|wrong or has expired"):
            main([*options, "--hub_token", bad])
        assert not list((tmp_path / "out").iterdir())

    def test_somebody_elses_repository(self, options, tmp_path):
        with pytest.raises(SystemExit, match="can't write to bob/model"):
            main([*options, "--hub_model_id", "bob/model"])
        assert not list((tmp_path / "out").iterdir())

    def test_a_license_that_the_hub_does_not_know(self, options, tmp_path):
        with pytest.raises(SystemExit, match="(?i)license"):
            main([*options, "--weights_license", "My own!"])
        assert not list((tmp_path / "out").iterdir())

    def test_an_evaluation_has_nothing_to_push(self, hub, options):
        with pytest.raises(SystemExit, match="nothing to push"):
            main([*options, "--model_name_or_path", "somewhere", "--do_eval"])
        assert not hub.requests

    def test_a_trainer_of_ones_own(self, hub, token, tiny_model, tmp_path):
        args = arguments(tmp_path, push_to_hub=True, hub_token="hf_wrong", hub_model_id="alice/model")
        with pytest.raises(PublishError, match="wrong or has expired"):
            RefinerTrainer(tiny_model(), args, train_dataset=Images())


class TestTrouble:
    @pytest.mark.parametrize("fault", ["server", "interrupt"])
    def test_the_last_push_fails(self, hub, options, tmp_path, token, monkeypatch, fault):
        """The folder is whole, and the message's own command publishes it; the same training again says it, too."""
        options = [
            *options,
            "--hub_revision",
            "trial",
            "--hub_strategy",
            "end",
            "--output_dir",
            str(tmp_path / "my out"),
        ]
        if fault == "server":
            hub.fail("POST", "/commit/", status=500, times=1000)
        else:
            monkeypatch.setattr(RefinerTrainer, "publish", interrupt)
        with pytest.raises(SystemExit) as stopped:
            main(options)
        assert "Training is finished" in str(stopped.value)
        assert FINISHED - {".gitattributes"} <= {path.name for path in (tmp_path / "my out").iterdir()}
        with pytest.raises(SystemExit) as again:
            main(options)
        hub.faults.clear()
        monkeypatch.setenv("HF_TOKEN", token)
        for message in (str(stopped.value), str(again.value)):
            push(shlex.split(message.split("refiner push ")[1]))
            assert set(hub.repositories["alice/model"].files("trial")) == FINISHED

    def test_a_push_on_the_way_fails(self, hub, options, monkeypatch):
        said = []
        monkeypatch.setattr(pushing.logger, "warning", said.append)
        hub.fail("POST", "/commit/", status=403)
        main([*options, "--hub_strategy", "every_save", "--hub_always_push"])
        assert [line for line in said if "The training continues" in line]
        history = hub.repositories["alice/model"].history()
        assert [commit.title for commit in history[:2]] == ["End of training", "Training in progress, step 6"]
        assert set(history[0].files) == FINISHED

    @pytest.mark.parametrize("broken", ["_link", "training_content"])
    def test_a_push_on_the_way_can_not_be_prepared(self, hub, options, monkeypatch, broken):
        """A full disk, or a card that can't be made."""
        said = []
        monkeypatch.setattr(pushing.logger, "warning", said.append)
        monkeypatch.setattr(pushing, broken, lambda *args: 1 / 0)
        result = main([*options, "--hub_strategy", "every_save", "--hub_always_push"])
        assert len([line for line in said if "The training continues" in line]) == 2
        assert [commit.title for commit in hub.repositories["alice/model"].history()][0] == "End of training"
        assert not list(result.folder.glob("_push*"))

    def test_a_file_system_without_links(self, hub, options, monkeypatch):
        def refuse(*args):
            raise OSError

        monkeypatch.setattr(pushing.os, "link", refuse)
        main([*options, "--hub_strategy", "checkpoint", "--hub_always_push"])
        assert "last-checkpoint/optimizer.pt" in hub.repositories["alice/model"].files()

    def test_saves_while_a_push_is_under_way_are_not_pushed(self, hub, options, monkeypatch):
        """Unless `hub_always_push`. The last push waits for the one that is under way."""
        finish, commit_files = RefinerTrainer._finish_current_push, pushing.commit_files
        ending = threading.Event()
        monkeypatch.setattr(pushing, "commit_files", lambda *args: (ending.wait(60), commit_files(*args)))
        monkeypatch.setattr(RefinerTrainer, "_finish_current_push", lambda self: (ending.set(), finish(self)))
        main([*options, "--hub_strategy", "every_save"])
        titles = [commit.title for commit in hub.repositories["alice/model"].history()]
        assert titles == ["End of training", "Training in progress, step 3", "initial commit"]

    def test_a_checkpoint_that_is_deleted_while_it_is_pushed(self, hub, options, monkeypatch):
        deleted, commit_files = threading.Event(), pushing.commit_files

        def slowly(*args):
            deleted.wait(60)
            return commit_files(*args)

        monkeypatch.setattr(pushing, "commit_files", slowly)
        rotate = RefinerTrainer._finish_current_push
        monkeypatch.setattr(RefinerTrainer, "_finish_current_push", lambda self: (deleted.set(), rotate(self)))
        result = main([*options, "--hub_strategy", "checkpoint", "--hub_always_push", "--save_total_limit", "1"])
        assert not (result.folder / "checkpoint-3").exists()
        titles = [commit.title for commit in hub.repositories["alice/model"].history()]
        assert titles[1:3] == ["Training in progress, step 6", "Training in progress, step 3"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_going_on_elsewhere_from_the_last_checkpoint_on_the_hub(hub, token, tiny_model, tmp_path):
    fields = dict(num_train_epochs=4, save_strategy="epoch", norm_statistics_images=0)
    unbroken = RefinerTrainer(
        tiny_model(drop_path_rate=0.2), arguments(tmp_path / "a", **fields), train_dataset=Images()
    )
    unbroken.train()

    pushed = dict(push_to_hub=True, hub_token=token, hub_model_id="alice/model", hub_strategy="checkpoint")
    broken = RefinerTrainer(
        tiny_model(drop_path_rate=0.2),
        arguments(tmp_path / "b", **fields, **pushed, hub_always_push=True),
        train_dataset=Images(),
        callbacks=[StopAt(8)],
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken._finish_current_push()

    there = snapshot_download("alice/model", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "c", token=token)
    resumed = RefinerTrainer(
        tiny_model(drop_path_rate=0.2), arguments(tmp_path / "d", **fields), train_dataset=Images()
    )
    resumed.train(resume_from_checkpoint=f"{there}/last-checkpoint")
    assert len(losses(resumed)) == 12 and losses(resumed) == pytest.approx(losses(unbroken), rel=1e-5)


class TestOwnTrainer:
    """`trainer.push_to_hub()` as in any script with a Trainer."""

    def trainer(self, model, folder, token, **fields):
        args = arguments(folder, hub_token=token, hub_model_id="alice/model", **fields)
        metrics = {"compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}}
        return RefinerTrainer(model, args, train_dataset=Images(), eval_dataset=Images(10), **metrics)

    def test_card_of_what_is_known(self, hub, token, tiny_model, tmp_path):
        trainer = self.trainer(tiny_model(), tmp_path / "out", token)
        trainer.train()
        measured = trainer.evaluate()
        published = trainer.push_to_hub(
            license="mit", dataset="Noise", dataset_tags="alice/noise", tags=["mine"], language="en",
            finetuned_from="alice/base", model_name="A name", tasks="image-classification",
        )  # fmt: skip
        files = hub.repositories["alice/model"].files()
        card = Card(files["README.md"])
        (model,) = card.data.pop("model-index")
        (result,) = model["results"]
        assert card.data == {
            "library_name": "transformers", "pipeline_tag": "image-classification", "license": "mit", "language": "en",
            "base_model": "alice/base", "datasets": ["alice/noise"], "metrics": ["accuracy"],
            "tags": ["refiner", "vision", "image-classification", "mine"],
        }  # fmt: skip
        assert (model["name"], result["dataset"]) == ("A name", {"name": "Noise", "type": "alice/noise"})
        accuracy = pytest.approx(measured["eval_accuracy"])
        assert [(each["type"], each["value"]) for each in result["metrics"]] == [("accuracy", accuracy)]
        assert card.sections["Summary"].startswith("# A name\n")
        assert card.numbers("Results") == [10] and card.numbers("Data") == [24, 10]
        assert card.table("Results")["Top-1 accuracy"] == f"{measured['eval_accuracy']:.2%}"
        assert card.numbers("How it was made")[0] == trainer.state.global_step == 3
        options, had = card.table("How it was made"), trainer.model.config.to_dict() | trainer.args.to_dict()
        assert options == {name: shown(had[name]) for name in options} and options["learning_rate"] == "0.001"
        assert "training_args.bin" not in files
        assert hub.repositories["alice/model"].branches["main"] == published.commit

    def test_only_the_first_process_pushes(self, hub, token, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr(RefinerTrainer, "is_world_process_zero", lambda self: False)
        fields = dict(push_to_hub=True, hub_strategy="every_save", save_strategy="epoch")
        trainer = self.trainer(tiny_model(), tmp_path / "out", token, **fields)
        trainer.train()
        assert trainer.push_to_hub() is None and not hub.requests

    def test_private(self, hub, token, tiny_model, tmp_path):
        self.trainer(tiny_model(), tmp_path / "out", token, push_to_hub=True, hub_private_repo=True)
        assert hub.repositories["alice/model"].private

    def test_the_numbers_are_those_of_the_best_model(self, hub, token, tiny_model, tmp_path):
        best = dict(load_best_model_at_end=True, metric_for_best_model="accuracy", num_train_epochs=12)
        trainer = self.trainer(
            tiny_model(),
            tmp_path / "out",
            token,
            **best,
            eval_strategy="epoch",
            save_strategy="epoch",
            learning_rate=0.01,
        )
        trainer.train()
        trainer.push_to_hub(dataset="Noise")
        accuracies = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
        (result,) = ModelCard(hub.repositories["alice/model"].files()["README.md"].decode()).data.eval_results
        assert result.metric_value == pytest.approx(max(accuracies), abs=1e-6) and accuracies[-1] < max(accuracies)

    def test_in_the_background_and_with_stock_arguments(self, hub, token, tiny_model, tmp_path):
        args = TrainingArguments(
            str(tmp_path / "model"), push_to_hub=True, hub_token=token, use_cpu=True, report_to="none", max_steps=1,
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = RefinerTrainer(tiny_model(), args, train_dataset=Images())
        trainer.train()
        future = trainer.push_to_hub("Hello", blocking=False)
        assert future.result(60).repo_id == "alice/model"
        assert hub.repositories["alice/model"].history()[0].title == "Hello"
        RefinerForImageClassification.from_pretrained("alice/model")

    def test_an_adapter_is_pushed_as_peft_saves_it(self, hub, token, tiny_model, tmp_path):
        peft = pytest.importorskip("peft")
        base = tiny_model()
        base.name_or_path = str(tmp_path / "base")  # as if it came from there
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["v_proj"], r=2))
        fields = dict(push_to_hub=True, hub_strategy="checkpoint", save_strategy="epoch", hub_always_push=True)
        trainer = self.trainer(model, tmp_path / "out", token, **fields)
        trainer.train()
        trainer.push_to_hub()
        first, last = reversed(hub.repositories["alice/model"].history()[:2])
        saved = {"adapter_model.safetensors", "adapter_config.json"}
        state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        for files in (first.files, last.files):
            assert saved | {"README.md"} | {f"last-checkpoint/{name}" for name in saved | state} <= files.keys()
            assert not [name for name in files if "model.safetensors" in name and "adapter" not in name]
            assert not [name for name, content in files.items() if token.encode() in content]
        config = json.loads(last.files["adapter_config.json"])
        assert config["r"] == 2 and config["base_model_name_or_path"] == "base", "not where it lies on this machine"


@pytest.mark.parametrize("trains", [None, "v_proj"])
def test_the_token_is_not_written_to_disk(token, tiny_model, tmp_path, trains):
    """transformers' Trainer pickles its arguments, token and all, into each folder that it saves."""
    model = tiny_model()
    if trains:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[trains], r=2))
    args = arguments(tmp_path / "out", save_strategy="epoch", hub_token=token)
    trainer = RefinerTrainer(model, args, train_dataset=Images())
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if token.encode() in path.read_bytes()]
