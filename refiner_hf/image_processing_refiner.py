# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Image processor class for Refiner, torchvision backend: fast and batched."""

import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict

from .image_processing_pil_refiner import RefinerImageProcessorMixin


class RefinerImageProcessor(RefinerImageProcessorMixin, TorchvisionBackend):
    """
    Image processor of Refiner on torchvision. Pixels differ from the reference's by the rounding of torchvision's
    antialiased bicubic resize; [`RefinerImageProcessorPil`] gives them exactly.

    Args:
        size (`dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`): the model's image size.
        crop_pct (`float`, *optional*, defaults to 0.9): share of the resized image's shorter side that the centre
            crop keeps. Published: S 0.9, M 1.0, L 1.13 (above 1: black borders).
    """

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs) -> torch.Tensor:
        """(..., height, width) -> the centre, rounded half to even, with black borders where it is larger."""
        return tvF.center_crop(image, [size.height, size.width])  # transformers' own truncates


__all__ = ["RefinerImageProcessor"]
