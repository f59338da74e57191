"""Saving what must not be lost: half-written files are removed, and errors say what to do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# What torch's RuntimeErrors say when a file can't be written to its end.
_OF_WRITING = ("PytorchStreamWriter", "inline_container", "unexpected pos")


@contextmanager
def explain_write_errors(what: str, unfinished: Path | None = None) -> Iterator[None]:
    """
    While something is written. If that fails (a full disk, a quota, a folder that has become read-only), `unfinished`
    is removed, because half of it would only take room.

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
            f"{what} can't be written: {error}. Make room on the disk, or repair what is wrong; the same command then "
            "continues from the last checkpoint."
        ) from error
