"""A folder that appears only when it is complete."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .locking import locked_beside


def check_new(folder: Path) -> None:
    """Raises a `FileExistsError` where there is something in `folder` already, or something else in its place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and isn't an empty folder. Give another --output_dir.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into. At the end it is renamed to `folder`; if anything fails, it is removed."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked_beside(folder, f"the folder {folder}"):
        check_new(folder)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            unfinished.chmod(0o755)
            yield unfinished
            if folder.exists():
                folder.rmdir()
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
