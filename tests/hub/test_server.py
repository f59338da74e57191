"""The real client against the Hub on this machine: what tests of publishing rely on."""

import base64
import json
import re
import subprocess
import sys
import warnings

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session

from refiner_hf import RefinerForImageClassification


REPO = "alice/model"
STORAGE = "^/storage/"
COMMIT = "/commit/main$"
# Named here because the library that the client sends its requests with is not the same in each of its versions.
LOST_CONNECTION = _http._DEFAULT_RETRY_ON_EXCEPTIONS


@pytest.fixture
def api(hub):
    """A client that may write in alice's name and in lab's."""
    hub.add_user("alice", organizations={"lab": "write", "readers": "read"})
    hub.add_user("bob")
    return HfApi(token=hub.add_token("alice"))


@pytest.fixture
def repo(hub, api):
    api.create_repo(REPO)
    hub.requests.clear()
    return hub.repositories[REPO]


@pytest.fixture
def folder(tmp_path):
    """A folder to publish, with a large file in it: large by its name."""
    folder = tmp_path / "model"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "logs" / "loss.txt").write_text("0.5")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def calls(hub, method: str, path: str) -> int:
    return sum(sent == method and bool(re.search(path, where)) for sent, where in hub.requests)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestRepositories:
    def test_created_with_a_first_commit(self, hub, api):
        url = api.create_repo(REPO)
        assert (url.repo_id, str(url)) == (REPO, f"{hub.url}/{REPO}")
        (commit,) = hub.repositories[REPO].history()
        assert list(commit.files) == [".gitattributes"] and commit.parent is None
        assert api.repo_exists(REPO) and api.model_info(REPO).sha == commit.sha

    def test_created_twice(self, api, repo):
        with pytest.raises(HfHubHTTPError, match="already created") as error:
            api.create_repo(REPO)
        assert error.value.response.status_code == 409
        assert api.create_repo(REPO, exist_ok=True).repo_id == REPO

    def test_names(self, hub, api):
        with pytest.raises(HFValidationError):
            api.create_repo("alice/a--b")
        # Names that only the server refuses.
        for name in ("a.git", "a" * 97):
            answer = get_session().post(
                f"{hub.url}/api/repos/create", json={"name": name}, headers={"Authorization": f"Bearer {api.token}"}
            )
            assert answer.status_code == 400 and not hub.repositories

    def test_namespaces(self, hub, api):
        assert api.create_repo("model").repo_id == REPO
        api.create_repo("lab/model")
        for name in ("readers/model", "bob/model"):
            with pytest.raises(HfHubHTTPError, match="403 Forbidden.*under the namespace"):
                api.create_repo(name)
        assert set(hub.repositories) == {REPO, "lab/model"}

    def test_types_do_not_meet(self, hub, api):
        api.create_repo(REPO)
        api.create_repo(REPO, repo_type="dataset")
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.csv", repo_id=REPO, repo_type="dataset")
        assert hub.repositories["datasets/alice/model"].files()["a.csv"] == b"1"
        assert "a.csv" not in hub.repositories[REPO].files()
        with open(hf_hub_download(REPO, "a.csv", repo_type="dataset")) as file:
            assert file.read() == "1"

    def test_deleted(self, hub, api, repo):
        api.delete_repo(REPO)
        assert not hub.repositories and not api.repo_exists(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.delete_repo(REPO)
        api.delete_repo(REPO, missing_ok=True)

    def test_made_private_and_public(self, hub, api, repo):
        api.update_repo_settings(REPO, private=True)
        assert repo.private and api.model_info(REPO).private
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info(REPO, token=False)
        assert error.value.response.status_code == 401
        with pytest.raises(RepositoryNotFoundError) as error:
            api.model_info(REPO, token=hub.add_token("bob"))
        assert error.value.response.status_code == 404
        api.update_repo_settings(REPO, private=False)
        assert api.model_info(REPO, token=False).id == REPO

    def test_created_private(self, hub, api):
        api.create_repo(REPO, private=True)
        assert hub.repositories[REPO].private
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, ".gitattributes", token=False)
        assert hf_hub_download(REPO, ".gitattributes", token=api.token)

    def test_gated(self, hub, api, repo):
        api.update_repo_settings(REPO, gated="auto")
        for token in (False, hub.add_token("bob")):
            with pytest.raises(GatedRepoError):
                hf_hub_download(REPO, ".gitattributes", token=token)
        assert hf_hub_download(REPO, ".gitattributes", token=api.token)


class TestCommits:
    def test_a_folder_in_one_commit(self, hub, api, repo, folder):
        commit = api.upload_folder(
            repo_id=REPO, folder_path=folder, commit_message="Model", commit_description="Good."
        )
        newest, first = repo.history()
        assert (newest.sha, newest.parent) == (commit.oid, first.sha)
        assert (newest.title, newest.description) == ("Model", "Good.")
        assert repo.files() == {**first.files, **contents(folder)}
        assert repo.files()["model.safetensors"].large and not repo.files()["config.json"].large
        assert calls(hub, "PUT", STORAGE) == 1 and calls(hub, "POST", COMMIT) == 1

    def test_what_is_there_is_not_sent_again(self, hub, api, repo, folder):
        api.upload_folder(repo_id=REPO, folder_path=folder)
        hub.requests.clear()
        newest = api.upload_folder(repo_id=REPO, folder_path=folder).oid
        assert newest == repo.branches["main"] and len(repo.history()) == 2
        assert calls(hub, "PUT", STORAGE) == calls(hub, "POST", COMMIT) == 0
        (folder / "config.json").write_text("[]")
        api.upload_folder(repo_id=REPO, folder_path=folder)
        assert repo.files()["config.json"] == b"[]" and len(repo.history()) == 3
        assert calls(hub, "PUT", STORAGE) == 0

    def test_listed(self, api, repo, folder):
        commit = api.upload_folder(repo_id=REPO, folder_path=folder).oid
        files = {file.path: file for file in api.list_repo_tree(REPO, recursive=True, expand=True)}
        assert set(files) == {".gitattributes", "config.json", "logs", "logs/loss.txt", "model.safetensors"}
        assert files["model.safetensors"].lfs.size == files["model.safetensors"].size == 256 * 40
        assert files["config.json"].lfs is None and files["config.json"].last_commit.oid == commit
        assert files[".gitattributes"].last_commit.title == "initial commit"
        assert [file.path for file in api.list_repo_tree(REPO, "logs")] == ["logs/loss.txt"]
        with pytest.raises(RemoteEntryNotFoundError):
            list(api.list_repo_tree(REPO, "nothing"))
        assert [file.path for file in api.get_paths_info(REPO, ["logs", "nothing"])] == ["logs"]
        siblings = {file.rfilename: file for file in api.model_info(REPO, files_metadata=True).siblings}
        assert siblings["model.safetensors"].lfs.sha256 == files["model.safetensors"].lfs.sha256
        assert [commit.title for commit in api.list_repo_commits(REPO)][1:] == ["initial commit"]

    def test_git_names_contents_alike(self, api, repo):
        api.upload_file(path_or_fileobj=b"hello\n", path_in_repo="a.txt", repo_id=REPO)
        # What `git hash-object` says of this content.
        assert api.get_paths_info(REPO, "a.txt")[0].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"

    def test_deleted_and_copied(self, api, repo, folder):
        api.upload_folder(repo_id=REPO, folder_path=folder)
        operations = [
            CommitOperationDelete("logs/"),
            CommitOperationDelete("config.json"),
            CommitOperationCopy("model.safetensors", "copy.safetensors"),
            CommitOperationAdd("new.txt", b"new"),
        ]
        api.create_commit(REPO, operations, commit_message="Move")
        files = repo.files()
        assert set(files) == {".gitattributes", "model.safetensors", "copy.safetensors", "new.txt"}
        assert files["copy.safetensors"] == files["model.safetensors"]
        with pytest.raises(EntryNotFoundError):
            api.delete_file("config.json", REPO)

    def test_branches_and_tags(self, api, repo):
        first = repo.branches["main"]
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)
        api.create_branch(REPO, branch="try/this", revision=first)
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=REPO, revision="try/this")
        api.create_tag(REPO, tag="v1", revision="try/this")
        assert (repo.files()["a"], repo.files("v1")["a"]) == (b"1", b"2")
        refs = api.list_repo_refs(REPO)
        assert {branch.name: branch.target_commit for branch in refs.branches} == repo.branches
        assert {tag.name: tag.target_commit for tag in refs.tags} == repo.tags == {"v1": repo.branches["try/this"]}
        with open(hf_hub_download(REPO, "a", revision="try/this")) as file:
            assert file.read() == "2"
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_branch(REPO, branch="try/this")
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_tag(REPO, tag="v1")
        with pytest.raises(RevisionNotFoundError):
            api.create_tag(REPO, tag="v2", revision="nothing")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.delete_branch(REPO, branch="main")
        api.delete_branch(REPO, branch="try/this")
        api.delete_tag(REPO, tag="v1")
        assert set(repo.branches) == {"main"} and not repo.tags

    def test_a_commit_on_something_old(self, api, repo):
        parent = repo.branches["main"]
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO, parent_commit=parent)
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
            api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=REPO, parent_commit=parent)
        assert error.value.response.status_code == 412 and repo.files()["a"] == b"1"


class TestLargeFiles:
    CONTENT = bytes(range(256)) * 8

    def upload(self, api, content: bytes = CONTENT):
        return api.upload_file(path_or_fileobj=content, path_in_repo="model.safetensors", repo_id=REPO)

    def test_up_and_down(self, hub, api, repo):
        self.upload(api)
        hub.requests.clear()
        with open(hf_hub_download(REPO, "model.safetensors"), "rb") as file:
            assert file.read() == self.CONTENT
        assert [method for method, _ in hub.requests] == ["HEAD", "GET"] and calls(hub, "GET", STORAGE) == 1

    def test_storage_never_sees_the_token(self, hub, api, repo, monkeypatch):
        seen = []
        answer = hub.answer
        monkeypatch.setattr(hub, "answer", lambda request: seen.append(request) or answer(request))
        api.update_repo_settings(REPO, private=True)
        self.upload(api)
        hf_hub_download(REPO, "model.safetensors", token=api.token)
        stored = [request for request in seen if request.path.startswith("/storage/")]
        assert len(stored) == 2 and not any(request.headers.get("Authorization") for request in stored)

    @pytest.mark.parametrize("chunk", [2048, 1000, 1])
    def test_in_parts(self, hub, api, repo, chunk):
        hub.multipart_chunk_size = chunk
        content = self.CONTENT[: 20 if chunk == 1 else None]
        self.upload(api, content)
        assert repo.files()["model.safetensors"] == content and not repo.parts
        assert calls(hub, "PUT", rf"{STORAGE}.*/\d+$") == (0 if chunk == 2048 else -(-len(content) // chunk))

    def test_uploaded_before_the_commit(self, hub, api, repo):
        addition = CommitOperationAdd("model.safetensors", self.CONTENT)
        api.preupload_lfs_files(REPO, [addition])
        assert len(repo.objects) == 1 and len(repo.history()) == 1
        repo.objects.clear()
        with pytest.raises(BadRequestError, match="pointer pointed to a file that does not exist"):
            api.create_commit(REPO, [addition], commit_message="Nothing behind it")

    def test_another_content_than_announced(self, hub, api, repo):
        oid = "0" * 64
        assert get_session().put(f"{hub.storage_url}/storage/models/{REPO}/{oid}", content=b"x").status_code == 400
        assert not repo.objects

    def test_what_only_a_wrong_client_sends(self, hub, api, repo):
        self.upload(api)
        (oid,) = repo.objects

        def post(path: str, json):
            headers = {"Authorization": f"Bearer {api.token}"}
            return get_session().post(hub.url + path, json=json, headers=headers).status_code

        verify = f"/{REPO}.git/info/lfs/objects/verify"
        assert post(verify, {"oid": oid, "size": 1}) == 400 and post(verify, {"oid": "0" * 64, "size": 1}) == 404
        get_session().put(f"{hub.storage_url}/storage/models/{REPO}/{oid}/1", content=self.CONTENT)
        parts = {"oid": oid, "parts": [{"partNumber": 1, "etag": '"another"'}]}
        assert post(f"/storage/models/{REPO}/{oid}/complete", parts) == 400
        bad_card = base64.b64encode(b"---\nlicense: 2\n---\n").decode()
        lines = [
            {"key": "header", "value": {"summary": "Unchecked"}},
            {"key": "file", "value": {"path": "README.md", "content": bad_card, "encoding": "base64"}},
        ]
        body = "\n".join(map(json.dumps, lines)).encode()
        url = f"{hub.url}/api/models/{REPO}/commit/main"
        answer = get_session().post(url, content=body, headers={"Authorization": f"Bearer {api.token}"})
        assert answer.status_code == 400 and "README.md" not in repo.files()

    def test_a_part_of_a_file(self, hub, api, repo):
        self.upload(api)
        url = f"{hub.url}/{REPO}/resolve/main/model.safetensors"

        def get(wanted: str):
            return get_session().get(url, headers={"Range": f"bytes={wanted}"})

        assert get("10-19").content == self.CONTENT[10:20]
        assert get("2000-").content == self.CONTENT[2000:]
        assert get("-5").content == self.CONTENT[-5:]
        assert get("10-19").status_code == 206 and get("5000-").status_code == 416

    def test_sharded_weights(self, api, repo, tiny_model, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        shards = set(
            json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())["weight_map"].values()
        )
        assert len(shards) > 1
        api.upload_folder(repo_id=REPO, folder_path=tmp_path / "sharded")
        assert shards <= set(repo.files())
        loaded = RefinerForImageClassification.from_pretrained(REPO).state_dict()
        assert all(loaded[name].equal(tensor) for name, tensor in model.state_dict().items())

    @pytest.mark.slow
    def test_over_a_hundred_megabytes(self, hub, api, repo, tmp_path):
        path = tmp_path / "model.safetensors"
        with path.open("wb") as file:
            for i in range(110):
                file.write(bytes([i]) * 1024**2)
        hub.multipart_chunk_size = 40 * 1024**2
        api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=REPO)
        assert calls(hub, "PUT", STORAGE) == 3
        with open(hf_hub_download(REPO, path.name), "rb") as downloaded, path.open("rb") as file:
            assert downloaded.read() == file.read()


class TestReading:
    def test_snapshot(self, hub, api, repo, folder):
        commit = api.upload_folder(repo_id=REPO, folder_path=folder).oid
        path = snapshot_download(REPO, ignore_patterns=".git*")
        assert path.endswith(commit) and contents(folder) == {
            name: (folder.__class__(path) / name).read_bytes() for name in contents(folder)
        }
        hub.requests.clear()
        assert snapshot_download(REPO) and calls(hub, "GET", STORAGE) == 0

    def test_what_is_not_there(self, api, repo):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("alice/other", "config.json")
        with pytest.raises(RepositoryNotFoundError):
            api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/other")
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(REPO, ".gitattributes", revision="v9")
        with pytest.raises(RevisionNotFoundError):
            api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO, revision="v9")
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(REPO, "config.json")
        assert not api.file_exists(REPO, "config.json") and api.file_exists(REPO, ".gitattributes")
        assert not api.revision_exists(REPO, "v9") and api.revision_exists(REPO, "main")
        with pytest.raises(OSError, match="not a valid model identifier|is not a local folder"):
            RefinerForImageClassification.from_pretrained("alice/other")

    def test_offline_again(self, hub, api, repo, monkeypatch):
        path = hf_hub_download(REPO, ".gitattributes")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert hf_hub_download(REPO, ".gitattributes") == path
        with pytest.raises(OfflineModeIsEnabled):
            api.model_info(REPO)


def test_no_request_leaves(hub):
    get_session().post("https://huggingface.co/api/validate-yaml", json={"content": ""})
    assert hub.requests == [("POST", "/api/validate-yaml")]


def test_child_processes_come_here_too(hub, api, repo, monkeypatch):
    api.update_repo_settings(REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", api.token)
    code = f"import huggingface_hub as client; print(client.hf_hub_download({REPO!r}, '.gitattributes'))"
    path = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert path == hf_hub_download(REPO, ".gitattributes")


def test_other_tests_stay_offline():
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info(REPO)


class TestTokens:
    def test_who_am_i(self, hub, api):
        who = api.whoami()
        assert who["name"] == "alice" and who["auth"]["accessToken"]["role"] == "write"
        assert {org["name"]: org["roleInOrg"] for org in who["orgs"]} == {"lab": "write", "readers": "read"}

    @pytest.mark.parametrize("expired", [False, True])
    def test_wrong_or_expired(self, hub, api, repo, expired):
        token = hub.add_token("alice", expired=True) if expired else "hf_wrong"
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token=token)
        for refused in (
            lambda: api.create_repo("alice/other", token=token),
            lambda: api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO, token=token),
            lambda: hf_hub_download(REPO, ".gitattributes", token=token),  # even though everyone may read this
        ):
            with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as error:
                refused()
            assert error.value.response.status_code == 401 and type(error.value) is HfHubHTTPError

    def test_none(self, hub, api, repo):
        with pytest.raises(HfHubHTTPError, match="401"):
            HfApi().create_repo("alice/other")
        with pytest.raises(RepositoryNotFoundError):
            HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)
        assert HfApi().model_info(REPO).id == REPO

    def test_read_only(self, hub, api, repo):
        reader = HfApi(token=hub.add_token("alice", role="read"))
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: .*write token"):
            reader.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            reader.create_repo("alice/other")
        assert reader.create_repo(REPO, exist_ok=True).repo_id == REPO
        api.update_repo_settings(REPO, private=True)
        assert reader.model_info(REPO).private

    def test_someone_else(self, hub, repo):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            HfApi(token=hub.add_token("bob")).upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)

    def test_fine_grained(self, hub, api, repo):
        one = HfApi(token=hub.add_token("alice", role="fineGrained", scopes={REPO: ["repo.write"]}))
        one.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)
        scoped = one.whoami()["auth"]["accessToken"]["fineGrained"]["scoped"]
        assert [(scope["entity"]["type"], scope["entity"]["name"]) for scope in scoped] == [("model", REPO)]
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            one.create_repo("alice/other")
        HfApi(token=hub.add_token("alice", role="fineGrained", scopes={"alice": ["repo.write"]})).create_repo(
            "alice/other"
        )
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            one.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/other")
        reader = HfApi(token=hub.add_token("alice", role="fineGrained", scopes={"alice": ["repo.content.read"]}))
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            reader.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=REPO)
        api.update_repo_settings(REPO, private=True)
        assert reader.model_info(REPO).private


class TestFaults:
    """What the client does when the Hub or the line fails; it tries some calls again, others not."""

    def upload(self, api):
        return api.upload_file(path_or_fileobj=b"w" * 300_000, path_in_repo="model.safetensors", repo_id=REPO)

    def test_an_error_is_answered_as_often_as_asked(self, hub, api, repo):
        hub.fail("GET", "/api/models/", status=500, times=2, message="Out of order")
        for _ in range(2):
            with pytest.raises(HfHubHTTPError, match="Out of order"):
                api.model_info(REPO)
        assert api.model_info(REPO).id == REPO

    @pytest.mark.parametrize("status", [500, 503])
    @pytest.mark.parametrize("path", [STORAGE, "/preupload/", "objects/batch$", "objects/verify$"])
    def test_the_upload_is_tried_again(self, hub, api, repo, status, path):
        hub.fail("PUT|POST", path, status=status, times=3)
        self.upload(api)
        assert len(repo.files()["model.safetensors"]) == 300_000 and hub.slept == [1, 2, 4]

    def test_the_client_gives_up(self, hub, api, repo):
        hub.fail("PUT", STORAGE, times=100)
        with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'") as error:
            self.upload(api)
        assert isinstance(error.value.__cause__, HfHubHTTPError)
        assert calls(hub, "PUT", STORAGE) == 6 and len(repo.history()) == 1
        hub.faults.clear()
        self.upload(api)
        assert "model.safetensors" in repo.files()

    def test_the_commit_is_not_tried_again(self, hub, api, repo):
        hub.fail("POST", COMMIT)
        with pytest.raises(HfHubHTTPError, match="503"):
            self.upload(api)
        assert calls(hub, "POST", COMMIT) == 1 and hub.slept == [] and len(repo.history()) == 1
        self.upload(api)
        assert calls(hub, "PUT", STORAGE) == 1 and "model.safetensors" in repo.files()

    @pytest.mark.parametrize("after_bytes", [0, 100_000])
    def test_the_line_drops_during_an_upload(self, hub, api, repo, after_bytes):
        hub.drop("PUT", STORAGE, after_bytes=after_bytes)
        self.upload(api)
        assert calls(hub, "PUT", STORAGE) == 2 and len(repo.files()["model.safetensors"]) == 300_000

    def test_the_line_keeps_dropping(self, hub, api, repo):
        hub.drop("PUT", STORAGE, times=6, after_bytes=1000)
        with pytest.raises(RuntimeError, match="Error while uploading") as error:
            self.upload(api)
        assert isinstance(error.value.__cause__, LOST_CONNECTION)
        assert not repo.objects
        self.upload(api)
        assert len(repo.files()["model.safetensors"]) == 300_000

    def test_the_line_drops_during_one_part(self, hub, api, repo):
        hub.multipart_chunk_size = 100_000
        hub.drop("PUT", f"{STORAGE}.*/2$", after_bytes=5000)
        self.upload(api)
        assert calls(hub, "PUT", STORAGE) == 4 and len(repo.files()["model.safetensors"]) == 300_000

    def test_a_commit_whose_answer_is_lost(self, hub, api, repo):
        hub.drop("POST", COMMIT, answered=True)
        with pytest.raises(LOST_CONNECTION):
            self.upload(api)
        assert calls(hub, "POST", COMMIT) == 1 and len(repo.history()) == 2
        # It was carried out: the second attempt has nothing left to do.
        assert self.upload(api).oid == repo.branches["main"] and len(repo.history()) == 2

    def test_a_commit_that_never_arrived(self, hub, api, repo):
        hub.drop("POST", COMMIT, after_bytes=10)
        with pytest.raises(LOST_CONNECTION):
            self.upload(api)
        assert len(repo.history()) == 1

    @pytest.mark.parametrize(
        "headers, pauses",
        [({"Retry-After": "3"}, [4.0]), ({"RateLimit": '"api";r=0;t=7'}, [8.0]), ({}, [1])],
        ids=["retry after", "rate limit", "unsaid"],
    )
    def test_too_many_requests(self, hub, api, repo, headers, pauses):
        hub.fail("POST", "/preupload/", status=429, headers=headers)
        self.upload(api)
        assert hub.slept == pauses and "model.safetensors" in repo.files()

    def test_too_many_requests_where_the_client_does_not_wait(self, hub, api):
        hub.fail("POST", "/api/repos/create", status=429, headers={"Retry-After": "3"})
        with pytest.raises(HfHubHTTPError, match="429"):
            api.create_repo(REPO)
        assert hub.slept == [] and not hub.repositories

    def test_a_download_that_breaks_off(self, hub, api, repo):
        self.upload(api)
        hub.drop("GET", STORAGE, after_bytes=100_000)
        with open(hf_hub_download(REPO, "model.safetensors"), "rb") as file:
            assert file.read() == b"w" * 300_000
        assert calls(hub, "GET", STORAGE) == 2

    def test_a_hub_that_is_down(self, hub, api, repo):
        hub.fail("GET|HEAD", ".", times=100)
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(REPO, ".gitattributes")

    def test_forgotten_with_everything_else(self, hub, api, repo):
        hub.fail("GET", ".", times=9)
        hub.reset()
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami()
        assert hub.requests == [("GET", "/api/whoami-v2")] and not hub.repositories


class TestCards:
    INDEX = """
model-index:
- name: refiner
  results:
  - task: {type: image-classification}
    dataset: {type: digits, name: Digits}
    metrics:
    - {type: accuracy, value: 0}
"""

    def card(self, metadata: str) -> ModelCard:
        return ModelCard(f"---\n{metadata.strip()}\n---\n# A model\n", ignore_metadata_errors=True)

    def test_a_good_one(self, hub):
        self.card(
            f"license: apache-2.0\ntags: [vision]\ndatasets: [digits]\nmetrics: [accuracy]\n{self.INDEX}"
        ).validate()
        assert hub.requests == [("POST", "/api/validate-yaml")]

    @pytest.mark.parametrize(
        "metadata, message",
        [
            ("license: Apache License 2.0", "license"),
            ("license: 2", "license"),
            ("tags: vision", "tags"),
            ("datasets: [1]", "datasets"),
            ("metrics: {a: 1}", "metrics"),
            (INDEX.replace("name: refiner", "title: refiner"), r"model-index\[0\].name"),
            (INDEX.replace("{type: image-classification}", "{}"), "task.type"),
            (INDEX.replace("type: digits, ", ""), "dataset.type"),
            (INDEX.replace(", name: Digits", ""), "dataset.name"),
            (INDEX.replace("type: accuracy, ", ""), r"metrics\[0\].type"),
            (INDEX.replace(", value: 0", ""), r"metrics\[0\].value"),
            ("model-index: refiner", "array"),
        ],
    )
    def test_bad_ones(self, api, repo, metadata, message):
        text = f"---\n{metadata}\n---\n".encode()
        with pytest.raises(ValueError, match=f"(?s)Invalid metadata in README.md.*{message}"):
            api.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=REPO)
        assert "README.md" not in repo.files()

    def test_a_bad_one_before_anything_is_pushed(self, hub, api, repo):
        card = self.card("license: Apache License 2.0")
        with pytest.raises(ValueError, match="license"):
            card.validate()
        with pytest.raises(ValueError, match="license"):
            card.push_to_hub(REPO, token=api.token)
        assert {path for _, path in hub.requests} == {"/api/validate-yaml"}

    @pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n"])
    def test_not_a_mapping(self, hub, api, repo, text):
        with pytest.raises(ValueError, match="YAML Metadata Error"):
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)

    def test_none(self, hub, api, repo):
        with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
            api.upload_file(path_or_fileobj=b"# A model\n", path_in_repo="README.md", repo_id=REPO)
        assert repo.files()["README.md"] == b"# A model\n"

    def test_pushed(self, hub, api, repo):
        with warnings.catch_warnings(action="error"):
            self.card("license: mit\ntags: [vision]\npipeline_tag: image-classification").push_to_hub(
                REPO, token=api.token
            )
        info = api.model_info(REPO)
        assert (
            info.card_data.license == "mit" and info.pipeline_tag == "image-classification" and info.tags == ["vision"]
        )
        assert ModelCard.load(REPO).data.license == "mit"
