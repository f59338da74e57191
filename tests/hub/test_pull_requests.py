"""Pull requests in somebody else's repository, adapters, and revisions, with the real client to the local Hub."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from refiner_hf import RefinerForImageClassification
from refiner_hf.commands.predict import main as predict
from refiner_hf.commands.push import main as push
from refiner_hf.commands.visualize import main as visualize
from refiner_hf.hub.publish import publish_folder
from refiner_hf.hub.repository import PublishError
from refiner_hf.hub.verification import verify
from refiner_hf.labelling.teachers import load_teacher
from refiner_hf.utils.loading import has_image_processor, load_classifier
from refiner_hf.utils.model_source import find_source

from ..conftest import save_with_processor
from ..images import write_folder


@pytest.fixture
def token(hub, monkeypatch):
    monkeypatch.setattr("refiner_hf.hub.repository.time.sleep", lambda seconds: None)
    hub.add_user("alice", {})
    hub.add_user("bob", {})
    return hub.add_token("alice")


@pytest.fixture
def folder(tiny_model, tmp_path):
    return save_with_processor(tiny_model(), tmp_path / "model")


@pytest.fixture
def theirs(hub, token, folder):
    """A repository of bob's."""
    publish_folder(folder, "bob/model", token=hub.add_token("bob"))
    return hub.repositories["bob/model"]


class TestPullRequest:
    def changed(self, tiny_model, tmp_path):
        model = tiny_model()
        with torch.no_grad():
            model.classifier.bias.add_(1)
        return save_with_processor(model, tmp_path / "better")

    def test_in_somebody_elses_repository(self, hub, token, theirs, tiny_model, tmp_path):
        before = theirs.branches["main"]
        published = publish_folder(self.changed(tiny_model, tmp_path), "bob/model", token=token, create_pr=True)
        assert published.url == f"{hub.url}/bob/model/discussions/1"
        assert theirs.pull_requests == {"refs/pr/1": published.commit} and theirs.branches == {"main": before}
        assert theirs.at("refs/pr/1").files["model.safetensors"] != theirs.files()["model.safetensors"]
        assert verify(published, token=token) == 0
        loaded = RefinerForImageClassification.from_pretrained("bob/model", revision="refs/pr/1")
        assert torch.equal(
            loaded.classifier.bias, RefinerForImageClassification.from_pretrained(tmp_path / "better").classifier.bias
        )

    def test_a_lost_answer_opens_no_second_one(self, hub, token, theirs, tiny_model, tmp_path):
        hub.drop("POST", "/commit/", answered=True)
        with pytest.raises(PublishError, match="Opening a pull request in bob/model failed"):
            publish_folder(self.changed(tiny_model, tmp_path), "bob/model", token=token, create_pr=True)
        assert len(theirs.pull_requests) == 1

    def test_what_is_refused(self, hub, token, theirs, folder):
        def refused(says, error=ValueError, repo_id="bob/model", **options):
            with pytest.raises(error, match=says):
                publish_folder(folder, repo_id, **{"token": token, "create_pr": True, **options})

        refused("no repository bob/nothing", repo_id="bob/nothing")
        refused("give no branch, tag or visibility", branch="trial")
        refused("give no branch, tag or visibility", private=True)
        refused("may only read", PublishError, token=hub.add_token("alice", role="read"))
        refused("can't write to bob/model", create_pr=False)
        assert not theirs.pull_requests

    def test_command(self, hub, token, theirs, tiny_model, tmp_path, capsys):
        folder = self.changed(tiny_model, tmp_path)
        push(["--folder", str(folder), "--repo_id", "bob/model", "--create_pr", "--token", token, "--verify"])
        assert f"Published: {hub.url}/bob/model/discussions/1" in capsys.readouterr().out


class TestAdapter:
    def adapter(self, base, tmp_path):
        options = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
        get_peft_model(RefinerForImageClassification.from_pretrained(base), options).save_pretrained(tmp_path / "lora")
        (tmp_path / "lora" / "README.md").unlink(missing_ok=True)
        return tmp_path / "lora"

    def test_of_a_model_on_the_hub(self, hub, token, theirs, tmp_path, capsys):
        folder = self.adapter("bob/model", tmp_path)
        push(["--folder", str(folder), "--repo_id", "alice/lora", "--token", token, "--verify"])
        files = hub.repositories["alice/lora"].files()
        assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
        card = files["README.md"].decode()
        assert "base_model: bob/model" in card and "adapter of `bob/model`" in card
        assert "largest difference" in capsys.readouterr().out

    def test_on_a_branch(self, hub, token, theirs, tmp_path):
        """Which is the adapter's own: the base model is on main."""
        publish_folder(self.adapter("bob/model", tmp_path), "alice/lora", token=token, branch="trial")
        answers = [load_classifier(*where)(torch.ones(1, 3, 16, 16)).logits for where in (
            (str(tmp_path / "lora"),), ("alice/lora", "trial"), ("bob/model",)
        )]  # fmt: skip
        assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])

    def test_of_a_folder_that_nobody_else_has(self, hub, token, folder, tmp_path):
        with pytest.raises(
            ValueError, match="a folder of this machine that others don't have. Publish that one first"
        ):
            publish_folder(self.adapter(folder, tmp_path), "alice/lora", token=token)
        assert "alice/lora" not in hub.repositories

    def test_with_code_or_damaged(self, hub, token, theirs, tmp_path):
        folder = self.adapter("bob/model", tmp_path)
        with pytest.raises(ValueError, match="An adapter carries no code"):
            publish_folder(folder, "alice/lora", token=token, with_code=True)
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ValueError, match="the adapter's weights aren't there"):
            publish_folder(folder, "alice/lora", token=token)


def test_commands_take_a_branch(hub, token, tiny_model, folder, tmp_path):
    """What refiner push writes to a branch, the others read from there."""
    names = ["one", "two", "three", "four", "five"]
    publish_folder(folder, "alice/model", token=token)
    other = save_with_processor(tiny_model(id2label=dict(enumerate(names))), tmp_path / "other")
    publish_folder(other, "alice/model", token=token, branch="trial")
    photos = write_folder(tmp_path / "photos", per_label=1)
    asked = ["--model", "alice/model", "--images", str(photos), "--num_workers", "0", "--output_file"]
    predict([*asked, str(tmp_path / "trial.csv"), "--revision", "trial"])
    predict([*asked, str(tmp_path / "main.csv")])
    labels = {line.split(",")[1] for line in (tmp_path / "trial.csv").read_text().splitlines()[1:]}
    assert labels <= set(names)
    assert not labels & {line.split(",")[1] for line in (tmp_path / "main.csv").read_text().splitlines()[1:]}
    with pytest.raises(SystemExit, match="Error: .*nowhere"):
        predict([*asked, str(tmp_path / "no.csv"), "--revision", "nowhere"])
    assert load_teacher("alice/model", revision="trial").labels == names
    with pytest.raises(ValueError, match="NAME@REVISION"):
        load_teacher("timm/resnet10t", revision="trial")
    picture = next(photos.rglob("*.png"))
    visualize(
        [
            "--model",
            "alice/model",
            "--revision",
            "trial",
            "--image",
            str(picture),
            "--output_dir",
            str(tmp_path / "seen"),
        ]
    )
    assert json.loads(hub.repositories["alice/model"].files("trial")["config.json"])["id2label"]["0"] == "one"


def test_a_processor_is_missing_only_where_the_hub_says_so(hub, token, folder):
    """Else a training would take the standard one because the connection broke."""
    publish_folder(folder, "alice/with", token=token)
    (folder / "preprocessor_config.json").unlink()
    publish_folder(folder, "alice/without", token=token)
    assert has_image_processor("alice/with") and not has_image_processor("alice/without")
    hub.drop("HEAD", "/alice/with/resolve/.*preprocessor", times=100)
    hub.drop("GET", "/alice/with/resolve/.*preprocessor", times=100)
    with pytest.raises(OSError, match="connection to the Hub broke while alice/with"):
        has_image_processor(find_source("alice/with", cache_dir=str(folder / "empty")))
