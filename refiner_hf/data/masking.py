"""Masks for masked image modelling."""

from typing import Any

import torch
from transformers import default_data_collator

from ..configuration_refiner import RefinerConfig


class MaskPatches:
    """
    A data collator for [`RefinerForMaskedImageModeling`]: hides the same number of patches, others each time, in every
    image of a batch. Labels are left out.

    Args:
        config ([`RefinerConfig`]): gives the patches.
        mask_ratio (`float`, *optional*, defaults to 0.6): share of the patches that are hidden, as in SimMIM.
    """

    def __init__(self, config: RefinerConfig, mask_ratio: float = 0.6):
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}.")
        rows, columns = config.patch_grid
        self.patches, self.masked = rows * columns, round(mask_ratio * rows * columns)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows with `pixel_values` -> `pixel_values` (B, C, height, width) and `bool_masked_pos` (B, P)."""
        pixel_values = default_data_collator([{"pixel_values": row["pixel_values"]} for row in rows])["pixel_values"]
        order = torch.rand(len(rows), self.patches).argsort(dim=1)
        return {"pixel_values": pixel_values, "bool_masked_pos": order < self.masked}
