"""How every command ends: its errors in words, its exit codes, and what Ctrl-C and SIGTERM do."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


# What is said in words; anything else is a fault of ours, whose traceback helps to mend it.
_IN_WORDS = (
    ValueError, OSError, RuntimeError, FloatingPointError, MemoryError, StrictDataclassError, SafetensorError,
)  # fmt: skip


class Terminated(SystemExit):
    """SIGTERM came. As an exception it lets everything clean up that must."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def command(main: Callable[[list[str] | None], Any]) -> Callable[[list[str] | None], Any]:
    """
    For a command's `main(argv)`: an error that a user can do something about ends the process with its text and exit
    code 1, Ctrl-C with 130 and SIGTERM with 143, after whatever was half-written has gone. The text of a
    `KeyboardInterrupt` is printed: what is kept, and how to go on.
    """

    @wraps(main)
    def run(argv: list[str] | None = None) -> Any:
        try:
            with _sigterm_raises():
                return main(argv)
        except _IN_WORDS as error:
            sys.exit(f"Error: {str(error) or type(error).__name__}{_what_to_do(error)}")
        except KeyboardInterrupt as interrupt:
            print(f"\nInterrupted. {interrupt}".rstrip(), file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return run


def _what_to_do(error: BaseException) -> str:
    """For an error of the system's own, which says what is wrong and no more."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full |= isinstance(error, SafetensorError) and "No space left" in str(error)
    return ". Make room on the disk, and give the same command again." if full else ""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    # Somebody else's handling stays, and only the main thread may set another.
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    this_process = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == this_process:
            raise Terminated
        # A child that was forked, such as one that reads images, has nothing to clean up.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
