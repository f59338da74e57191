# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement of attention maps (section 3 of the paper): module, functional form, choice of implementation.

Shapes: B batch, H heads, E = H * expansion ratio, N tokens. Maps are (B, H, N, N).
"""

from collections.abc import Callable

import torch
from torch import nn

from .configuration_refiner import RefinerConfig
from .normalization_refiner import RefinerBatchNorm2d


class RefinerMapRefinement(nn.Module):
    """
    Refines attention maps: attention expansion (1x1, H -> E), distributed local attention (k x k, depthwise) and
    attention reduction (1x1, E -> H), each followed by a batch norm, plus the map itself; then one more batch norm.

    `refinement="expansion"` leaves the distributed local attention out; `"convolution"` is one full k x k convolution
    instead of it all, without norm or identity.

    Args:
        config ([`RefinerConfig`]): gives the heads, the kind of refinement and its sizes.
        refine_implementation (`str`): one of [`REFINE_IMPLEMENTATIONS`], or `"auto"`.
    """

    def __init__(self, config: RefinerConfig, refine_implementation: str = "auto"):
        super().__init__()
        heads, kernel = config.num_attention_heads, config.refinement_kernel_size
        expanded = heads * config.expansion_ratio

        def norm(channels: int) -> RefinerBatchNorm2d:
            return RefinerBatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)

        self.expansion = self.local_attention = self.reduction = self.convolution = None
        if config.refinement == "convolution":
            self.convolution = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, bias=False)
        else:
            if config.expansion_ratio > 1:
                self.expansion = nn.Conv2d(heads, expanded, 1, bias=False)
                self.expansion_norm = norm(expanded)
            if config.refinement == "expansion_convolution":
                self.local_attention = nn.Conv2d(
                    expanded, expanded, kernel, padding=kernel // 2, groups=expanded, bias=False
                )
                self.local_attention_norm = norm(expanded)
            self.reduction = nn.Conv2d(expanded, heads, 1, bias=False)
            self.reduction_norm = norm(heads)
        self.output_norm = norm(heads)
        self.refine_implementation = check_refine_implementation(refine_implementation)

    def forward(self, attention_map: torch.Tensor) -> torch.Tensor:
        """(B, H, N, N) -> (B, H, N, N)."""
        return _resolve(self.refine_implementation)(self, attention_map)


def distributed_local_attention(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> torch.Tensor:
    """
    The refinement without its output norm: the naive reference that every implementation must equal.

    Args:
        refinement: the module that holds weights and norms.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).

    Returns:
        `torch.Tensor` of shape (B, H, N, N).
    """
    if refinement.convolution is not None:
        return refinement.convolution(attention_map)
    hidden = attention_map
    if refinement.expansion is not None:
        hidden = nn.functional.relu6(refinement.expansion_norm(refinement.expansion(hidden)))  # (B, E, N, N)
    if refinement.local_attention is not None:
        hidden = nn.functional.relu6(refinement.local_attention_norm(refinement.local_attention(hidden)))
    return refinement.reduction_norm(refinement.reduction(hidden)) + attention_map


def eager_refine(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> torch.Tensor:
    """The refinement, module by module. Runs everywhere and keeps every intermediate for backward."""
    return refinement.output_norm(distributed_local_attention(refinement, attention_map))


REFINE_IMPLEMENTATIONS: dict[str, Callable[[RefinerMapRefinement, torch.Tensor], torch.Tensor]] = {
    "eager": eager_refine,
}


def check_refine_implementation(name: str) -> str:
    """Returns `name`; raises a `ValueError` that lists the choices where it is none of them."""
    if name != "auto" and name not in REFINE_IMPLEMENTATIONS:
        choices = ", ".join(map(repr, ["auto", *REFINE_IMPLEMENTATIONS]))
        raise ValueError(f"refine_implementation is {name!r}; choose among {choices}.")
    return name


def _resolve(name: str) -> Callable[[RefinerMapRefinement, torch.Tensor], torch.Tensor]:
    return REFINE_IMPLEMENTATIONS["eager" if name == "auto" else name]
