"""Which files are images: those with an image's extension that aren't hidden, in folders that aren't hidden."""

import glob
import os
from collections.abc import Iterable, Iterator

from PIL import Image


def find_images(given: Iterable[str | os.PathLike]) -> list[str]:
    """
    The image files that are meant, sorted, each once.

    Args:
        given (`Iterable[str]`): files, whatever they are called; folders, of which every file in them and below counts
            that has an image's extension and isn't hidden; patterns such as `"holiday/**/*.jpg"`.

    Raises:
        `ValueError`: a pattern that matches no file, or a folder without images.
        `OSError`: a folder that can't be read.
    """
    found = [file for each in given for file in _expand(os.fspath(each))]
    return sorted({os.path.abspath(file): file for file in found}.values())


def check_images(given: Iterable[str]) -> None:
    """
    What can be said of [`find_images`]' argument at once, without looking into folders.

    Raises:
        `ValueError`: a file or folder that isn't there.
    """
    for each in given:
        if not os.path.lexists(each) and not glob.has_magic(each):
            raise ValueError(_nothing_at(each))


def _expand(given: str) -> list[str]:
    if os.path.isdir(given):
        files = list(images_in(given))
        problem = f"There are no images in the folder {given}."
    elif os.path.lexists(given):  # first, since a file's name may look like a pattern
        return [given]
    else:
        files = [file for file in glob.glob(given, recursive=True) if not os.path.isdir(file)]
        problem = _nothing_at(given)
    if not files:
        raise ValueError(problem)
    return files


def _nothing_at(given: str) -> str:
    return f"There is no file or folder {given}, and as a pattern it matches none."


def images_in(folder: str | os.PathLike[str]) -> Iterator[str]:
    """
    The images in a folder and below it.

    Raises:
        `OSError`: a folder that can't be read.
    """
    extensions = Image.registered_extensions()
    for place, folders, names in os.walk(os.fspath(folder), onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield os.path.join(place, name)


def _fail(error: OSError) -> None:
    """Without this `os.walk` silently leaves out what it can't read."""
    raise error
