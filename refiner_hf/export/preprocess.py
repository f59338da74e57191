"""
Pictures to what the exported network takes, with NumPy and Pillow alone. `refiner-export` writes this file beside the
graph; it reads preprocessor_config.json and config.json, which lie there too:

    from preprocess import pixel_values
    session.run(["logits"], {"pixel_values": pixel_values("photo.jpg")})

It gives, to the last bit, what the model's image processor gives on its PIL backend.
"""

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def pixel_values(picture: str | os.PathLike | Image.Image, folder: str | os.PathLike | None = None) -> np.ndarray:
    """
    Args:
        picture: a file, or an image that is open already; of any mode and size.
        folder (*optional*): of the configurations. Default: where this file lies.

    Returns:
        `np.ndarray` of shape (1, channels, height, width), float32.

    Raises:
        `ValueError`: the picture can't be read.
    """
    settings = settings_in(str(folder or Path(__file__).parent))
    mode = "L" if settings["num_channels"] == 1 else "RGB"
    image = _eight_bits(_opened(picture)).convert(mode)
    if settings["do_resize"]:
        height, width = _resized(image.height, image.width, settings)
        image = image.resize((width, height), settings["resample"])
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if settings["do_center_crop"]:
        pixels = _cropped(pixels, settings)
    if settings["do_rescale"]:
        pixels = (pixels.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    pixels = pixels.astype(np.float32)
    if settings["do_normalize"]:
        mean, std = (np.array(settings[name], np.float32).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
    return np.ascontiguousarray(pixels[None])


@cache
def settings_in(folder: str) -> dict[str, Any]:
    """What the configurations in a folder say of preparing pictures."""
    read = {}
    for name in ("config.json", "preprocessor_config.json"):
        read[name] = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    settings = {"do_center_crop": False, "rescale_factor": 1 / 255, **read["preprocessor_config.json"]}
    return settings | {"num_channels": read["config.json"].get("num_channels", 3)}


def _opened(picture: str | os.PathLike | Image.Image) -> Image.Image:
    """Upright, and read to its end."""
    if isinstance(picture, Image.Image):
        return picture
    try:
        with Image.open(picture) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The picture {os.fspath(picture)} can't be read: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("A picture of mode F (floating point) has no fixed range: convert it to 8 bits first.")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"A picture of mode {image.mode} is read as 16-bit, but has levels outside 0..65535.")
        return Image.fromarray((levels // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


def _resized(height: int, width: int, settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width to resize to."""
    size, crop_pct = settings["size"], settings.get("crop_pct")
    if crop_pct is None:
        return size["height"], size["width"]
    # A Refiner's: the side that needs the larger factor gets its size exactly, the other keeps the shape.
    wanted_height, wanted_width = (math.floor(size[side] / crop_pct) for side in ("height", "width"))
    if wanted_height * width >= wanted_width * height:
        return wanted_height, max(1, int(wanted_height * width / height))
    return max(1, int(wanted_width * height / width)), wanted_width


def _cropped(pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """(channels, height, width) -> the centre, with black borders where it is larger."""
    is_refiners = settings.get("crop_pct") is not None
    size = settings["size"] if is_refiners else settings["crop_size"]
    for axis, wanted in ((1, size["height"]), (2, size["width"])):
        spare = pixels.shape[axis] - wanted
        if spare < 0:
            borders = [(0, 0)] * 3
            # What doesn't divide by two: a Refiner's has the larger border behind, transformers' own before.
            before = -spare // 2 if is_refiners else -(spare // 2)
            borders[axis] = (before, -spare - before)
            pixels = np.pad(pixels, borders)
        else:
            start = round(spare / 2) if is_refiners else spare // 2
            pixels = np.take(pixels, range(start, start + wanted), axis=axis)
    return pixels
