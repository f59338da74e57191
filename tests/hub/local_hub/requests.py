"""Users, tokens and what a client asks for with them."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs

from .answers import HubError
from .repositories import Repository


@dataclass
class User:
    name: str
    organizations: dict[str, str]

    def role_in(self, namespace: str) -> str | None:
        return "admin" if namespace == self.name else self.organizations.get(namespace)


@dataclass
class Token:
    user: User
    role: str
    scopes: dict[str, list[str]]
    expired: bool

    def allows(self, right: str, namespace: str, repo_id: str | None = None) -> bool:
        """Both its owner and the token itself must have the right, "read" or "write"."""
        if self.role == "fineGrained":
            granted = [*self.scopes.get(namespace, []), *self.scopes.get(repo_id, [])]
            token_may = "repo.write" in granted or (right == "read" and "repo.content.read" in granted)
        else:
            token_may = right == "read" or self.role == "write"
        role = self.user.role_in(namespace)
        return token_may and (role in ("admin", "write") if right == "write" else role is not None)

    def scoped(self) -> list[dict]:
        """The scopes as `whoami` tells them."""
        kinds = {name: "model" if "/" in name else "user" if name == self.user.name else "org" for name in self.scopes}
        return [
            {"entity": {"_id": name, "type": kinds[name], "name": name}, "permissions": permissions}
            for name, permissions in self.scopes.items()
        ]


@dataclass
class Request:
    hub: Any  # the LocalHub, which imports this file
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)

    def asks_for(self, name: str) -> bool:
        return parse_qs(self.query).get(name, [""])[0].lower() in ("1", "true")

    @cached_property
    def token(self) -> Token | None:
        """The client's, if it sent one; a wrong one is refused even where none is needed."""
        secret = self.headers.get("Authorization", "").removeprefix("Bearer ")
        token = self.hub.tokens.get(secret)
        if secret and (token is None or token.expired):
            raise HubError(401, "Invalid credentials in Authorization header")
        return token

    def must_be_known(self, code: str | None = None) -> Token:
        if self.token is None:
            raise HubError(401, "Invalid username or password.", code)
        return self.token

    def may(self, right: str, repo: Repository) -> bool:
        return self.token is not None and self.token.allows(right, repo.namespace, repo.id)

    def repository(self, kind: str, id: str, right: str | None) -> Repository:
        """The repository, if the client has the right to it. Without a right the address itself is the secret."""
        repo = self.hub.repositories.get(id if kind == "models" else f"{kind}/{id}")
        # Who may not see a repository can't tell it from one that isn't there.
        if repo is None or (right and repo.private and not self.may("read", repo)):
            self.must_be_known("RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if right == "write":
            if self.must_be_known("RepoNotFound").role == "read":
                raise HubError(403, "you must use a write token to upload to a repository.")
            if not self.may("write", repo):
                raise HubError(403, f"You don't have the rights to write to {repo.id}")
        return repo
