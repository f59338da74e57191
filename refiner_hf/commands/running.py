"""How every command runs: its options, its errors in words, its exit codes, and what Ctrl-C and SIGTERM do."""

import argparse
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser


Main = Callable[[list[str] | None], Any]  # the words after the program's name, by default the process's own

# Errors that are said in words. Any other is a fault of this package; its traceback helps to mend it.
_IN_WORDS = (
    ValueError, OSError, RuntimeError, FloatingPointError, MemoryError, StrictDataclassError, SafetensorError,
)  # fmt: skip


class Terminated(SystemExit):
    """SIGTERM came. As an exception it lets everything be cleaned up."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default, and the examples in the description as they are written."""


def command(*kinds: type, parse: Callable[[list[str], str, str], tuple] | None = None) -> Callable[[Callable], Main]:
    """
    Makes a command of a function: parses its options, calls it with them, and ends the process as every command ends.

    An error that a user can do something about ends it with the error's text and exit code 1, Ctrl-C with 130 and
    SIGTERM with 143, after half-written files were removed. The text of a `KeyboardInterrupt` is printed: see
    [`if_interrupted`]. Any other error is a fault of this package, and its traceback is shown.

    Args:
        kinds: dataclasses of the options. The function gets one object of each.
        parse (`Callable`, *optional*): makes the function's arguments of the words, the name of the program and the
            head of `--help`, in place of a parser for `kinds`.

    Returns:
        a decorator. The head of `--help` is the docstring of the function's module.
    """

    def decorate(act: Callable) -> Main:
        module = sys.modules[act.__module__]
        program = f"refiner {module.__name__.rpartition('.')[2].replace('_', '-')}"

        @wraps(act)
        def main(argv: list[str] | None = None) -> Any:
            words = sys.argv[1:] if argv is None else argv
            try:
                with _signals_raise():
                    result = act(*(parse or _parser_of(kinds))(words, program, module.__doc__ or ""))
                _leave_other_processes()
                return result
            except _IN_WORDS as error:
                sys.exit(f"Error: {str(error) or type(error).__name__}{_what_to_do(error)}")
            except KeyboardInterrupt as interrupt:
                print(f"\nInterrupted. {interrupt}".rstrip(), file=sys.stderr)
                sys.exit(128 + signal.SIGINT)

        return main

    return decorate


def _leave_other_processes() -> None:
    """
    Ends the talk with other processes of the job, if there are any. Of those only the first one has something to do
    when Python ends, such as reports; the others end at once. When they ended as usual, a thread of theirs was now and
    then aborted ("terminate called without an active exception"), and torchrun took the whole job for failed.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    from torch import distributed

    if not distributed.is_initialized():
        return
    first = distributed.get_rank() == 0
    distributed.destroy_process_group()
    if not first:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _parser_of(kinds: tuple[type, ...]) -> Callable[[list[str], str, str], tuple]:
    def parse(words: list[str], program: str, description: str) -> tuple:
        parser = HfArgumentParser(
            kinds, prog=program, description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        check_options(parser, parser.parse_known_args(words)[1])
        return parser.parse_args_into_dataclasses(words)

    return parse


def check_options(parser: argparse.ArgumentParser, unknown: list[str], others: Iterable[str] = ()) -> None:
    """
    Ends the process where there is an option that a command doesn't have, with the nearest one that it has.

    Args:
        parser: of the command.
        unknown (`list[str]`): the words that it doesn't know.
        others (*optional*): names of options that it has beside those of `parser`.
    """
    known = {word.lstrip("-").replace("-", "_") for action in parser._actions for word in action.option_strings}
    known |= {*others, *(f"no_{name}" for name in others)}
    for word in unknown:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            parser.error(f"there is no option --{name}." + (f" Did you mean --{near[0]}?" if near else ""))


@contextmanager
def if_interrupted(advice: str | Callable[[], str]) -> Iterator[None]:
    """Says, where Ctrl-C interrupts what is within, what is kept and how to continue; as a text or what returns it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(advice if isinstance(advice, str) else advice()) from interrupt


def _what_to_do(error: BaseException) -> str:
    """What to do about an error of the operating system, which says only what is wrong."""
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
    # Handlers that somebody else has set stay, and only the main thread may set handlers.
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    this_process, has_timer, late = os.getpid(), hasattr(signal, "setitimer"), []

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != this_process and number == signal.SIGTERM:
            # In a forked child, such as a data loader's worker, there is nothing to clean up.
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
