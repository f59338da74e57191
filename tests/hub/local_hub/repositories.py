"""Repositories: files through time, and who may see them."""

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from .answers import HubError


LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
LARGE_SIZE = 10 * 1024**2


class Blob(bytes):
    """A file's content, which knows whether git or the storage for large files keeps it."""

    large = False

    @classmethod
    def stored(cls, content: bytes) -> "Blob":
        blob = cls(content)
        blob.large = True
        return blob

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        """The content, or the few lines that stand for it in git."""
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return pointer.format(self.sha256, len(self)).encode() if self.large else self

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    def facts(self) -> dict:
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self), "pointerSize": len(self.in_git)}
        return {"oid": self.oid, "size": len(self), **({"lfs": lfs} if self.large else {})}


@dataclass
class Commit:
    """One state of a repository. No two share a `sha`, so that nothing cached for one is taken for another."""

    parent: str | None
    title: str
    description: str
    files: dict[str, Blob]
    author: str
    sha: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z")

    def summary(self) -> dict:
        return {"id": self.sha, "title": self.title, "date": self.date}


class Repository:
    """Files through time, and who may see them."""

    def __init__(self, kind: str, id: str, author: str, private: bool = False):
        self.kind, self.id, self.private, self.gated = kind, id, private, False
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[str, str] = {}
        # Uploaded contents by their sha256, committed or not, and the parts of those that are under way.
        self.objects: dict[str, Blob] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)
        self.commit("main", Commit(None, "initial commit", "", {".gitattributes": Blob(attributes.encode())}, author))

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def path(self) -> str:
        """Where its pages are: models are at the root."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def commit(self, branch: str, commit: Commit) -> Commit:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or self.pull_requests.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return dict(self.at(revision).files)

    def history(self, revision: str = "main") -> list[Commit]:
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def last_change(self, path: str, revision: str) -> Commit:
        """The commit that gave a file (or the files below a folder) its present content."""

        def content(commit: Commit) -> dict:
            return {name: blob for name, blob in commit.files.items() if f"{name}/".startswith(f"{path}/")}

        commits = self.history(revision)
        older = zip(commits, commits[1:])
        return next((new for new, old in older if content(new) != content(old)), commits[-1])

    def entry(self, path: str, revision: str, expand: bool) -> dict | None:
        """A file or folder as listings show it; None where there is nothing of that name."""
        files = self.at(revision).files
        below = [name for name in files if name.startswith(f"{path}/")]
        if path not in files and not below:
            return None
        folder = {"type": "directory", "oid": hashlib.sha1("".join(below).encode()).hexdigest(), "size": 0}
        entry = {"type": "file", **files[path].facts()} if path in files else folder
        expanded = {"lastCommit": self.last_change(path, revision).summary()} if expand else {}
        return {"path": path, **entry, **expanded}

    def list(self, folder: str, revision: str, recursive: bool, expand: bool) -> list[dict]:
        start = f"{folder}/" if folder else ""
        paths = set()
        for name in self.at(revision).files:
            if name.startswith(start):
                steps = name.removeprefix(start).split("/")
                depths = range(1, len(steps) + 1) if recursive else [1]
                paths |= {start + "/".join(steps[:depth]) for depth in depths}
        return [self.entry(path, revision, expand) for path in sorted(paths)]
