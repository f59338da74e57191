# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Token mixing (MixToken): in training, a box of the patch grid is swapped between the images of a batch.

The partner of image i is image B - 1 - i: the batch in reverse order. Shapes: B batch, P = height * width patches,
D width, K labels.
"""

import torch


def sample_mixing_mask(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """
    Draws the box to swap: its share of the grid is 1 - lam with lam uniform in [0, 1], its centre anywhere; what
    sticks out of the grid is cut off. Tensor arithmetic only, so that it compiles and never waits for the device.

    Args:
        grid (`tuple[int, int]`): patches down and across.
        device (`torch.device`): where to draw.

    Returns:
        `torch.BoolTensor` of shape (height, width): `True` inside the box.
    """
    area, *centre = torch.rand(3, device=device)
    inside = []
    for length, position in zip(grid, centre):
        half_side = torch.floor(torch.floor(length * torch.sqrt(1 - area)) / 2)
        middle = torch.floor(length * position)
        index = torch.arange(length, device=device)
        inside.append((index >= middle - half_side) & (index < middle + half_side))
    return inside[0][:, None] & inside[1][None, :]


def mix_tokens(patches: torch.Tensor, mixing_mask: torch.Tensor) -> torch.Tensor:
    """
    Swaps the patches inside the box with the partner's. Done twice, it gives the patches back.

    Args:
        patches (`torch.Tensor` of shape (B, P, D)): patches row by row.
        mixing_mask (`torch.BoolTensor` of shape (height, width)).

    Returns:
        `torch.Tensor` of shape (B, P, D).
    """
    return torch.where(mixing_mask.flatten()[:, None], patches.flip(0), patches)


def mix_targets(targets: torch.Tensor, mixing_mask: torch.Tensor) -> torch.Tensor:
    """
    The images' targets after mixing: each its own and its partner's, by their share of the grid.

    Args:
        targets (`torch.Tensor` of shape (B, K)).
        mixing_mask (`torch.BoolTensor` of shape (height, width)).

    Returns:
        `torch.Tensor` of shape (B, K).
    """
    lam = 1 - mixing_mask.to(targets.dtype).mean()
    return lam * targets + (1 - lam) * targets.flip(0)
