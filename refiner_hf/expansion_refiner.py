# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Attention expansion, distributed local attention and attention reduction (section 3 of the paper).

Shapes: B batch, H heads, E = H * expansion ratio, N tokens, k the side of the kernel.
"""

import torch
from torch import nn

from .attention_refiner import RefinerMapRefinement, WeightsPanel, batch_norm
from .configuration_refiner import RefinerConfig


class RefinerExpansion(RefinerMapRefinement):
    """
    Attention expansion (1x1, H -> E) and attention reduction (1x1, E -> H), each followed by a batch norm; the map
    itself is added. With an expansion ratio of 1 nothing is expanded.
    """

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        return f"expansion, expansion ratio {config.expansion_ratio}"

    def build(self, config: RefinerConfig) -> None:
        heads, expanded = config.num_attention_heads, config.num_attention_heads * config.expansion_ratio
        self.expansion: nn.Conv2d | None = None
        self.local_attention: nn.Conv2d | None = None
        if config.expansion_ratio > 1:
            self.expansion = nn.Conv2d(heads, expanded, 1, bias=False)
            self.expansion_norm = batch_norm(config, expanded)
        self.build_local_attention(config, expanded)
        self.build_reduction(config, expanded)

    def build_local_attention(self, config: RefinerConfig, expanded: int) -> None:
        """Makes what comes between expansion and reduction: here nothing."""

    def build_reduction(self, config: RefinerConfig, expanded: int) -> None:
        """Makes the reduction and its norm, `reduction_norm`."""
        self.reduction = nn.Conv2d(expanded, config.num_attention_heads, 1, bias=False)
        self.reduction_norm = batch_norm(config, config.num_attention_heads)

    def refine(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.reduction_norm(self.reduction(self.expanded_maps(attention_map, mask)), mask) + attention_map

    def expanded_maps(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The maps before attention reduction, (B, H, N, N) -> (B, E, N, N)."""
        hidden = attention_map
        if self.expansion is not None:
            hidden = nn.functional.relu6(self.expansion_norm(self.expansion(hidden), mask))
        if self.local_attention is not None:
            if mask is not None:  # the norm's bias isn't zero at padding
                hidden = hidden.masked_fill(~mask, 0)
            hidden = nn.functional.relu6(self.local_attention_norm(self.local_attention(hidden), mask))
        return hidden

    def start_as_identity(self) -> None:
        # The branch beside the map adds nothing, and its norm's weight is learned first.
        nn.init.zeros_(self.reduction_norm.weight)
        nn.init.zeros_(self.reduction_norm.bias)

    def middle_maps(self, attention_map: torch.Tensor) -> tuple[str, torch.Tensor]:
        return "after attention expansion", self.expanded_maps(attention_map)

    def weights_panels(self) -> list[WeightsPanel]:
        panels = []
        if self.expansion is not None:
            panels.append(
                WeightsPanel("attention expansion", self.expansion.weight[:, :, 0, 0], "head", "expanded head")
            )
        return [*panels, *self.reduction_panels()]

    def reduction_panels(self) -> list[WeightsPanel]:
        """Those of the weights that [`build_reduction`] made."""
        reduction = self.reduction.weight[:, :, 0, 0].T
        return [WeightsPanel("attention reduction", reduction, "head", "expanded head")]

    @property
    def expanded_heads(self) -> int:
        return self.config.num_attention_heads * self.config.expansion_ratio

    def why_not_fast(self, masked: bool) -> str | None:
        return None


class RefinerExpansionConvolution(RefinerExpansion):
    """
    The paper's refinement: [`RefinerExpansion`] with distributed local attention (k x k, depthwise over the expanded
    maps, with a batch norm) between expansion and reduction.
    """

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        kernel = config.refinement_kernel_size
        return f"expansion convolution, expansion ratio {config.expansion_ratio}, kernel {kernel} x {kernel}"

    def build_local_attention(self, config: RefinerConfig, expanded: int) -> None:
        kernel = config.refinement_kernel_size
        self.local_attention = nn.Conv2d(expanded, expanded, kernel, padding=kernel // 2, groups=expanded, bias=False)
        self.local_attention_norm = batch_norm(config, expanded)

    def middle_maps(self, attention_map: torch.Tensor) -> tuple[str, torch.Tensor]:
        return "after distributed local attention", self.expanded_maps(attention_map)

    def weights_panels(self) -> list[WeightsPanel]:
        heads = self.config.num_attention_heads
        assert self.local_attention is not None
        kernels = self.local_attention.weight[:, 0].unflatten(0, (-1, heads))  # (E / H, H, k, k)
        return [WeightsPanel("distributed local attention, by expanded head", kernels), *super().weights_panels()]
