"""Writing what must not be lost."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# What torch's RuntimeErrors say when a file can't be written to its end.
_OF_WRITING = ("PytorchStreamWriter", "inline_container", "unexpected pos")


@contextmanager
def writing(what: str, unfinished: Path | None = None) -> Iterator[None]:
    """
    While something is written: where that fails (a full disk, a quota, a folder that has become read-only),
    `unfinished` goes away again, since half of it would take the room and serve for nothing.

    Raises:
        `OSError`: it couldn't be written; the message says what to do.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _OF_WRITING):
            raise
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"{what} can't be written: {error}. Make room, or see why; the same command then goes on from the last "
            "checkpoint."
        ) from error
