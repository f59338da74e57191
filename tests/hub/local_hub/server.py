"""The server itself, and what can go wrong with it."""

import re
import secrets
import threading
import traceback
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from . import large_files  # noqa: F401  its calls register themselves
from .answers import HubError, Response
from .calls import dispatch
from .repositories import Repository
from .requests import Request, Token, User


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that it matches."""

    method: str
    path: str
    times: int
    error: HubError | None = None  # answered instead of carrying the request out
    cut_after: int | None = None  # bytes after which the connection is lost
    unanswered: bool = False  # carried out, the connection lost then

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and bool(re.fullmatch(self.method, method) and re.search(self.path, path))


class LocalHub:
    """The Hub. It serves from the moment it is made until `stop`."""

    def __init__(self):
        self.lock = threading.RLock()
        self.server = HubServer(self)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}"
        self.reset()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def reset(self) -> None:
        """Forgets everything that a test left here."""
        with self.lock:
            self.users: dict[str, User] = {}
            self.tokens: dict[str, Token] = {}
            self.repositories: dict[str, Repository] = {}
            self.faults: list[Fault] = []
            self.requests: list[tuple[str, str]] = []
            self.slept: list[float] = []  # the pauses that a client in this process would have made
            self.multipart_chunk_size: int | None = None

    def add_user(self, name: str, organizations: dict[str, str] | None = None) -> None:
        self.users[name] = User(name, organizations or {})

    def add_token(self, user: str, role: str = "write", scopes: dict | None = None, expired: bool = False) -> str:
        secret = f"hf_{secrets.token_hex(16)}"
        self.tokens[secret] = Token(self.users[user], role, scopes or {}, expired)
        return secret

    def fail(self, method: str, path_regex: str, status=503, times=1, headers=None, message=None) -> None:
        """AnswerTable the next `times` matching requests with an error instead of carrying them out."""
        error = HubError(status, message or HTTPStatus(status).phrase, headers=headers)
        self.faults.append(Fault(method, path_regex, times, error=error))

    def drop(self, method: str, path_regex: str, times=1, after_bytes=0, answered=False) -> None:
        """Cuts the connection of the next `times` matching requests.

        It is lost once `after_bytes` of the request's body have been read, so that nothing happens here; of a request
        without a body, once so many bytes of the answer have been sent. With `answered` the request is carried out
        and only the answer is lost.
        """
        cut_after = None if answered else after_bytes
        self.faults.append(Fault(method, path_regex, times, cut_after=cut_after, unanswered=answered))

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            nothing = Fault("", "", times=0)
            fault = next((fault for fault in self.faults if fault.matches(method, path)), nothing)
            fault.times -= 1
            return fault

    def answer(self, request: Request) -> Response:
        with self.lock:
            try:
                return dispatch(request)
            except HubError as error:
                return error.response()
            except Exception as error:
                # No client tries a 501 again: a mistake in this file shows at once.
                traceback.print_exc()
                return HubError(501, f"The test server failed: {error!r}").response()


class Handler(BaseHTTPRequestHandler):
    """Reads requests and sends answers, or breaks off where a fault says so."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body would wait for its headers to be acknowledged

    def handle_request(self) -> None:
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        # The client asks this once in a process, whichever test comes first.
        if path != "/api/agent-harnesses":
            hub.requests.append((self.command, path))
        fault = hub.take_fault(self.command, path)
        cut_here = fault.cut_after == 0 or (fault.cut_after and self.has_body())
        body = self.receive(fault.cut_after if cut_here else None)
        if cut_here or body is None:
            self.close_connection = True
            return
        request = Request(hub, self.command, path, query, self.headers, body)
        response = fault.error.response() if fault.error else hub.answer(request)
        if not fault.unanswered:
            self.send(response, fault.cut_after)
        if fault.unanswered or fault.cut_after:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "") == "chunked"

    def has_body(self) -> bool:
        return self.chunked() or int(self.headers.get("Content-Length", 0)) > 0

    def receive(self, limit: int | None = None) -> bytes | None:
        """The body, or its first `limit` bytes; None if the client left before it had sent everything."""
        if not self.chunked():
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length if limit is None else min(length, limit))
            return body if limit is not None or len(body) == length else None
        body = b""
        while limit is None or len(body) < limit:
            size = int(self.rfile.readline() or b"0", 16)
            chunk = self.rfile.read(size + 2)
            body += chunk[:size]
            if size == 0:
                return body if chunk else None
        return body

    def send(self, response: Response, limit: int | None = None) -> None:
        """The answer; of one that is cut short, the first `limit` bytes."""
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": len(response.body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[:limit])

    def log_message(self, *args) -> None:
        """Nothing on the screen: `hub.requests` has it."""


class HubServer(ThreadingHTTPServer):
    """Serves on a thread of its own, each client on another."""

    request_queue_size = 64

    def __init__(self, hub: LocalHub):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """Clients that leave in the middle are part of the tests."""
