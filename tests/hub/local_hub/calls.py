"""What the Hub answers, call by call."""

import base64
import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs, unquote

from .answers import HubError, Response
from .cards import check_card, read_card
from .repositories import LARGE_SIZE, LARGE_SUFFIXES, Blob, Commit, Repository
from .requests import Request


REPO_NAME = re.compile(r"(?!.*(?:--|\.\.))(?![.-])[A-Za-z0-9._-]{1,96}(?<![.-])(?<!\.git)")
ROUTES: list[tuple[re.Pattern, re.Pattern, str | None, Callable]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
STORAGE = r"/storage/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, path: str, right: str | None = None):
    """Registers what answers `method` on `path`; it gets the repository that the path names as `repo`."""

    def register(function: Callable) -> Callable:
        ROUTES.append((re.compile(method), re.compile(path), right, function))
        return function

    return register


def dispatch(request: Request) -> Response:
    _ = request.token  # so that a wrong one is noticed first
    for method, path, right, function in ROUTES:
        if method.fullmatch(request.method) and (match := path.fullmatch(request.path)):
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            if "id" in arguments:
                kind, id = arguments.pop("kind", "models"), arguments.pop("id")
                arguments["repo"] = request.repository(kind, id, right)
            answer = function(request, **arguments)
            return answer if isinstance(answer, Response) else Response(answer)
    raise HubError(404, f"This server has no {request.method} {request.path}")


@route("GET", "/api/whoami-v2")
def whoami(request: Request):
    token = request.must_be_known()
    access = {"displayName": "test", "role": token.role}
    if token.role == "fineGrained":
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": token.scoped()}
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in token.user.organizations.items()]
    auth = {"type": "access_token", "accessToken": access}
    return {"type": "user", "name": token.user.name, "fullname": token.user.name, "orgs": orgs, "auth": auth}


@route("POST", "/api/repos/create")
def create_repo(request: Request):
    token, wanted = request.must_be_known(), request.json()
    kind, name, namespace = f"{wanted.get('type') or 'model'}s", wanted["name"], wanted.get("organization")
    namespace = namespace or token.user.name
    private = wanted.get("private") or wanted.get("visibility") == "private"
    repo = Repository(kind, f"{namespace}/{name}", token.user.name, private)
    if not REPO_NAME.fullmatch(name):
        raise HubError(400, f"Invalid repo name: {name}")
    if not token.allows("write", namespace, repo.id):
        raise HubError(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"')
    answer = {"url": f"{request.hub.url}/{repo.path}", "name": repo.id}
    if repo.path in request.hub.repositories:
        return Response({**answer, "error": f"You already created this {kind[:-1]} repo"}, 409)
    request.hub.repositories[repo.path] = repo
    return answer


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request):
    wanted = request.json()
    namespace = wanted.get("organization") or request.must_be_known().user.name
    repo = request.repository(f"{wanted.get('type') or 'model'}s", f"{namespace}/{wanted['name']}", "write")
    del request.hub.repositories[repo.path]
    return {}


@route("PUT", f"{API}/settings", "write")
def change_settings(request: Request, repo: Repository):
    wanted = request.json()
    if "private" in wanted or "visibility" in wanted:
        repo.private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
    repo.gated = wanted.get("gated", repo.gated)
    return {"private": repo.private, "gated": repo.gated}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request):
    errors, warnings = ([{"message": text} for text in texts] for texts in check_card(request.json()["content"]))
    return Response({"errors": errors, "warnings": warnings}, 400 if errors else 200)


@route("GET", f"{API}/auth-check", "read")
@route("GET", f"{API}/auth-check/write", "write")
def auth_check(request: Request, repo: Repository):
    return {}


@route("GET", f"{API}(?:/revision{REVISION})?", "read")
def info(request: Request, repo: Repository, revision: str = "main"):
    commit = repo.at(revision)
    card = read_card(commit.files.get("README.md", b"").decode()) or {}
    siblings = [
        {"rfilename": path, "blobId": blob.oid, **blob.facts()} if request.asks_for("blobs") else {"rfilename": path}
        for path, blob in sorted(commit.files.items())
    ]
    return {
        **{"id": repo.id, "author": repo.namespace, "sha": commit.sha, "siblings": siblings, "cardData": card},
        **{"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0},
        **{"createdAt": repo.history(commit.sha)[-1].date, "lastModified": commit.date, "tags": card.get("tags", [])},
        **{name: card[name] for name in ("library_name", "pipeline_tag") if name in card},
    }


@route("GET", f"{API}/tree{REVISION}(?:/(?P<path>.+))?", "read")
def tree(request: Request, repo: Repository, revision: str, path: str = ""):
    entries = repo.list(path, revision, request.asks_for("recursive"), request.asks_for("expand"))
    if path and not entries:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return entries


@route("POST", f"{API}/paths-info{REVISION}", "read")
def paths_info(request: Request, repo: Repository, revision: str):
    form = parse_qs(request.body.decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = [repo.entry(path.rstrip("/"), revision, expand) for path in form.get("paths", [])]
    return [entry for entry in entries if entry]


@route("GET", f"{API}/refs", "read")
def refs(request: Request, repo: Repository):
    kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags), "converts": ("", {})}
    return {
        kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in names.items()]
        for kind, (folder, names) in {**kinds, "pullRequests": ("", {})}.items()
    }


@route("GET", f"{API}/commits{REVISION}", "read")
def commits(request: Request, repo: Repository, revision: str):
    history = repo.history(revision)
    return [{**c.summary(), "message": c.description, "authors": [{"user": c.author}]} for c in history]


@route("POST", f"{API}/branch/(?P<name>[^/]+)", "write")
def create_branch(request: Request, repo: Repository, name: str):
    commit = repo.at(request.json().get("startingPoint", "main"))
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: {name}")
    repo.branches[name] = commit.sha
    return {}


@route("POST", f"{API}/tag{REVISION}", "write")
def create_tag(request: Request, repo: Repository, revision: str):
    commit, name = repo.at(revision), request.json()["tag"]
    if name in repo.tags:
        raise HubError(409, f"Tag reference exists already: {name}")
    repo.tags[name] = commit.sha
    return {}


@route("DELETE", f"{API}/(?P<kind_of_name>branch|tag)/(?P<name>[^/]+)", "write")
def delete_name(request: Request, repo: Repository, kind_of_name: str, name: str):
    names = repo.branches if kind_of_name == "branch" else repo.tags
    if name not in names:
        raise HubError(404, f"No {kind_of_name} {name}", "RevisionNotFound")
    if names is repo.branches and name == "main":
        raise HubError(403, "The main branch cannot be deleted")
    del names[name]
    return {}


def check_writer(request: Request, repo: Repository) -> bool:
    """Whether a pull request is opened, which takes no more than the right to read; else it takes that to write."""
    opens_pull_request = request.asks_for("create_pr")
    if opens_pull_request:
        request.must_be_known()
    else:
        request.repository(repo.kind, repo.id, "write")
    return opens_pull_request


@route("POST", f"{API}/preupload{REVISION}", "read")
def preupload(request: Request, repo: Repository, revision: str):
    """Tells how to upload each file, and what there is under its name, so that the client leaves out what it has."""
    check_writer(request, repo)
    present = repo.at(revision).files

    def plan(path: str, size: int) -> dict:
        large = path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE
        known = {"oid": present[path].sha256 if present[path].large else present[path].oid} if path in present else {}
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}

    return {"files": [plan(file["path"], file["size"]) for file in request.json()["files"]]}


@route("POST", f"{API}/commit{REVISION}", "read")
def commit(request: Request, repo: Repository, revision: str):
    opens_pull_request = check_writer(request, repo)
    if revision not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    parent, header = repo.at(revision), {}
    files = dict(parent.files)
    for line in request.body.splitlines():
        operation = json.loads(line)
        if operation["key"] == "header":
            header = operation["value"]
        else:
            apply(operation["key"], operation["value"], files, repo)
    if header.get("parentCommit", parent.sha) != parent.sha:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    if errors := check_card(files.get("README.md", b"").decode())[0]:
        raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    author = request.must_be_known().user.name
    new = Commit(parent.sha, header["summary"], header.get("description", ""), files, author)
    page = f"{request.hub.url}/{repo.path}"
    answer = {"success": True, "commitOid": new.sha, "commitUrl": f"{page}/commit/{new.sha}"}
    if not opens_pull_request:
        repo.commit(revision, new)
        return answer
    number = len(repo.pull_requests) + 1
    repo.commits[new.sha], repo.pull_requests[f"refs/pr/{number}"] = new, new.sha
    return {**answer, "pullRequestUrl": f"{page}/discussions/{number}"}


def apply(action: str, value: dict, files: dict[str, Blob], repo: Repository) -> None:
    """Carries one line of a commit out on `files`."""
    path = value["path"].rstrip("/")
    if action == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif action == "lfsFile":
        if value["oid"] not in repo.objects:
            raise HubError(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
        files[path] = repo.objects[value["oid"]]
    elif action in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or (action == "deletedFolder" and name.startswith(f"{path}/"))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"This server can't {action}")
