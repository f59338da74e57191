# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Pictures to what an exported model takes, with NumPy and Pillow alone. Lies in the exported folder, as a copy:

    from preprocess import Preprocess
    pixel_values = Preprocess()("photo.jpg")

The pixels are, bit for bit, those of the model's image processor in its PIL form. `refiner export` has checked that.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


_MOST_PIXELS, _MARGIN = 2**25, 16  # of a whole picture that is resized; beside a crop that resampling may look at


class Preprocess:
    """
    What `preprocessor_config.json` says, done to a picture.

    Args:
        folder (*optional*): where `preprocessor_config.json` and `config.json` lie. By default this file's own folder.

    Raises:
        `ValueError`: one of the two isn't there or is damaged.
    """

    def __init__(self, folder: str | os.PathLike = Path(__file__).parent):
        self._settings = _read(Path(folder) / "preprocessor_config.json")
        self._mode = "L" if _read(Path(folder) / "config.json").get("num_channels", 3) == 1 else "RGB"
        self._is_refiners = self._settings.get("image_processor_type", "").startswith("RefinerImageProcessor")

    def __call__(self, picture: str | os.PathLike | Image.Image) -> np.ndarray:
        """
        A picture of any mode that PIL reads, 16-bit levels scaled to 8 bits, transparency dropped. One from a file is
        turned upright (EXIF), one of PIL is taken as it is.

        Returns:
            `np.ndarray`: `pixel_values` (1, C, height, width), float32. For a model with C = 1, of the grey picture.

        Raises:
            `ValueError`: the picture can't be read, or the settings ask for what this file can't do.
            `TypeError`: it is neither a path nor a PIL image.
        """
        settings, image = self._settings, _to_8_bit_rgb(_open(picture)).convert(self._mode)
        if settings.get("do_resize"):
            image = self._middle(image)
            image = image.resize(self._resized(*image.size), settings.get("resample", Image.Resampling.BILINEAR))
        if settings.get("do_center_crop"):
            image = self._cropped(image)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        if settings.get("do_rescale"):
            pixels = pixels.astype(np.float64) * settings["rescale_factor"]
        pixels = pixels.astype(np.float32)
        if settings.get("do_normalize"):
            mean, std = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize a picture of this width and height to."""
        size = self._settings["size"]
        if size.keys() == {"shortest_edge"}:
            short, long = size["shortest_edge"], int(size["shortest_edge"] * max(width, height) / min(width, height))
            return (short, long) if width <= height else (long, short)
        if size.keys() != {"height", "width"}:
            raise ValueError(f"preprocess.py can't resize pictures to a size of {', '.join(size)}.")
        if not self._is_refiners:
            return size["width"], size["height"]
        # The aspect ratio is kept: the side that needs the larger factor gets its size, the other is truncated.
        wide, high = (math.floor(size[side] / self._settings["crop_pct"]) for side in ("width", "height"))
        if high * width >= wide * height:
            return max(1, int(high * width / height)), high
        return wide, max(1, int(wide * height / width))

    def _middle(self, image: Image.Image) -> Image.Image:
        """Of an image so long and thin that it would take gigabytes when resized: what is around its middle."""
        resized = self._resized(*image.size)
        if not self._is_refiners or resized[0] * resized[1] <= _MOST_PIXELS:
            return image
        starts, ends = [], []
        for length, long, side in zip(image.size, resized, ("width", "height")):
            kept = math.ceil((self._settings["size"][side] + _MARGIN) * length / long) + _MARGIN
            kept = min(kept + (length - kept) % 2, length)
            starts.append((length - kept) // 2)
            ends.append(starts[-1] + kept)
        return image.crop((*starts, *ends))

    def _cropped(self, image: Image.Image) -> Image.Image:
        """The centre; with black borders, where it is larger than the picture."""
        size = self._settings["size" if self._is_refiners else "crop_size"]
        left, top = self._start(image.width - size["width"]), self._start(image.height - size["height"])
        return image.crop((left, top, left + size["width"], top + size["height"]))

    def _start(self, spare: int) -> int:
        if not self._is_refiners:
            return spare // 2
        return round(spare / 2) if spare >= 0 else -(-spare // 2)  # round: half to even


def _read(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} can't be read ({error}). It must be there as refiner export wrote it.") from error


def _open(picture: str | os.PathLike | Image.Image) -> Image.Image:
    if not isinstance(picture, (str, os.PathLike, Image.Image)):
        raise TypeError(f"A picture must be a path or a PIL image, not {type(picture).__name__}.")
    from_file = not isinstance(picture, Image.Image)
    try:
        if from_file:
            with Image.open(picture) as image:
                return ImageOps.exif_transpose(image)
        picture.load()
        return picture
    except Exception as error:  # PIL's readers have no common error for damaged files
        name = os.fspath(picture) if from_file else getattr(picture, "filename", "") or "(from memory)"
        raise ValueError(f"The picture {name} can't be read ({error}). Is the file complete?") from error


def _to_8_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("A picture of mode F (floating point) has no fixed range: convert it to 8 bits first.")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"A picture of mode {image.mode} is read as 16-bit, but has levels outside 0..65535.")
        image = Image.fromarray((levels // 257).astype(np.uint8))  # 65535 -> 255
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when a transparent palette becomes RGB at once
    return image.convert("RGB")
