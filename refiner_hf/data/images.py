"""Images as `datasets` stores them, decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image as PILImage
from PIL import ImageOps
from transformers.utils import logging

from ..image_processing_pil_refiner import to_8_bit_rgb


try:
    import simplejpeg
except ImportError:  # where it can't be installed; Pillow gives the same levels, only later
    simplejpeg = None


logger = logging.get_logger(__name__)

_ORIENTATION = 0x0112  # EXIF tag
_ON_THE_SIDE = (5, 6, 7, 8)  # its values that exchange width and height
_JPEG = ("JPEG", "MPO")  # many cameras' files are MPO: a JPEG with others behind it


class UnreadableImageError(ValueError):
    """What should be an image isn't one, or is damaged."""


class EncodedImage:
    """
    An image whose header has been read: `size` is (width, height) of the upright image, `content` the file's bytes.

    Args:
        encoded (`dict`): `bytes`, or else a `path`, as in a column of `datasets` that isn't decoded.

    Raises:
        [`UnreadableImageError`]: it has no header of an image; the message names the file.
    """

    def __init__(self, encoded: dict[str, Any]):
        self.name = encoded.get("path") or "(without a file name)"
        with self._named():
            self.content = read_bytes(encoded)
            self._image = PILImage.open(BytesIO(self.content))
            self._orientation = self._image.getexif().get(_ORIENTATION, 1)
        width, height = self._image.size
        self.size = (height, width) if self._orientation in _ON_THE_SIDE else (width, height)

    def decode(self, at_least: tuple[float, float] | None = None) -> PILImage.Image:
        """
        The upright 8-bit RGB image.

        Args:
            at_least (`tuple[float, float]`, *optional*): width and height. A JPEG may then be decoded at a half, a
                quarter or an eighth of its size, but no smaller than this, which is much faster for large photos.

        Raises:
            [`UnreadableImageError`]: it is damaged; the message names the file.
        """
        self._draft(at_least)
        with self._named():
            image = ImageOps.exif_transpose(self._image) if self._orientation != 1 else self._image
            if image.mode.startswith("I"):
                logger.warning_once(
                    "There are 16-bit images among the data. They are scaled to 8 bits here and in the image "
                    "processor, but transformers' pipelines clip them when they open a file: hand those to the "
                    "processor yourself."
                )
            return to_8_bit_rgb(image)

    def levels(self, at_least: tuple[float, float] | None = None) -> np.ndarray:
        """
        What [`~EncodedImage.decode`] gives as an array (height, width, 3) of 8-bit levels, sooner for most JPEGs.

        Args:
            at_least (`tuple[float, float]`, *optional*): as there.

        Raises:
            [`UnreadableImageError`]: it is damaged; the message names the file.
        """
        self._draft(at_least)
        width, height = self._image.size
        plain = self._image.format in _JPEG and self._image.mode in ("RGB", "L") and self._orientation == 1
        if plain and simplejpeg is not None:
            try:
                return simplejpeg.decode_jpeg(self.content, min_height=height, min_width=width)
            except ValueError:
                pass  # It takes no damage at all. What can still be read is for Pillow to say.
        return np.asarray(self.decode())

    def _draft(self, at_least: tuple[float, float] | None) -> None:
        """Lets a JPEG be decoded smaller, and `_image` have that size."""
        if at_least is not None:
            width, height = at_least[::-1] if self._orientation in _ON_THE_SIDE else at_least
            self._image.draft(None, (round(width), round(height)))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
            raise UnreadableImageError(
                f"The image {self.name} can't be read ({error}). Repair or remove it."
            ) from error


def decode_image(encoded: dict[str, Any]) -> PILImage.Image:
    """
    An image as `datasets` stores it (bytes or a path) as an upright 8-bit RGB image.

    Raises:
        [`UnreadableImageError`]: not an image, or a damaged one; the message names the file.
    """
    return EncodedImage(encoded).decode()


def read_bytes(encoded: dict[str, Any]) -> bytes:
    """The bytes of an image's file, which may be anywhere."""
    if encoded.get("bytes") is not None:
        return encoded["bytes"]
    path = encoded["path"]
    if is_local_path(path):
        return Path(path).read_bytes()
    with xopen(path, "rb") as file:
        return file.read()
