# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Images to tokens: the convolutional stem, the cut into patches, class and other tokens, positions.

Shapes as in modeling_refiner.py.
"""

import math
from typing import Any

import torch
from torch import nn

from .configuration_refiner import RefinerConfig
from .folding_refiner import can_bypass, fold_convolution, has_hooks, is_plain, is_transformed, is_untouched
from .inference_refiner import linear, only_infers
from .normalization_refiner import RefinerBatchNorm2d
from .stem_inference_refiner import cut_into_patches, embed_patches
from .token_mixing_refiner import mix_tokens


class RefinerConvStem(nn.Module):
    """Three convolutions that halve the image before it is cut into patches."""

    def __init__(self, config: RefinerConfig):
        super().__init__()

        def norm(channels: int) -> RefinerBatchNorm2d:
            return RefinerBatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)

        self.convolution1 = nn.Conv2d(config.num_channels, 32, 7, stride=2, padding=3, bias=False)
        self.convolution1_norm = norm(32)
        self.convolution2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.convolution2_norm = norm(64)
        self.convolution3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.convolution3_norm = norm(128)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> (B, 128, height / 2, width / 2)."""
        hidden_states = pixel_values
        inference = only_infers(pixel_values)
        for convolution, norm in self.steps:
            if inference and can_fold(convolution, norm):
                weight, bias = fold_convolution(convolution, norm)
                hidden_states = nn.functional.conv2d(
                    hidden_states, weight, bias, stride=convolution.stride, padding=convolution.padding
                ).relu_()
            else:
                hidden_states = nn.functional.relu(norm(convolution(hidden_states)))
        return hidden_states

    @property
    def steps(self) -> list[tuple[nn.Conv2d, RefinerBatchNorm2d]]:
        """The convolutions, each with the norm after it."""
        names = ("convolution1", "convolution2", "convolution3")
        return [(getattr(self, name), getattr(self, f"{name}_norm")) for name in names]


def can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether the two are, in evaluation, one usual convolution, and nobody looks at what is between them."""
    return (
        can_bypass(convolution, norm)
        and not norm.training
        and (convolution.padding_mode, convolution.dilation, convolution.groups) == ("zeros", (1, 1), 1)
    )


def keeps_borders(convolution: nn.Conv2d) -> bool:
    """Whether a convolution loses nothing at the borders, and steps as far down as to the right."""
    rows, columns = convolution.stride
    return rows == columns and convolution.padding == tuple(side // 2 for side in convolution.kernel_size)


class RefinerPatchEmbeddings(nn.Module):
    """Images to patches, row by row."""

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_height_width
        if config.use_conv_stem:
            self.stem = RefinerConvStem(config)
            channels, kernel = 128, tuple(side // 2 for side in self.patch_size)
        else:
            self.stem = None
            channels, kernel = config.num_channels, self.patch_size
        self.projection = nn.Conv2d(channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> (B, P, D)."""
        on_cpu = pixel_values.device.type == "cpu" and not is_transformed(pixel_values)
        as_product = on_cpu and is_untouched(self.projection)
        if self.stem is not None:
            if as_product and self._is_one_operation(pixel_values):
                return self._embed_in_one(pixel_values)
            pixel_values = self.stem(pixel_values)
        if as_product:  # faster on CPUs, mostly backward and with a single image
            patches = cut_into_patches(pixel_values, *self.projection.kernel_size)
            return linear(patches, self.projection.weight.flatten(1), self.projection.bias)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)

    def _is_one_operation(self, pixel_values: torch.Tensor) -> bool:
        """Whether stem and projection, on a CPU, may be one operation."""
        return (
            only_infers(pixel_values)
            and not torch.is_autocast_enabled("cpu")
            and not has_hooks(self.stem)
            and all(can_fold(*step) and keeps_borders(step[0]) for step in self.stem.steps)
            and all(is_plain(weight) for weight in self.parameters())
        )

    def _embed_in_one(self, pixel_values: torch.Tensor) -> torch.Tensor:
        weights, biases = zip(*(fold_convolution(*step) for step in self.stem.steps))
        strides = [convolution.stride[0] for convolution, _ in self.stem.steps]
        projection = self.projection
        return embed_patches(pixel_values, [*weights, projection.weight], [*biases, projection.bias], strides)


class RefinerEmbeddings(nn.Module):
    """Patches with the class token, and perhaps a distillation token, before them and positions added."""

    def __init__(self, config: RefinerConfig, use_mask_token: bool = False):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = self.mask_token = None
        if config.use_distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if use_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = RefinerPatchEmbeddings(config)
        tokens = config.num_prefix_tokens + math.prod(config.patch_grid)
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def resized_positions(self, grid: tuple[int, int], **mode: Any) -> torch.Tensor:
        """The position embeddings for another grid of patches, (1, T + P, D); `mode` goes to `interpolate`."""
        prefix = self.config.num_prefix_tokens
        positions = self.position_embeddings.float()
        patches = (
            positions[:, prefix:].unflatten(1, self.config.patch_grid).permute(0, 3, 1, 2)
        )  # (1, D, rows, columns)
        patches = nn.functional.interpolate(patches, size=grid, **mode).flatten(2).transpose(1, 2)
        return torch.cat((positions[:, :prefix], patches), dim=1).to(self.position_embeddings.dtype)

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        mixing_mask: torch.BoolTensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
    ) -> torch.Tensor:
        """(B, C, height, width) -> (B, N, D)."""
        grid = self._check(pixel_values, interpolate_pos_encoding)
        if bool_masked_pos is not None:
            masked = self._masked_patches(bool_masked_pos, pixel_values.shape[0], grid)
            # The stem's convolutions look across the borders of patches, so the pixels are hidden from it as well.
            pixel_values = pixel_values.masked_fill(patches_to_pixels(masked, self.config.patch_height_width), 0)
        patches = self.patch_embeddings(pixel_values)
        if bool_masked_pos is not None:
            patches = torch.where(masked.flatten(1).unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        if mixing_mask is not None:
            patches = mix_tokens(patches, mixing_mask)
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        embeddings = torch.cat([token.expand(patches.shape[0], -1, -1) for token in prefix] + [patches], dim=1)
        # A record is made for one size and must do for others.
        if (interpolate_pos_encoding and is_transformed(pixel_values)) or grid != self.config.patch_grid:
            return self.dropout(embeddings + self.resized_positions(grid, mode="bilinear", align_corners=True))
        return self.dropout(embeddings + self.position_embeddings)

    def _masked_patches(self, bool_masked_pos: torch.Tensor, batch: int, grid: tuple[int, int]) -> torch.BoolTensor:
        """(B, P) or (B, rows, columns) -> (B, rows, columns)."""
        if self.mask_token is None:
            raise ValueError("This model has no mask token: make it with use_mask_token=True to use bool_masked_pos.")
        if not isinstance(bool_masked_pos, torch.Tensor) or bool_masked_pos.is_floating_point():
            raise ValueError(
                "bool_masked_pos must be a tensor of booleans, got "
                f"{getattr(bool_masked_pos, 'dtype', type(bool_masked_pos).__name__)}."
            )
        if bool_masked_pos.shape not in ((batch, math.prod(grid)), (batch, *grid)):
            raise ValueError(
                f"bool_masked_pos must have shape {(batch, math.prod(grid))} or {(batch, *grid)}, one value for each "
                f"patch of each image, got {tuple(bool_masked_pos.shape)}."
            )
        return bool_masked_pos.bool().view(batch, *grid)

    def _check(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None) -> tuple[int, int]:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must have shape (batch, channels, height, width), got {tuple(pixel_values.shape)}."
            )
        channels, height, width = pixel_values.shape[1:]
        if channels != self.config.num_channels:
            raise ValueError(
                f"The images have {channels} channels, the model takes {self.config.num_channels} "
                "(config.num_channels)."
            )
        patch_height, patch_width = self.config.patch_height_width
        if interpolate_pos_encoding:
            if height % patch_height or width % patch_width or min(height, width) == 0:
                raise ValueError(
                    f"Images of {height}x{width} pixels can't be cut into patches of {patch_height}x{patch_width}: "
                    "height and width must be multiples of the patch's."
                )
        elif (height, width) != self.config.image_height_width:
            expected = "x".join(map(str, self.config.image_height_width))
            raise ValueError(
                f"The images are {height}x{width} pixels (height x width), the model takes {expected}. Let the image "
                "processor resize them, load the model with from_pretrained(..., image_size=...), or pass "
                "interpolate_pos_encoding=True."
            )
        return height // patch_height, width // patch_width


def patches_to_pixels(mask: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """A mask of patches (B, rows, columns) as one of pixels, (B, 1, height, width)."""
    return mask.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2).unsqueeze(1)
