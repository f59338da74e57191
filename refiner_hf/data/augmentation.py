"""What happens to a training image: a random crop, flip and rotation, then timm's augmentations."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image as PILImage
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Pad, RandomRotation
from transformers.image_processing_utils import BaseImageProcessor

from .arguments import AugmentationArguments
from .images import EncodedImage


_RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height


@dataclass
class View:
    """
    What a training image became: `pixels` (channels, height, width); the `box` of the image that they show, as (left,
    top, right, bottom) in shares of its width and height; whether they are `flipped` left to right.
    """

    pixels: torch.Tensor
    box: tuple[float, float, float, float]
    flipped: bool


class Augment:
    """
    Images to random [`View`]s of them at a processor's size and normalisation.

    Args:
        processor (`BaseImageProcessor`): gives size, mean and standard deviation.
        augmentation ([`AugmentationArguments`]): what is done.

    Raises:
        `ValueError`: timm doesn't know `augmentation.auto_augment`.
    """

    def __init__(self, processor: BaseImageProcessor, augmentation: AugmentationArguments):
        height, width = output_size(processor)
        self.size = (width, height)
        self.scale = (augmentation.crop_min_scale, 1.0)
        self.flip = augmentation.horizontal_flip
        self.rotate = _rotation(augmentation.rotation, height, width) if augmentation.rotation else None
        self.augment, self.normalize = _timm_transforms(processor, augmentation)

    def __call__(self, image: EncodedImage) -> View:
        # timm asks for nothing but the size, and this has nothing else.
        shape = torch.empty(image.size[::-1], device="meta")
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(shape, self.scale, _RATIO)
        box = (left, top, left + max(width, 1), top + max(height, 1))
        view = _cut(image, box, self.size)
        flipped = self.flip and random.random() < 0.5
        if flipped:
            view = view.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        if self.rotate is not None:
            view = self.rotate(view)
        shares = tuple(at / whole for at, whole in zip(box, image.size * 2))
        return View(self.normalize(self.augment(view)), shares, flipped)


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that come out of an image processor, ours or one of transformers'."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    return size["height"], size["width"]


def _cut(image: EncodedImage, box: tuple[int, int, int, int], size: tuple[int, int]) -> PILImage.Image:
    """What is in the box, at `size`. Large JPEGs are decoded smaller, with twice what is needed left in the box."""
    left, top, right, bottom = box
    needed = 2 * size[0] / (right - left), 2 * size[1] / (bottom - top)
    decoded = image.decode((image.size[0] * needed[0], image.size[1] * needed[1]))
    if decoded.size != image.size:
        across, down = decoded.size[0] / image.size[0], decoded.size[1] / image.size[1]
        box = (round(left * across), round(top * down), round(right * across), round(bottom * down))
    return decoded.crop(box).resize(size, PILImage.Resampling.BICUBIC)


def _rotation(degrees: float, height: int, width: int) -> Callable[[PILImage.Image], PILImage.Image]:
    """Rotates at random; the corners get the colours of the nearest edge."""
    # However it is turned, the image reaches no further from its middle than half of its diagonal.
    margin = math.ceil((math.hypot(height, width) - min(height, width)) / 2)
    turn = RandomRotation(degrees, InterpolationMode.BICUBIC)
    return Compose([Pad(margin, padding_mode="edge"), turn, CenterCrop((height, width))])


def _timm_transforms(
    processor: BaseImageProcessor, augmentation: AugmentationArguments
) -> tuple[Callable[[PILImage.Image], PILImage.Image], Callable[[PILImage.Image], torch.Tensor]]:
    """What timm does after crop and flip: to the image, and on the way to a tensor."""
    try:
        _, augment, normalize = create_transform(
            input_size=(3, *output_size(processor)),
            is_training=True,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            interpolation="bicubic",
            mean=processor.image_mean,
            std=processor.image_std,
            re_prob=augmentation.random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"timm doesn't know the augmentation --auto_augment {augmentation.auto_augment}.") from error
    for operation in _operations(augment):
        if "Posterize" in operation.name:
            operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return augment, normalize


def _operations(augment: Compose) -> Iterator[AugmentOp]:
    """The single operations of a policy, whichever of timm's it is."""
    for policy in augment.transforms:
        for each in getattr(policy, "ops", None) or getattr(policy, "policy", None) or ():
            yield from each if isinstance(each, list) else [each]


def _at_least_one_bit(level_to_bits: Callable, level: float, hparams: dict) -> tuple[int]:
    """At the highest levels timm keeps 0 bits of an image, which is black, and which Pillow 13 refuses."""
    (bits,) = level_to_bits(level, hparams)
    return (max(bits, 1),)
