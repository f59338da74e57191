"""The repository on the Hub, and whether a token may write to it. Checked before any long work."""

import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id

from ..version import __version__


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 4
_REF = re.compile(r"[A-Za-z0-9][\w./-]*")
# 409 and 412: another process wrote to the repository at the same moment.
_PASSING_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}


class PublishError(OSError):
    """Publishing failed, for a reason that the message says. Nothing local was changed."""


def hub(token: str | None = None) -> HfApi:
    """The client for the Hub (of `HF_ENDPOINT`), with the given token or that of `hf auth login` or `HF_TOKEN`."""
    # A token read from a file may end in a line break, which the client would show in an error about its header.
    return HfApi(token=(token or "").strip() or get_token(), library_name="refiner_hf", library_version=__version__)


def prepare_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """
    Checks everything about the destination that can be checked beforehand, and makes the repository and the branch
    where they aren't there yet.

    Args:
        repo_id: "name" (in the user's own namespace) or "namespace/name".
        private (`bool`, *optional*): whether the repository shall be private; by default, as it is, and a new one as
            its namespace has it (usually public).
        branch (`str`, *optional*): that will be written to, instead of `main`.
        tag (`str`, *optional*): that will be made; it must be new, or be at the branch's last commit.
        create_pr (`bool`, *optional*): a pull request will be opened, which takes no right to write to the repository;
            it must be there.
        token (`str`, *optional*): by default the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        the full name, "namespace/name".

    Raises:
        `ValueError`: a name that can't be one; a namespace that isn't the user's; a repository that is public where
            `private` is wanted, or the other way round; a tag that exists.
        [`PublishError`]: no token, an invalid, expired or read-only one, or one without rights here; no connection.
    """
    validate_repo_id(repo_id)
    for kind, ref in (("branch", branch), ("tag", tag)):
        if ref is not None and (not _REF.fullmatch(ref) or ".." in ref or ref.endswith((".", "/", ".lock"))):
            raise ValueError(f"{ref!r} can't be the name of a {kind}. Use letters, digits and - _ . / between them.")
    api = hub(token)
    user = with_retries(lambda: _who(api), "Asking the Hub about the token")
    name = repo_id.split("/")[-1]
    namespace = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    repo_id = f"{namespace}/{name}"
    if create_pr:
        if private is not None or tag is not None or branch not in (None, "main"):
            raise ValueError("A pull request goes to main as it is: give no branch, tag or visibility with it.")
        with_retries(lambda: _check_pull_request(api, user, repo_id), f"Looking for the repository {repo_id}")
        return repo_id
    _check_namespace(user, namespace, name)

    def prepare() -> None:
        _make(api, user, repo_id, private)
        if branch not in (None, "main"):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        if tag is not None:
            _check_tag(api, repo_id, tag, branch or "main")

    with_retries(prepare, f"Preparing the repository {repo_id}")
    return repo_id


def with_retries(action: Callable[[], Result], what: str, tries: int = TRIES) -> Result:
    """
    Runs `action`, again after a while where the Hub is busy, limits the rate, or the connection broke, up to `tries`
    times in all.

    Raises:
        [`PublishError`]: it failed in a way that waiting doesn't mend, or too often.
    """
    for attempt in range(1, tries + 1):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise PublishError(f"{what} needs the network, but HF_HUB_OFFLINE is set.") from error
        except (HTTPError, RuntimeError) as error:  # the client wraps errors of large uploads in a RuntimeError
            cause = _http_cause(error)
            if cause is None:
                raise
            response = cause.response if isinstance(cause, HfHubHTTPError) else None
            passing = response is None or response.status_code in _PASSING_STATUS
            if not passing or attempt == tries:
                tried = f" after {attempt} tries" if passing and tries > 1 else ""
                raise PublishError(f"{what} failed{tried}: {_explain(cause, response)}") from error
            seconds = _seconds_to_wait(response, attempt)
            busy = f"status {response.status_code}" if response is not None else "no connection"
            logger.warning(f"{what}: {busy}. Trying again in {seconds:g} s ({attempt} of {tries - 1}).")
            time.sleep(seconds)
    raise AssertionError("unreachable")


def _who(api: HfApi) -> dict[str, Any]:
    try:
        return api.whoami()
    except LocalTokenNotFoundError as error:
        raise PublishError(
            "There is no token for the Hub. Log in with `hf auth login`, set HF_TOKEN, or give a token."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PublishError(
                "The Hub doesn't accept the token: it is wrong or has expired. Make one with the right to write at "
                f"{api.endpoint}/settings/tokens and log in again with `hf auth login`."
            ) from error
        raise


def _check_namespace(user: dict[str, Any], namespace: str, name: str) -> None:
    roles = {user["name"]: "admin"}
    roles |= {organization["name"]: organization.get("roleInOrg") for organization in user.get("orgs", [])}
    if namespace not in roles:
        raise ValueError(
            f"{user['name']} can't write to {namespace}/{name}: the namespace must be one of {', '.join(roles)}."
        )
    if roles[namespace] == "read":
        raise PublishError(f"{user['name']} may only read in the organisation {namespace}. Ask its admins.")


def _check_pull_request(api: HfApi, user: dict[str, Any], repo_id: str) -> None:
    try:
        api.repo_info(repo_id)
    except RepositoryNotFoundError as error:
        raise ValueError(f"There is no repository {repo_id} to open a pull request in.") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishError(f"The token of {user['name']} may only read. Make one with the right to write.")


def _make(api: HfApi, user: dict[str, Any], repo_id: str, private: bool | None) -> None:
    """Makes the repository, or checks the one that is there."""
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        _check_rights(user, repo_id, exists=False)
        # exist_ok: an answer that got lost, and the repeated request finds the repository made.
        api.create_repo(repo_id, private=private, exist_ok=True)
        return
    _check_rights(user, repo_id, exists=True)
    if private is not None and bool(info.private) != private:
        raise ValueError(
            f"{repo_id} exists and is {'private' if info.private else 'public'}, but "
            f"{'private' if private else 'public'} was asked for. Change it in the repository's settings on the Hub, "
            "or choose another name."
        )


def _check_tag(api: HfApi, repo_id: str, tag: str, branch: str) -> None:
    refs = api.list_repo_refs(repo_id)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    taken = {ref.name: ref.target_commit for ref in refs.tags}
    if taken.get(tag) not in (None, heads.get(branch)):  # else it is this very push, repeated
        raise ValueError(f"{repo_id} has a tag {tag!r} already. Choose another, or delete that one on the Hub.")


def _check_rights(user: dict[str, Any], repo_id: str, exists: bool) -> None:
    """Refuses a token that can't write; what a token is for is in the Hub's answer to whoami."""
    token = user.get("auth", {}).get("accessToken", {})
    name = f"The token {token.get('displayName', '')!r} of {user['name']}"
    if token.get("role") == "read":
        raise PublishError(f"{name} may only read. Make one with the right to write.")
    if token.get("role") == "fineGrained":
        covering = {repo_id.split("/")[0], repo_id} if exists else {repo_id.split("/")[0]}
        may_write = any(
            scope.get("entity", {}).get("name") in covering and "repo.write" in scope.get("permissions", [])
            for scope in token.get("fineGrained", {}).get("scoped", [])
        )
        if not may_write:
            what = "write to" if exists else "make the repository"
            raise PublishError(f"{name} is fine-grained and may not {what} {repo_id}. Give it that right.")


def _http_cause(error: BaseException | None) -> HTTPError | None:
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _seconds_to_wait(response, attempt: int) -> float:
    if response is not None and response.status_code == 429:
        limit = parse_ratelimit_headers(response.headers)
        if limit is not None:
            return limit.reset_in_seconds + 1
        if response.headers.get("Retry-After", "").isdigit():
            return int(response.headers["Retry-After"])
    return 2.0**attempt


def _explain(error: HTTPError, response) -> str:
    if response is None:
        return f"the connection to {hub().endpoint} broke or can't be made ({error or type(error).__name__})."
    if response.status_code in (401, 403):
        return f"the Hub refuses it ({error}). Has the token the right to write here?"
    return str(error)
