# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Image processor class for Refiner, PIL backend: the reference's evaluation pixels, exactly. And what both share."""

import math
import os

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs

from .code_refiner import named_code_beside


_MOST_PIXELS = 2**25  # of a whole image that is resized
_MARGIN = 16  # pixels beside a crop that its resampling may look at


class RefinerImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    crop_pct (`float`, *optional*, defaults to `self.crop_pct`):
        Share of the resized image's shorter side that the centre crop keeps. Above 1 the crop is larger than the
        image and gets black borders.
    """

    crop_pct: float


class RefinerImageProcessorMixin:
    """
    Reading and geometry, the same in both backends: bicubic resize of the shorter side to `floor(size / crop_pct)`,
    centre crop to `size` (which is the model's image size; there is no separate `crop_size`), mean = std = 0.5.

    Images of any mode that PIL reads become RGB; 16-bit ones are scaled to 8 bits; transparency is dropped, as in
    the reference and in transformers' pipelines.
    """

    valid_kwargs = RefinerImageProcessorKwargs

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}
    crop_pct = 0.9
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> list[str] | None:
        """As everywhere in transformers. Code that its configuration names is saved beside it, or isn't named."""
        with named_code_beside(self, save_directory):
            return super().save_pretrained(save_directory, *args, **kwargs)

    def fetch_images(self, image_url_or_urls):
        if isinstance(image_url_or_urls, (str, os.PathLike)) and _is_path(image_url_or_urls):
            return open_image(image_url_or_urls)
        if getattr(image_url_or_urls, "ndim", None) == 2:  # a grey array
            return image_url_or_urls[None]
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs):
        if do_convert_rgb:
            image = to_8_bit_rgb(image)
            if not isinstance(image, Image.Image) and kwargs.get("input_data_format") is None:
                # Older transformers don't know four channels when they infer the layout.
                kwargs["input_data_format"] = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        image = super().process_image(image, do_convert_rgb=False, **kwargs)  # (channels, height, width)
        if do_convert_rgb and image.shape[0] in (1, 4):
            image = image[[0, 0, 0]] if image.shape[0] == 1 else image[:3]
        return image

    def _standardize_kwargs(self, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        kwargs["crop_size"] = kwargs["size"]  # always: `size` is what comes out, `crop_pct` says how
        return kwargs

    def _preprocess(self, images, *, crop_pct: float | None, **kwargs) -> BatchFeature:
        # `resize` is handed `size` alone, so the share that the crop keeps is set aside for it.
        return super()._preprocess(images, **kwargs | {"size": _CroppedSize(kwargs["size"], crop_pct)})

    def resize(self, image, size, resample=None, **kwargs):
        if isinstance(size, _CroppedSize):
            image = size.middle(image)
            target = size.target(*image.shape[-2:])
        else:
            target = size
        return super().resize(image, target, resample=resample, **kwargs)


class _CroppedSize:
    """
    The crop's size, and from it the size to resize to, aspect ratio kept. It travels as the `size` of transformers'
    own preprocessing, which hands `resize` nothing else of ours.
    """

    def __init__(self, size: SizeDict, crop_pct: float | None):
        if not size.height or not size.width:
            raise ValueError(f"size must have 'height' and 'width', those of the model's images; got {size}.")
        if not crop_pct or crop_pct <= 0:
            raise ValueError(f"crop_pct must be positive, got {crop_pct}.")
        self.crop = size.height, size.width
        self.height, self.width = math.floor(size.height / crop_pct), math.floor(size.width / crop_pct)

    def middle(self, image):
        """
        Of an image so long and thin that it would take gigabytes when its shorter side is resized, such as one of
        1 x 60,000 pixels: what is around its middle, where the crop is taken. Any other as it is.
        """
        target = self.target(*image.shape[-2:])
        if target.height * target.width <= _MOST_PIXELS:
            return image
        for axis, resized, crop in ((-2, target.height, self.crop[0]), (-1, target.width, self.crop[1])):
            length = image.shape[axis]
            kept = math.ceil((crop + _MARGIN) * length / resized) + _MARGIN
            kept += (length - kept) % 2  # as much on both sides
            if kept < length:
                start = (length - kept) // 2
                image = image[..., start : start + kept, :] if axis == -2 else image[..., start : start + kept]
        return image

    def target(self, height: int, width: int) -> SizeDict:
        # The side that needs the larger factor gets its size exactly; the other is truncated, as in torchvision.
        if self.height * width >= self.width * height:
            return SizeDict(height=self.height, width=max(1, int(self.height * width / height)))
        return SizeDict(height=max(1, int(self.width * height / width)), width=self.width)


class RefinerImageProcessorPil(RefinerImageProcessorMixin, PilBackend):
    """
    Image processor of Refiner on PIL and NumPy: the reference's evaluation pixels, exactly.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`): the model's image size.
        crop_pct (`float`, *optional*, defaults to 0.9): share of the resized image's shorter side that the centre
            crop keeps. Published: S 0.9, M 1.0, L 1.13 (above 1: black borders).
    """

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """(channels, height, width) -> the centre, rounded half to even, with black borders where it is larger."""
        for axis, wanted in ((1, size.height), (2, size.width)):
            spare = image.shape[axis] - wanted
            if spare < 0:
                borders = [(0, 0)] * 3
                borders[axis] = (-spare // 2, -spare - -spare // 2)
                image = np.pad(image, borders)
            else:
                image = np.take(image, range(round(spare / 2), round(spare / 2) + wanted), axis=axis)
        return image


def open_image(path: str | os.PathLike) -> Image.Image:
    """
    Opens an image file, upright (its EXIF orientation applied) and decoded.

    Raises:
        `ValueError`: the file isn't an image or is damaged; the message names it.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image) if _needs_turning(image) else image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {os.fspath(path)} can't be read ({error}). Is the file complete?") from error


def _is_path(text: str | os.PathLike) -> bool:
    """Whether a string means a file, existing or not, and neither an address nor base64 (which has no dots)."""
    text = os.fspath(text)
    return os.path.exists(text) or ("." in text and not text.startswith(("http://", "https://", "data:")))


def _needs_turning(image: Image.Image) -> bool:
    orientation_tag = 0x0112
    return image.getexif().get(orientation_tag, 1) != 1


def to_8_bit_rgb(image: ImageInput) -> ImageInput:
    """
    A PIL image as RGB, an array's 16-bit levels as 8-bit ones; anything else as it is.

    Raises:
        `ValueError`: the file behind the image is damaged (it is named), or a mode without a fixed range.
    """
    if not isinstance(image, Image.Image):
        is_16_bit = getattr(image, "dtype", None) == np.uint16
        return _to_8_bit(image) if is_16_bit else image
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        name = getattr(image, "filename", "") or "(from memory)"
        raise ValueError(f"The image {name} can't be read ({error}). Is the file complete?") from error
    if image.mode == "F":
        raise ValueError("An image of mode F (floating point) has no fixed range: convert it to 8 bits first.")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"An image of mode {image.mode} is read as 16-bit, but has levels outside 0..65535.")
        return Image.fromarray(_to_8_bit(levels)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when a transparent palette becomes RGB at once
    return image.convert("RGB")


def _to_8_bit(levels: np.ndarray) -> np.ndarray:
    return (levels // 257).astype(np.uint8)  # 65535 -> 255


__all__ = ["RefinerImageProcessorPil"]
