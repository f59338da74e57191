"""What happens to a training image: a random crop, flip and rotation, then timm's augmentations."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image as PILImage
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Pad, RandomRotation
from transformers.image_processing_utils import BaseImageProcessor

from .arguments import AugmentationArguments
from .images import EncodedImage


_RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
_INTERPOLATIONS = ("bilinear", "bicubic")  # drawn for each image, as in the reference


@dataclass
class View:
    """
    What a training image became: `levels` (height, width, channels), of 8 bits; the `box` of the image that they
    show, as (left, top, right, bottom) in shares of its width and height; whether they are `flipped` left to right.
    """

    levels: torch.Tensor
    box: tuple[float, float, float, float]
    flipped: bool


class Augment:
    """
    Images to random [`View`]s of them at a processor's size. Processes that load images do this;
    [`NormalizeViews`] does the rest where the step runs: bytes are a quarter of what numbers are, to copy and to send.

    Args:
        processor (`BaseImageProcessor`): gives the size.
        augmentation ([`AugmentationArguments`]): what is done.

    Raises:
        `ValueError`: timm doesn't know `augmentation.auto_augment`.
    """

    def __init__(self, processor: BaseImageProcessor, augmentation: AugmentationArguments):
        self.size = output_size(processor)
        self.scale = (augmentation.crop_min_scale, 1.0)
        self.flip = augmentation.horizontal_flip
        self.rotate = _rotation(augmentation.rotation, *self.size) if augmentation.rotation else None
        self.augment = _timm_augmentation(processor, augmentation)

    def __call__(self, image: EncodedImage) -> View:
        # timm asks for nothing but the size, and this has nothing else.
        shape = torch.empty(image.size[::-1], device="meta")
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(shape, self.scale, _RATIO)
        box = (left, top, left + max(width, 1), top + max(height, 1))
        levels = _cut(image, box, self.size, random.choice(_INTERPOLATIONS))
        flipped = self.flip and random.random() < 0.5
        if flipped:
            levels = levels.flip(1)
        view = PILImage.fromarray(levels.numpy())
        if self.rotate is not None:
            view = self.rotate(view)
        shares = tuple(at / whole for at, whole in zip(box, image.size * 2))
        return View(torch.from_numpy(np.array(self.augment(view))), shares, flipped)


class NormalizeViews:
    """
    A batch of views to what a model takes: normalised as a processor does, with a random box of some of them erased.

    Args:
        processor (`BaseImageProcessor`): gives mean and standard deviation.
        erasing (`float`, *optional*, defaults to 0.0): share of the views in which a box becomes noise.
    """

    def __init__(self, processor: BaseImageProcessor, erasing: float = 0.0):
        self.mean = torch.tensor(processor.image_mean)[:, None, None]
        self.std = torch.tensor(processor.image_std)[:, None, None]
        self.erasing = erasing

    def __call__(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels (B, height, width, C) of 8 bits to `pixel_values` (B, C, height, width), on the same device."""
        # They stay on the device: sending them each time would wait for all that the device has yet to do.
        self.mean, self.std = self.mean.to(levels.device), self.std.to(levels.device)
        pixels = levels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        pixels.div_(255).sub_(self.mean).div_(self.std)
        if self.erasing:
            RandomErasing(self.erasing, mode="pixel", device=pixels.device)(pixels)
        return pixels


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that come out of an image processor, ours or one of transformers'."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    return size["height"], size["width"]


def _cut(
    image: EncodedImage, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """
    What is in the box, as levels (height, width, channels) of a size (height, width). Large JPEGs are decoded smaller,
    with twice what is needed left in the box. torch resizes bytes with Pillow's filters, to within one level and in a
    fifth of the time.
    """
    left, top, right, bottom = box
    needed = 2 * size[1] / (right - left), 2 * size[0] / (bottom - top)
    decoded = image.levels((image.size[0] * needed[0], image.size[1] * needed[1]))
    across, down = decoded.shape[1] / image.size[0], decoded.shape[0] / image.size[1]
    rows, columns = slice(round(top * down), round(bottom * down)), slice(round(left * across), round(right * across))
    part = torch.from_numpy(decoded[None, rows, columns].copy()).permute(0, 3, 1, 2)  # channels last: the fast kind
    return nn.functional.interpolate(part, size, mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def _rotation(degrees: float, height: int, width: int) -> Callable[[PILImage.Image], PILImage.Image]:
    """Rotates at random; the corners get the colours of the nearest edge."""
    # However it is turned, the image reaches no further from its middle than half of its diagonal.
    margin = math.ceil((math.hypot(height, width) - min(height, width)) / 2)
    turn = RandomRotation(degrees, InterpolationMode.BICUBIC)
    return Compose([Pad(margin, padding_mode="edge"), turn, CenterCrop((height, width))])


def _timm_augmentation(processor: BaseImageProcessor, augmentation: AugmentationArguments) -> Compose:
    """What timm does to an image after crop and flip."""
    try:
        _, augment, _ = create_transform(
            input_size=(3, *output_size(processor)),
            is_training=True,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            interpolation="random",
            mean=processor.image_mean,  # the colour of corners that a rotation leaves empty
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"timm doesn't know the augmentation --auto_augment {augmentation.auto_augment}.") from error
    for operation in _operations(augment):
        if "Posterize" in operation.name:
            operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return augment


def _operations(augment: Compose) -> Iterator[AugmentOp]:
    """The single operations of a policy, whichever of timm's it is."""
    for policy in augment.transforms:
        for each in getattr(policy, "ops", None) or getattr(policy, "policy", None) or ():
            yield from each if isinstance(each, list) else [each]


def _at_least_one_bit(level_to_bits: Callable, level: float, hparams: dict) -> tuple[int]:
    """At the highest levels timm keeps 0 bits of an image, which is black, and which Pillow 13 refuses."""
    (bits,) = level_to_bits(level, hparams)
    return (max(bits, 1),)
