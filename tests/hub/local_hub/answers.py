"""What goes back to the client."""

import json


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}

    def response(self) -> "Response":
        headers = {"X-Error-Message": self.message, **({"X-Error-Code": self.code} if self.code else {})}
        return Response({"error": self.message}, self.status, {**headers, **self.headers})


class Response:
    """What goes back to the client: bytes as they are, anything else as JSON."""

    def __init__(self, body=b"", status: int = 200, headers: dict | None = None):
        json_type = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers = status, {**json_type, **(headers or {})}
