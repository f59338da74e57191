"""The storage of large files: plans for an upload, whole or in parts, and downloads."""

import hashlib
import re
from urllib.parse import quote

from .answers import HubError, Response
from .calls import PAGE, REVISION, STORAGE, route
from .repositories import Blob, Repository
from .requests import Request


@route("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "read")
def batch(request: Request, repo: Repository):
    """Where to put each large file that isn't there yet. Whether it may become part of a commit is asked there."""
    request.must_be_known()
    verify = {"href": f"{request.hub.url}/{repo.path}.git/info/lfs/objects/verify"}

    def plan(oid: str, size: int) -> dict:
        if oid in repo.objects:
            return {"oid": oid, "size": size}
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": upload_to(request.hub, repo, oid, size), "verify": verify},
        }

    return {"transfer": "basic", "objects": [plan(file["oid"], file["size"]) for file in request.json()["objects"]]}


def upload_to(hub, repo: Repository, oid: str, size: int) -> dict:
    """One address, or one for each part and one to call when all of them are there."""
    place, chunk = f"/storage/{repo.kind}/{repo.id}/{oid}", hub.multipart_chunk_size
    if not chunk or size <= chunk:
        return {"href": hub.storage_url + place, "header": {}}
    parts = {str(number): f"{hub.storage_url}{place}/{number}" for number in range(1, -(-size // chunk) + 1)}
    return {"href": f"{hub.url}{place}/complete", "header": {"chunk_size": str(chunk), **parts}}


def store(repo: Repository, oid: str, content: bytes) -> None:
    blob = Blob.stored(content)
    if blob.sha256 != oid:
        raise HubError(400, "The content does not match its checksum")
    repo.objects[oid] = blob


@route("PUT", STORAGE)
def put_object(request: Request, repo: Repository, oid: str):
    store(repo, oid, request.body)
    return {}


@route("PUT", rf"{STORAGE}/(?P<number>\d+)")
def put_part(request: Request, repo: Repository, oid: str, number: str):
    repo.parts.setdefault(oid, {})[int(number)] = request.body
    return Response(headers={"ETag": part_etag(request.body)})


def part_etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@route("POST", f"{STORAGE}/complete")
def complete(request: Request, repo: Repository, oid: str):
    parts = repo.parts.pop(oid, {})
    named = {part["partNumber"]: part["etag"] for part in request.json()["parts"]}
    if named != {number: part_etag(content) for number, content in parts.items()}:
        raise HubError(400, "The parts are not those that were uploaded")
    store(repo, oid, b"".join(parts[number] for number in sorted(parts)))
    return {}


@route("POST", rf"{PAGE}\.git/info/lfs/objects/verify", "read")
def verify(request: Request, repo: Repository):
    wanted = request.json()
    if wanted["oid"] not in repo.objects:
        raise HubError(404, "The object was not uploaded")
    if len(repo.objects[wanted["oid"]]) != wanted["size"]:
        raise HubError(400, "The object has another size")
    return {}


@route("GET|HEAD", STORAGE)
def get_object(request: Request, repo: Repository, oid: str):
    if oid not in repo.objects:
        raise HubError(404, "No such object")
    return content(request, repo.objects[oid], {"ETag": f'"{oid}"'})


@route("GET|HEAD", f"{PAGE}/resolve{REVISION}/(?P<path>.+)", "read")
def resolve(request: Request, repo: Repository, revision: str, path: str):
    commit = repo.at(revision)
    headers = {"X-Repo-Commit": commit.sha}
    if repo.gated and not request.may("write", repo):
        status = 403 if request.token else 401
        raise HubError(status, f"Access to {repo.path} is restricted.", "GatedRepo", headers)
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.files[path]
    if not blob.large:
        return content(request, blob, {**headers, "ETag": f'"{blob.oid}"'})
    linked = {"X-Linked-Size": str(len(blob)), "X-Linked-Etag": f'"{blob.sha256}"'}
    place = f"{request.hub.storage_url}/storage/{repo.kind}/{quote(repo.id)}/{blob.sha256}"
    return Response(b"", 302, {**headers, **linked, "Location": place})


def content(request: Request, blob: Blob, headers: dict) -> Response:
    """A file, or the part of it that the client asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return Response(bytes(blob), 200, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(len(blob) - int(last), 0)
    stop = min(int(last) + 1, len(blob)) if first and last else len(blob)
    if start >= stop:
        return Response(b"", 416, {"Content-Range": f"bytes */{len(blob)}"})
    return Response(blob[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(blob)}"})
