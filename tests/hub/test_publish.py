"""Publishing with the real client to the local Hub: what arrives, what is refused beforehand, what survives."""

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from refiner_hf import (
    RefinementAdapterConfig,
    RefinerBackbone,
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerModel,
    refine,
)
from refiner_hf.commands.push import main
from refiner_hf.hub.code import CODE_FILES, add_code
from refiner_hf.hub.publish import publish_folder
from refiner_hf.hub.repository import TRIES, PublishError, prepare_repository
from refiner_hf.hub.verification import verify

from ..conftest import assert_close, load_json, save_with_processor
from ..encoders import disturb, inputs_of, make_encoder


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited for between tries."""
    waited = []
    monkeypatch.setattr("refiner_hf.hub.repository.time.sleep", waited.append)
    return waited


@pytest.fixture
def token(hub, waits):
    hub.add_user("alice", organizations={"lab": "write", "library": "read"})
    return hub.add_token("alice")


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model with its processor, and things beside it that are nobody's business."""
    path = save_with_processor(tiny_model(), tmp_path / "a folder")
    for private in (
        "training_args.bin",
        "emissions.csv",
        "checkpoint-3/optimizer.pt",
        "_push-1/model.safetensors",
        ".x",
    ):
        (path / private).parent.mkdir(exist_ok=True)
        (path / private).write_text("mine")
    (path / "examples").mkdir()
    (path / "examples" / "0.png").write_bytes(b"a picture")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MODEL_FILES = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


class TestWhatArrives:
    def test_one_commit_with_everything_and_nothing_else(self, hub, token, folder):
        before = contents(folder)
        published = publish_folder(folder, "alice/model", token=token, message="Hello")
        repository = hub.repositories["alice/model"]
        assert set(repository.files()) == MODEL_FILES | {"examples/0.png"}
        assert repository.files()["model.safetensors"] == before["model.safetensors"]
        assert [commit.title for commit in repository.history()] == ["Hello", "initial commit"]
        assert repository.branches["main"] == published.commit
        assert not repository.private
        assert contents(folder) == before

    def test_anyone_can_load_it(self, hub, token, folder, tiny_model):
        publish_folder(folder, "alice/model", token=token)
        images = torch.rand(2, 3, 16, 16)
        model = RefinerForImageClassification.from_pretrained("alice/model")
        assert_close(model(images).logits, tiny_model().eval()(images).logits)

    def test_name_without_a_namespace_is_the_users(self, hub, token, folder):
        assert publish_folder(folder, "model", token=token).repo_id == "alice/model"

    def test_private_on_a_branch_with_a_tag(self, hub, token, folder):
        published = publish_folder(folder, "lab/model", token=token, private=True, branch="trial", tag="v1")
        repository = hub.repositories["lab/model"]
        assert repository.private
        assert repository.branches["trial"] == repository.tags["v1"] == published.commit
        assert set(repository.files()) == {".gitattributes"}
        assert 'model="lab/model", revision="trial")' in repository.files("trial")["README.md"].decode()
        with pytest.raises(OSError, match="lab/model is not a local folder"):
            RefinerForImageClassification.from_pretrained("lab/model", revision="v1", token=False)
        RefinerForImageClassification.from_pretrained("lab/model", revision="v1", token=token)

    def test_with_code(self, hub, token, folder):
        before = contents(folder)
        publish_folder(folder, "alice/model", token=token, with_code=True)
        files = hub.repositories["alice/model"].files()
        assert set(CODE_FILES) <= files.keys()
        assert "AutoModelForImageClassification" in json.loads(files["config.json"])["auto_map"]
        assert "AutoImageProcessor" in json.loads(files["preprocessor_config.json"])["auto_map"]
        assert "trust_remote_code=True" in files["README.md"].decode()
        assert "custom_code" in ModelCard(files["README.md"].decode()).data.tags
        assert contents(folder) == before

    def test_code_that_is_named_and_not_there(self, hub, token, folder):
        """A model fine-tuned from one with code: its configuration still names the code."""
        add_code(folder)
        for name in CODE_FILES:
            (folder / name).unlink()
        published = publish_folder(folder, "alice/model", token=token)
        files = hub.repositories["alice/model"].files()
        assert not published.remote_code and "auto_map" not in json.loads(files["config.json"])
        assert "auto_map" not in json.loads(files["preprocessor_config.json"])
        assert "trust_remote_code" not in files["README.md"].decode()

    def test_state_and_paths_stay_here(self, hub, token, folder, tmp_path):
        """A Trainer's checkpoint as the folder."""
        state = {"best_model_checkpoint": str(tmp_path / "gone" / "checkpoint-3"), "b": "C:\\me\\best", "c": "d/e"}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"):
            (folder / name).write_bytes(b"x")
        publish_folder(folder, "alice/model", token=token)
        files = hub.repositories["alice/model"].files()
        assert set(files) == MODEL_FILES | {"examples/0.png", "trainer_state.json"}
        published = json.loads(files["trainer_state.json"])
        assert published == {"best_model_checkpoint": "checkpoint-3", "b": "best", "c": "d/e"}

    def published_card(self, hub, token, folder, text: str) -> str:
        """What becomes of the folder's card."""
        (folder / "README.md").write_text(text)
        publish_folder(folder, "alice/model", token=token)
        return hub.repositories["alice/model"].files()["README.md"].decode()

    def test_examples_of_ones_own_stay(self, hub, token, folder):
        text = (
            "---\nlicense: mit\n---\n```python\nfrom transformers import pipeline\n\n"
            'teacher = pipeline("image-classification", model="google/vit-base-patch16-224", device=0)\n'
            'print(teacher("photo.jpg", top_k=5))\n```\n'
        )
        assert self.published_card(hub, token, folder, text) == text

    def test_the_card_of_the_folder_with_the_repositorys_name_in_its_example(self, hub, token, folder):
        text = (
            "---\nlicense: mit\n---\n# Mine\n\n<!-- usage: image-classification -->\n```python\n"
            "import refiner_hf  # registers the model\n"
            'from transformers import pipeline\n\nclassify = pipeline("image-classification", model="a folder")\n'
            'print(classify("photo.jpg", top_k=5))\n```\n<!-- end of usage -->\n\n```python\nmodel="a folder"\n```\n'
        )
        assert self.published_card(hub, token, folder, text) == text.replace(
            '"image-classification", model="a folder"', '"image-classification", model="alice/model"'
        )

    def test_sharded_weights_replace_whole_ones_and_the_other_way_round(self, hub, token, folder, tiny_model):
        """A repository with both would load the old ones."""
        publish_folder(folder, "alice/model", token=token)
        old, model = load_file(folder / "model.safetensors"), tiny_model(initializer_range=0.1)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        publish_folder(folder, "alice/model", token=token)
        repository = hub.repositories["alice/model"]
        weights = {name for name in repository.files() if name.startswith("model")}
        assert "model.safetensors.index.json" in weights and "model.safetensors" not in weights and len(weights) > 3
        loaded = RefinerForImageClassification.from_pretrained("alice/model")
        assert_close(loaded.classifier.weight, model.classifier.weight)

        for path in folder.glob("model*"):
            path.unlink()
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
        publish_folder(folder, "alice/model", token=token)
        assert {name for name in repository.files() if name.startswith("model")} == {"model.safetensors"}
        assert len(repository.history()) == 4

    @pytest.mark.parametrize(
        "head", [RefinerModel, RefinerForMaskedImageModeling, RefinerBackbone], ids=lambda head: head.__name__
    )
    def test_other_heads(self, hub, token, tiny_config, tmp_path, head, caplog):
        model = head(tiny_config())
        model.save_pretrained(tmp_path / "model")
        with caplog.at_level(logging.WARNING):
            publish_folder(tmp_path / "model", "alice/model", token=token)
        assert "no model card" in caplog.text and "no image processor" in caplog.text
        loaded = head.from_pretrained("alice/model")
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
        card = ModelCard(hub.repositories["alice/model"].files()["README.md"].decode())
        assert card.data.pipeline_tag == "image-feature-extraction" and head.__name__ in card.text

    def test_nothing_new_makes_no_commit(self, hub, token, folder):
        first = publish_folder(folder, "alice/model", token=token)
        assert publish_folder(folder, "alice/model", token=token).commit == first.commit
        assert sum(method == "PUT" for method, _ in hub.requests) == 1

    def test_snapshot_is_a_folder_to_publish_again(self, hub, token, folder, tmp_path):
        publish_folder(folder, "alice/model", token=token)
        copy = snapshot_download("alice/model", local_dir=tmp_path / "copy")
        publish_folder(copy, "alice/second", token=token)
        assert hub.repositories["alice/second"].files().keys() == hub.repositories["alice/model"].files().keys()


class TestRefusedBeforehand:
    """Before anything is uploaded, and with a message that says what to do."""

    @pytest.fixture(autouse=True)
    def nothing_is_uploaded(self, hub):
        yield
        assert not [path for method, path in hub.requests if "/commit/" in path or method == "PUT"]

    def refused(self, folder, message, repo_id="alice/model", error=PublishError, **options):
        with pytest.raises(error, match=message):
            publish_folder(folder, repo_id, **options)

    def test_no_token(self, token, folder):
        self.refused(folder, "hf auth login")

    def test_wrong_and_expired_tokens(self, hub, token, folder):
        for bad in ("hf_wrong", hub.add_token("alice", expired=True)):
            self.refused(folder, "wrong or has expired", token=bad)

    def test_read_only_token(self, hub, token, folder):
        self.refused(folder, "may only read", token=hub.add_token("alice", role="read"))
        assert "alice/model" not in hub.repositories

    def test_fine_grained_tokens(self, hub, token, folder):
        HfApi(token=token).create_repo("alice/there")
        elsewhere = hub.add_token("alice", role="fineGrained", scopes={"alice/there": ["repo.write"]})
        self.refused(folder, "fine-grained and may not make the repository alice/model", token=elsewhere)
        reading = hub.add_token("alice", role="fineGrained", scopes={"alice": ["repo.content.read"]})
        self.refused(folder, "may not write to alice/there", "alice/there", token=reading)

    def test_somebody_elses_namespace(self, token, folder):
        self.refused(folder, "must be one of alice, lab, library", "bob/model", ValueError, token=token)

    def test_organisation_to_read_in(self, token, folder):
        self.refused(folder, "may only read in the organisation library", "library/model", token=token)

    @pytest.mark.parametrize("name", ["a/b/c", "-x", "a--b", "mod el", "x" * 120])
    def test_names_that_can_not_be(self, hub, token, folder, name):
        self.refused(folder, "[Rr]epo", name, ValueError, token=token)
        assert not hub.requests

    def test_visibility_is_not_changed_by_the_way(self, hub, token, folder):
        HfApi(token=token).create_repo("alice/model")
        self.refused(folder, "is public, but private was asked for", error=ValueError, token=token, private=True)
        HfApi(token=token).create_repo("alice/hidden", private=True)
        self.refused(folder, "is private, but public", "alice/hidden", ValueError, token=token, private=False)

    def test_tag_that_exists(self, hub, token, folder):
        api = HfApi(token=token)
        api.create_repo("alice/model")
        api.create_tag("alice/model", tag="v1")
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/model")
        hub.requests.clear()
        self.refused(folder, "has a tag 'v1' already", error=ValueError, token=token, tag="v1")

    @pytest.mark.parametrize("ref", ["a b", "-v1", "a..b", "a/", "x.lock", ""])
    def test_refs_that_can_not_be(self, hub, token, folder, ref):
        self.refused(folder, "can't be the name of a tag", error=ValueError, token=token, tag=ref)
        self.refused(folder, "can't be the name of a branch", error=ValueError, token=token, branch=ref)
        assert not hub.requests

    def test_offline(self, hub, token, folder, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.refused(folder, "HF_HUB_OFFLINE is set", token=token)

    def test_no_connection(self, hub, folder, waits, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
        self.refused(folder, "connection to http://127.0.0.1:1 broke or can't be made", token="hf_any")
        assert len(waits) == TRIES - 1

    def test_metadata_that_the_hub_refuses(self, hub, token, folder):
        (folder / "README.md").write_text("---\nlicense: [1, 2]\n---\n# Mine\n")
        self.refused(folder, "(?i)license", error=ValueError, token=token)

    @pytest.mark.parametrize("text", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"# \xe9t\xe9"])
    def test_cards_that_can_not_be_read(self, hub, token, folder, text):
        (folder / "README.md").write_bytes(text)
        self.refused(folder, "README.md can't be read", error=ValueError, token=token)
        assert not hub.requests

    def test_models_that_do_not_work(self, hub, token, folder, tiny_model, tmp_path):
        """A processor for other images, and a network that broke."""
        tiny_model(num_channels=1).save_pretrained(folder)
        self.refused(folder, "doesn't work with its image processor", error=ValueError, token=token)
        (folder / "preprocessor_config.json").write_text("{")
        self.refused(folder, "preprocessor_config.json", error=ValueError, token=token)
        broken = tiny_model()
        torch.nn.init.constant_(broken.classifier.bias, float("nan"))
        broken.save_pretrained(tmp_path / "nan")
        self.refused(tmp_path / "nan", "NaN or infinity in classifier.bias", error=ValueError, token=token)
        (folder / "config.json").write_text("[]")
        self.refused(folder, "config.json of .* can't be used", error=ValueError, token=token)
        assert not hub.requests

    def test_folders_that_hold_no_whole_refiner(self, hub, token, folder, tmp_path, tiny_model):
        self.refused(tmp_path / "nowhere", "There is no folder", error=ValueError)
        self.refused(tmp_path, "no config.json", error=ValueError)
        weights = load_file(folder / "model.safetensors")
        damaged = (folder / "model.safetensors").read_bytes()[:-100]
        (folder / "model.safetensors").write_bytes(damaged)
        self.refused(folder, "are damaged", error=ValueError)
        weights.pop("refiner.norm.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.refused(folder, "lack refiner.norm.weight", error=ValueError)
        (folder / "model.safetensors").unlink()
        self.refused(folder, "lacks model.safetensors", error=ValueError)
        tiny_model().save_pretrained(folder, max_shard_size="100KB")
        (folder / "model-00002-of-00004.safetensors").unlink()
        self.refused(folder, "lacks model-00002-of-00004.safetensors", error=ValueError)
        config = load_json(folder / "config.json") | {"architectures": ["ViTModel"]}
        (folder / "config.json").write_text(json.dumps(config))
        tiny_model().save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        self.refused(tmp_path / "other", "holds a ViTModel", error=ValueError)
        assert not hub.requests


def test_a_token_with_a_line_break(hub, token, folder, capsys, caplog):
    """As a file of secrets has it. The client would print it in an error about its header."""
    publish_folder(folder, "alice/model", token=f"{token}\r\n")
    assert "alice/model" in hub.repositories
    assert token not in capsys.readouterr().err + caplog.text


def test_a_push_with_a_tag_can_be_repeated(hub, token, folder):
    first = publish_folder(folder, "alice/model", token=token, tag="v1", branch="trial")
    assert publish_folder(folder, "alice/model", token=token, tag="v1", branch="trial").commit == first.commit


class TestTrouble:
    """A bad connection and a busy Hub: tried again; where that doesn't help, nothing is lost."""

    def arrived(self, hub, folder) -> bool:
        files = hub.repositories["alice/model"].files()
        return files.get("model.safetensors") == (folder / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("status", [500, 502, 503, 504, 412])
    @pytest.mark.parametrize("where", ["/api/whoami-v2", "/api/repos/create", "/api/models/.*/commit/"])
    def test_passing_errors_are_waited_out(self, hub, token, folder, status, where, waits):
        hub.fail("GET" if "whoami" in where else "POST", where, status=status, times=2)
        publish_folder(folder, "alice/model", token=token)
        assert self.arrived(hub, folder) and waits == [2, 4]

    @pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=6'}])
    def test_rate_limits_say_how_long(self, hub, token, folder, headers, waits):
        hub.fail("POST", "/api/models/.*/commit/", status=429, headers=headers)
        publish_folder(folder, "alice/model", token=token)
        assert self.arrived(hub, folder) and waits == [7]

    def test_a_connection_dropped_in_the_middle_of_the_weights(self, hub, token, folder):
        hub.drop("PUT", "/storage/", after_bytes=1000)
        publish_folder(folder, "alice/model", token=token)
        assert self.arrived(hub, folder)

    def test_a_connection_that_keeps_breaking(self, hub, token, folder):
        """Clear error, folder and repository as before; a second push completes."""
        before = contents(folder)
        hub.drop("PUT", "/storage/", after_bytes=1000, times=1000)
        with pytest.raises(PublishError, match="(?s)failed after .* tries.*Nothing is lost"):
            publish_folder(folder, "alice/model", token=token)
        assert contents(folder) == before and set(hub.repositories["alice/model"].files()) == {".gitattributes"}
        hub.drop("PUT", "/storage/", times=0)
        hub.faults.clear()
        publish_folder(folder, "alice/model", token=token)
        assert self.arrived(hub, folder) and len(hub.repositories["alice/model"].history()) == 2

    def test_what_was_uploaded_before_it_broke_is_not_sent_again(self, hub, token, folder):
        hub.fail("POST", "/api/models/.*/commit/", status=500, times=1000)
        with pytest.raises(PublishError, match="second push continues"):
            publish_folder(folder, "alice/model", token=token)
        hub.faults.clear()
        publish_folder(folder, "alice/model", token=token)
        assert sum(method == "PUT" for method, _ in hub.requests) == 1 and self.arrived(hub, folder)

    def test_a_commit_whose_answer_got_lost_is_not_made_twice(self, hub, token, folder):
        hub.drop("POST", "/api/models/.*/commit/", answered=True)
        publish_folder(folder, "alice/model", token=token)
        assert self.arrived(hub, folder) and len(hub.repositories["alice/model"].history()) == 2

    def test_rights_that_are_taken_away_meanwhile(self, hub, token, folder, waits):
        hub.fail("POST", "/api/models/.*/commit/", status=403, times=1000)
        with pytest.raises(PublishError, match="the Hub refuses it"):
            publish_folder(folder, "alice/model", token=token)
        assert not waits

    @pytest.mark.parametrize("status", [409, 412])
    def test_somebody_else_writes_at_the_same_time(self, hub, token, folder, status):
        """Their files stay."""
        HfApi(token=token).create_repo("alice/model")
        HfApi(token=token).upload_file(
            path_or_fileobj=b"x", path_in_repo="models/theirs.safetensors", repo_id="alice/model"
        )
        hub.fail("POST", "/api/models/.*/commit/", status=status)
        publish_folder(folder, "alice/model", token=token)
        assert (
            self.arrived(hub, folder) and hub.repositories["alice/model"].files()["models/theirs.safetensors"] == b"x"
        )


class TestPreparing:
    def test_makes_repository_and_branch_and_can_be_repeated(self, hub, token):
        for _ in range(2):
            assert prepare_repository("model", token=token, private=True, branch="trial") == "alice/model"
        repository = hub.repositories["alice/model"]
        assert repository.private and set(repository.branches) == {"main", "trial"}

    def test_fine_grained_token_for_one_repository(self, hub, token):
        HfApi(token=token).create_repo("alice/there")
        scopes = {"alice/there": ["repo.write", "repo.content.read"]}
        fitting = hub.add_token("alice", role="fineGrained", scopes=scopes)
        assert prepare_repository("alice/there", token=fitting) == "alice/there"

    def test_an_answer_that_got_lost(self, hub, token):
        hub.drop("POST", "/api/repos/create", answered=True)
        assert prepare_repository("alice/model", token=token) == "alice/model"


class TestVerification:
    @pytest.mark.parametrize("with_code", [False, True])
    def test_loads_back_in_a_fresh_process(self, hub, token, folder, with_code):
        """By its commit: what comes after it doesn't matter."""
        published = publish_folder(folder, "alice/model", token=token, private=True, with_code=with_code)
        HfApi(token=token).upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/model")
        assert verify(published, token=token) < 1e-6

    def test_with_the_image_processor_of_a_vit(self, hub, token, tmp_path):
        """A refined ViT has it: beside our code it stays what it is."""
        size = dict(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
        vit = ViTForImageClassification(ViTConfig(**size, intermediate_size=48))
        refine(vit, {"pixel_values": torch.randn(4, 3, 16, 16)}).save_pretrained(tmp_path / "vit")
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
        published = publish_folder(tmp_path / "vit", "alice/model", token=token, with_code=True)
        assert verify(published, token=token) < 1e-6

    @pytest.mark.parametrize("family", ["vit", "dinov3"])
    def test_a_classifier_of_transformers(self, hub, token, tmp_path, family):
        """As `refiner train` leaves it."""
        make_encoder(family).save_pretrained(tmp_path / "bare")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "bare", num_labels=3)
        model.save_pretrained(tmp_path / "model")
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="is transformers' own and needs no code"):
            publish_folder(tmp_path / "model", "alice/model", token=token, with_code=True)
        published = publish_folder(tmp_path / "model", "alice/model", token=token)
        assert verify(published, token=token) < 1e-6
        card = hub.repositories["alice/model"].files()["README.md"].decode()
        assert "refiner" not in card.split("---")[1] and "image-classification" in card

    def test_a_refinement_adapter(self, hub, token, tmp_path):
        base = make_encoder("vit", head=True)
        base.push_to_hub("alice/base", token=token)
        base.name_or_path = "alice/base"
        inputs = {"pixel_values": torch.randn(4, 3, 32, 32)}
        adapted = get_peft_model(base, RefinementAdapterConfig(inputs=inputs, modules_to_save=["classifier"]))
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        published = publish_folder(tmp_path / "adapter", "alice/adapter", token=token)
        assert published.base_model == "alice/base" and verify(published, token=token) < 1e-6

    def test_a_model_of_texts_is_pushed_by_itself(self, token, tmp_path):
        refine(make_encoder("bert"), inputs_of("bert")).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="isn't a model for images. Publish it with its own push_to_hub"):
            publish_folder(tmp_path, "alice/model", token=token)

    def test_other_weights_are_found_out(self, hub, token, folder):
        published = publish_folder(folder, "alice/model", token=token)
        published.fingerprint = published.fingerprint * 1.0001
        with pytest.raises(PublishError, match="answers differently"):
            verify(published, token=token)

    def test_code_that_needs_this_package_is_found_out(self, hub, token, folder):
        add_code(folder)
        (folder / "modeling_refiner.py").write_text(
            "import refiner_hf\n" + (folder / "modeling_refiner.py").read_text()
        )
        published = publish_folder(folder, "alice/model", token=token)
        assert published.remote_code
        with pytest.raises(PublishError, match="(?s)can't be loaded from the Hub.*refiner_hf"):
            verify(published, token=token)


class TestCommand:
    def test_publishes_and_verifies(self, hub, token, folder, capsys, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token)
        main(["--folder", str(folder), "--repo_id", "model", "--private", "--tag", "v1", "--verify"])
        said = capsys.readouterr().out
        assert f"{hub.url}/alice/model/tree/v1" in said and "largest difference of an output 0" in said
        assert hub.repositories["alice/model"].private

    def test_every_option(self, hub, token, folder, capsys):
        HfApi(token=token).create_repo("alice/hidden", private=True)
        options = ["--branch", "trial", "--message", "Hello", "--with_code", "--token", token]
        main(["--folder", str(folder), "--repo_id", "model", "--public", *options])
        repository = hub.repositories["alice/model"]
        assert "modeling_refiner.py" in repository.files("trial") and repository.history("trial")[0].title == "Hello"
        with pytest.raises(SystemExit, match="is private, but public"):
            main(["--folder", str(folder), "--repo_id", "hidden", "--public", *options])

    def test_errors_are_one_line(self, hub, token, folder):
        with pytest.raises(SystemExit, match="^Error: alice can't write to bob/model"):
            main(["--folder", str(folder), "--repo_id", "bob/model", "--token", token])
        with pytest.raises(SystemExit, match="Private or public"):
            main(["--folder", str(folder), "--repo_id", "model", "--private", "--public"])


@pytest.mark.slow
def test_a_model_of_more_than_100_megabytes(hub, token, tmp_path):
    """Refiner-S, whole and in shards."""
    from refiner_hf import RefinerConfig

    RefinerForImageClassification(RefinerConfig.small()).save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 100e6
    RefinerForImageClassification.from_pretrained(tmp_path / "whole").save_pretrained(
        tmp_path / "sharded", max_shard_size="30MB"
    )
    for name in ("whole", "sharded"):
        published = publish_folder(tmp_path / name, name, token=token, with_code=True)
        assert verify(published, token=token) < 1e-5
