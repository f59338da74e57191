"""Two commands never write to one place at the same time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = ".lock"  # in a folder that is written to


@contextmanager
def locked(file: str | Path, what: str) -> Iterator[None]:
    """
    Holds a lock while something is written. It ends with the process that holds it, however that ends.

    Args:
        file: the lock's file, in a folder that can be written. It is removed afterwards.
        what (`str`): what is written, for the error.

    Raises:
        `OSError`: another process holds the lock, or the file can't be made.
    """
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"Another process writes to {what} at this moment. Wait until it has ended, or write somewhere else."
        ) from error
    try:
        yield
    finally:
        # Before the release: a process that has opened the file already then sees that it is gone, and makes another.
        Path(file).unlink(missing_ok=True)
        lock.release()


def locked_beside(path: str | Path, what: str | None = None) -> AbstractContextManager[None]:
    """[`locked`] for something that isn't there yet, by a hidden file beside it. `what` is by default its path."""
    path = Path(path)
    return locked(path.with_name(f".{path.name}.lock"), str(path) if what is None else what)


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """
    [`locked`] for a folder, which is made where it isn't there.

    Raises:
        `OSError`: another process writes to it, or it can't be written.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, f"the folder {folder}"))
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(f"The folder {folder} can't be written: {error}. Give another one.") from error
        yield
