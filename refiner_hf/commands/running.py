"""How every command ends: its errors in words, its exit codes, and what Ctrl-C and SIGTERM do."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
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
            with _signals_raise():
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
def _signals_raise() -> Iterator[None]:
    """
    SIGTERM raises [`Terminated`] and SIGINT a `KeyboardInterrupt`, and not where Python ignores what is raised: there
    they come again a moment later.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    usual = before == {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    # Somebody else's handling stays, and only the main thread may set another.
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    this_process, has_timer, late = os.getpid(), hasattr(signal, "setitimer"), []

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != this_process and number == signal.SIGTERM:
            # A child that was forked, such as one that reads images, has nothing to clean up.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif has_timer and _would_be_ignored(frame):
            late.append(number)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    if has_timer:
        before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
        signal.signal(signal.SIGALRM, lambda number, frame: handle(late.pop(), frame) if late else None)
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _would_be_ignored(frame: FrameType | None) -> bool:
    """Whether Python is in a destructor, or starts a process: what is raised there is printed and forgotten."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or (code.co_name == "_launch" and code.co_filename.endswith("popen_fork.py")):
            return True
        frame = frame.f_back
    return False
