"""Which requests the page's server answers, and the folder for visitors' pictures."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from . import THIS_MACHINE


_FOLDER_OPTION = "GRADIO_TEMP_DIR"  # where Gradio reads it
_HOUR = 3600  # seconds


class SameOriginMiddleware:
    """Refuses requests that a browser makes for another site's page: their `Origin` isn't the `Host`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != headers.get("host"):
                await PlainTextResponse("Another site's page may not use this one.", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def guards(public: bool) -> list[Middleware]:
    """
    Middleware that protects the server: pages of other sites can't use it. Unless it is `public`, names of other
    domains for this machine can't be used either (DNS rebinding).
    """
    own_names = [] if public else [Middleware(TrustedHostMiddleware, allowed_hosts=[THIS_MACHINE, "localhost"])]
    return [*own_names, Middleware(SameOriginMiddleware)]


@contextmanager
def own_folder() -> Iterator[Path]:
    """
    A folder for all that visitors upload and that the page draws, as long as the page is there. It goes with it,
    whatever is in it and however the page ends; files of more than a day go before.
    """
    before, ended = os.environ.get(_FOLDER_OPTION), threading.Event()
    with tempfile.TemporaryDirectory(prefix="refiner-demo-", ignore_cleanup_errors=True) as folder:
        os.environ[_FOLDER_OPTION] = folder
        threading.Thread(target=_clean, args=(Path(folder), ended), daemon=True).start()
        try:
            yield Path(folder)
        finally:
            ended.set()
            del os.environ[_FOLDER_OPTION]
            if before is not None:
                os.environ[_FOLDER_OPTION] = before


def _clean(folder: Path, ended: threading.Event) -> None:
    while not ended.wait(_HOUR):
        for path in folder.rglob("*"):
            with suppress(OSError):  # it has been removed meanwhile, or it is a folder
                if path.is_file() and path.stat().st_mtime < time.time() - 24 * _HOUR:
                    path.unlink()
