# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement of attention maps (section 3 of the paper): module, functional form, choice of implementation.

Shapes: B batch, H heads, E = H * expansion ratio, N tokens. Maps are (B, H, N, N).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .blocked_refiner import blocked_refine
from .configuration_refiner import RefinerConfig
from .exact_refiner import why_not_exact
from .folding_refiner import can_bypass, is_transformed, needs_exact
from .normalization_refiner import RefinerBatchNorm2d
from .triton_refiner import triton_refine, why_not_triton


logger = logging.get_logger(__name__)


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

    def forward(self, attention_map: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """(B, H, N, N) -> (B, H, N, N), times `scale`."""
        name = pick_implementation(self, attention_map)
        return REFINE_IMPLEMENTATIONS[name].refine(self, attention_map, scale)


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
    expanded = expanded_maps(refinement, attention_map)
    return refinement.reduction_norm(refinement.reduction(expanded)) + attention_map


def expanded_maps(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> torch.Tensor:
    """
    The maps in the middle of a refinement: expanded to more heads and convolved locally, as far as it does either.

    Args:
        refinement: a module that isn't `"convolution"`.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).

    Returns:
        `torch.Tensor` of shape (B, E, N, N).
    """
    hidden = attention_map
    if refinement.expansion is not None:
        hidden = nn.functional.relu6(refinement.expansion_norm(refinement.expansion(hidden)))
    if refinement.local_attention is not None:
        hidden = nn.functional.relu6(refinement.local_attention_norm(refinement.local_attention(hidden)))
    return hidden


def eager_refine(refinement: RefinerMapRefinement, attention_map: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The refinement, module by module. Runs everywhere and keeps every intermediate for backward."""
    refined = refinement.output_norm(distributed_local_attention(refinement, attention_map))
    return refined if scale == 1 else refined * scale


def _why_not_blocked(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> str | None:
    if refinement.convolution is not None:
        return "one full convolution has nothing to fold or to expand"
    if not can_bypass(*refinement.children()):
        return "its modules have hooks or adapters, which only calling them runs"
    if is_transformed(attention_map):
        return "what happens to the maps is recorded or transformed, which takes plain operations"
    if attention_map[:, 0].numel() < 2:
        return "there is nothing, or a single value, to refine"
    return why_not_exact(refinement) if needs_exact(refinement, attention_map) else None


def _why_not_kernels(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> str | None:
    return _why_not_blocked(refinement, attention_map) or why_not_triton(refinement, attention_map)


class RefineImplementation(NamedTuple):
    """
    A way to compute the refinement: `refine(refinement, map, scale)`, and what stands against it for a refinement and
    its map, in words (`None`: nothing).
    """

    refine: Callable[[RefinerMapRefinement, torch.Tensor, float], torch.Tensor]
    why_not: Callable[[RefinerMapRefinement, torch.Tensor], str | None]


REFINE_IMPLEMENTATIONS: dict[str, RefineImplementation] = {
    "eager": RefineImplementation(eager_refine, lambda refinement, attention_map: None),
    "blocked": RefineImplementation(blocked_refine, _why_not_blocked),
    "triton": RefineImplementation(triton_refine, _why_not_kernels),
}


# By device, bytes of a layer's expanded maps from which training is faster without keeping them (the curves in
# docs/benchmarks/ show it): below, many small operations cost more than they save.
_CACHED = {"cpu": 16 * 2**20, "cuda": 24 * 2**20}


def check_refine_implementation(name: str) -> str:
    """Returns `name`; raises a `ValueError` that lists the choices where it is none of them."""
    if name != "auto" and name not in REFINE_IMPLEMENTATIONS:
        choices = ", ".join(map(repr, ["auto", *REFINE_IMPLEMENTATIONS]))
        raise ValueError(f"refine_implementation is {name!r}; choose among {choices}.")
    return name


def pick_implementation(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> str:
    """
    The implementation that refines this map: the chosen one, or `"eager"` where something stands against it, which a
    warning says once. `"auto"` takes the fastest for the device, and a line in the log (at level info) says once
    which, and why.

    Args:
        refinement: the module; its `refine_implementation` is what was asked for.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
    """
    if refinement.refine_implementation != "auto":
        name = refinement.refine_implementation
        if obstacle := REFINE_IMPLEMENTATIONS[name].why_not(refinement, attention_map):
            _say_once(logger.warning, f"Attention maps are refined by 'eager' and not by {name!r}: {obstacle}.")
            name = "eager"
        return name
    name, reason = _fastest(refinement, attention_map)
    _say_once(logger.info, f"Attention maps are refined by {name!r}: {reason}.")
    return name


def _fastest(refinement: RefinerMapRefinement, attention_map: torch.Tensor) -> tuple[str, str]:
    device = attention_map.device.type
    if torch.compiler.is_compiling() or is_transformed(attention_map):
        return "eager", "the model is being compiled, traced or transformed, which does best with plain operations"
    if device not in ("cuda", "cpu"):
        return "eager", f"there is nothing faster for {device}"
    name = "triton" if device == "cuda" else "blocked"
    if obstacle := REFINE_IMPLEMENTATIONS[name].why_not(refinement, attention_map):
        return "eager", f"{name!r} doesn't fit, {obstacle}"
    # Processes that synchronize must pick alike, whatever the sizes of their batches.
    if needs_exact(refinement, attention_map) and not refinement.output_norm.synchronizing:
        expanded = attention_map[:, 0].numel() * refinement.reduction.in_channels * attention_map.itemsize
        least = _CACHED[device]
        if expanded < least:
            return "eager", f"with gradients, expanded maps below {least >> 20} MB are quick to keep"
        return name, f"with gradients, expanded maps from {least >> 20} MB up would cost memory and time"
    return name, f"the fastest on {device}"


def _say_once(log: Callable[[str], None], message: str) -> None:
    if not torch.compiler.is_compiling():
        _say(log, message)


@cache
def _say(log: Callable[[str], None], message: str) -> None:
    log(message)
