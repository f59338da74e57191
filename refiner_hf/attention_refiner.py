# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement of attention maps (section 3 of the paper): what all kinds share, and the choice of implementation.

Shapes: B batch, H heads, E = H * expansion ratio, N tokens. Maps are (B, H, N, N).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .blocked_convolution_refiner import blocked_convolution
from .blocked_refiner import blocked_refine
from .configuration_refiner import RefinerConfig
from .folding_refiner import can_bypass, has_hooks, is_transformed, needs_training_form
from .native_refiner import native_refine, native_weigh, why_not_native
from .normalization_refiner import RefinerBatchNorm2d
from .operations_refiner import side_by_side
from .recomputing_refiner import why_not_recomputed
from .triton_refiner import triton_refine, why_not_triton


logger = logging.get_logger(__name__)


class WeightsPanel(NamedTuple):
    """
    Learned weights to plot: a matrix (rows, columns), or kernels (rows, columns, k, k) laid out in rows and columns.
    `across` and `down` name the columns and rows.
    """

    title: str
    values: torch.Tensor
    across: str = ""
    down: str = ""


class RefinerMapRefinement(nn.Module):
    """
    Refines attention maps (section 3 of the paper). This is what all kinds share: a batch norm at the end, and the
    choice of an implementation. A kind is a subclass with the methods below; `refinements_refiner.py` lists them.
    Most do what they do to the map; a kind may also change the scores before the softmax, and the values.

    Args:
        config ([`RefinerConfig`]): gives the heads, the kind of refinement and its sizes; at each call its
            `refine_implementation` is read.
    """

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        self.build(config)
        self.output_norm = batch_norm(config, self.refined_heads(config)) if self.has_output_norm else None

    def forward(
        self, attention_map: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            attention_map (`torch.Tensor` of shape (B, H, N, N)): to refine.
            scale (`float`, *optional*, defaults to 1.0): a factor on the result.
            mask (`torch.BoolTensor` of shape (B, 1, N, N), *optional*): true where a real query may look at a real
                key. Elsewhere, as at padding, the map is taken to be zero, counts for no batch statistics, and is zero
                when it is refined.

        Returns:
            the refined map, (B, [`refined_heads`], N, N).
        """
        name = pick_implementation(self, attention_map, masked=mask is not None)
        if mask is None:
            return REFINE_IMPLEMENTATIONS[name].refine(self, attention_map, scale, None)
        attention_map = attention_map.masked_fill(~mask, 0)
        return REFINE_IMPLEMENTATIONS[name].refine(self, attention_map, scale, mask).masked_fill(~mask, 0)

    def weigh(
        self, attention_map: torch.Tensor, value: torch.Tensor, scale: float = 1.0, map_needed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Refines a map and weights values with it.

        Args:
            attention_map, scale: as in [`forward`].
            value (`torch.Tensor` of shape (B, [`refined_heads`], N, d)): as [`refine_values`] gives them.
            map_needed (`bool`, *optional*): whether the refined map is wanted, too.

        Returns:
            the weighted values of all heads side by side, (B, N, H D), and the refined map, or `None` where it isn't
            needed and was never made.
        """
        if not map_needed and not has_hooks(self):
            implementation = REFINE_IMPLEMENTATIONS[pick_implementation(self, attention_map)]
            if implementation.weigh is not None and value.dtype == attention_map.dtype:
                return implementation.weigh(self, attention_map, value, scale), None
            refined = implementation.refine(self, attention_map, scale, None)
        else:
            refined = self(attention_map, scale)
        return side_by_side(refined @ value), refined

    def refine_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores that the softmax gets, before any mask, (B, H, N, N) -> (B, H, N, N)."""
        return scores

    def refine_values(self, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        The values that the refined map weights, (B, H, N, D) -> (B, [`refined_heads`], N, d), where the widths d of
        all heads add up to H * D. `mask` as in [`forward`].
        """
        return value

    # What a kind says of itself.

    has_output_norm = True

    # On a CPU with gradients and a mask, from how many bytes of its expanded maps on pieces of them are faster.
    masked_pieces_pay_from = 2 * 2**20

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        """The kind and its sizes in a few words, for a card."""
        raise NotImplementedError

    def build(self, config: RefinerConfig) -> None:
        """Makes the modules, all but the output norm."""
        raise NotImplementedError

    def refine(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        The refinement module by module, without the output norm: the naive reference that every implementation must
        equal. (B, H, N, N) -> (B, [`refined_heads`], N, N). With a mask the map is zero where that is false; norms get
        the mask too, and what a convolution over places sees must be zero there. What the result is there doesn't
        matter.
        """
        raise NotImplementedError

    def start_as_identity(self) -> None:
        """Sets the weights such that [`refine`] gives the map itself."""
        raise NotImplementedError

    def middle_maps(self, attention_map: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The maps in the middle of a refinement, (B, E, N, N), and after which step they are; if there are any."""
        return None

    def weights_panels(self) -> list[WeightsPanel]:
        """The learned weights, to be plotted."""
        raise NotImplementedError

    @classmethod
    def refined_heads(cls, config: RefinerConfig) -> int:
        """The channels of the refined map."""
        return config.num_attention_heads

    @property
    def expanded_heads(self) -> int:
        """The channels of the largest maps that its modules make."""
        return self.config.num_attention_heads

    def why_not_fast(self, masked: bool) -> str | None:
        """Why only `"eager"` can compute this kind, or `None` where others can."""
        return "this kind of refinement has only its modules"


def batch_norm(config: RefinerConfig, channels: int) -> RefinerBatchNorm2d:
    """A batch norm of a refinement."""
    return RefinerBatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)


def eager_refine(
    refinement: RefinerMapRefinement,
    attention_map: torch.Tensor,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The refinement, module by module. Runs everywhere and keeps every intermediate result for backward."""
    refined = refinement.refine(attention_map, mask)
    if refinement.output_norm is not None:
        refined = refinement.output_norm(refined, mask)
    return refined if scale == 1 else refined * scale


def _blocked(
    refinement: RefinerMapRefinement, attention_map: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    blocked = blocked_convolution if hasattr(refinement, "convolution") else blocked_refine
    return blocked(refinement, attention_map, scale, mask)


def _why_not_blocked(
    refinement: RefinerMapRefinement, attention_map: torch.Tensor, masked: bool = False
) -> str | None:
    if reason := refinement.why_not_fast(masked):
        return reason
    if not can_bypass(*refinement.children()):
        return "its modules have hooks or adapters, which only calling them runs"
    if is_transformed(attention_map):
        return "what happens to the maps is recorded or transformed, which takes plain operations"
    if attention_map[:, 0].numel() < 2:
        return "there is nothing, or a single value, to refine"
    if hasattr(refinement, "convolution"):
        return "compilers make more of its two modules" if torch.compiler.is_compiling() else None
    if not needs_training_form(refinement, attention_map):
        return None
    return why_not_recomputed(refinement)


def _why_not_native(refinement: RefinerMapRefinement, attention_map: torch.Tensor, masked: bool = False) -> str | None:
    return _why_not_blocked(refinement, attention_map, masked) or why_not_native(refinement, attention_map, masked)


def _why_not_kernels(
    refinement: RefinerMapRefinement, attention_map: torch.Tensor, masked: bool = False
) -> str | None:
    return _why_not_blocked(refinement, attention_map, masked) or why_not_triton(refinement, attention_map)


class RefineImplementation(NamedTuple):
    """
    A way to compute the refinement.

    `refine(refinement, map, scale, mask)` computes it: with a mask the map is zero where that is false, and what the
    result is there doesn't matter. `why_not(refinement, map, masked=False)` says why it can't, or `None` where it can.
    It runs on the device types `devices`, by default on all. `fastest_from` has those on which `"auto"` takes it where
    none before it can: with gradients only where a layer's expanded maps have at least so many bytes; with a mask a
    kind's `masked_pieces_pay_from` says it. For smaller ones many small operations cost more than they save (see the
    curves in docs/benchmarks/). `trains`: it is for training, too. `weigh(refinement, map, values, scale)`,
    where there is one, weights values with the refined map without making it.
    """

    refine: Callable[[RefinerMapRefinement, torch.Tensor, float, torch.Tensor | None], torch.Tensor]
    why_not: Callable[..., str | None]
    devices: tuple[str, ...] | None = None
    fastest_from: dict[str, int] = {}
    trains: bool = True
    weigh: Callable[[RefinerMapRefinement, torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None

    def runs_on(self, device: str) -> bool:
        """Whether there is any map on this type of device that it can refine."""
        return self.devices is None or device in self.devices


REFINE_IMPLEMENTATIONS: dict[str, RefineImplementation] = {
    "eager": RefineImplementation(eager_refine, lambda refinement, attention_map, masked=False: None),
    "native": RefineImplementation(
        native_refine,
        _why_not_native,
        devices=("cpu",),
        fastest_from={"cpu": 0},
        trains=False,
        weigh=native_weigh,
    ),
    "blocked": RefineImplementation(
        _blocked,
        _why_not_blocked,
        fastest_from={"cpu": 16 * 2**20},
    ),
    "triton": RefineImplementation(
        triton_refine,
        _why_not_kernels,
        devices=("cuda",),
        fastest_from={"cuda": 24 * 2**20},
    ),
}


def check_refine_implementation(name: str) -> str:
    """Returns `name`; raises a `ValueError` that lists the choices where it is none of them."""
    if name != "auto" and name not in REFINE_IMPLEMENTATIONS:
        choices = ", ".join(map(repr, ["auto", *REFINE_IMPLEMENTATIONS]))
        raise ValueError(f"refine_implementation is {name!r}; choose among {choices}.")
    return name


def set_refine_implementation(model: nn.Module, name: str) -> None:
    """Lets every refinement in a model be computed in this way; raises as [`check_refine_implementation`]."""
    check_refine_implementation(name)
    for module in model.modules():
        if isinstance(module, RefinerMapRefinement):
            module.config.refine_implementation = name


def pick_implementation(refinement: RefinerMapRefinement, attention_map: torch.Tensor, masked: bool = False) -> str:
    """
    The implementation that refines this map: the chosen one, or `"eager"` where something stands against it, which a
    warning says once. `"auto"` takes the fastest for the device, and a line in the log (at level info) says once
    which, and why.

    Args:
        refinement: the module; its configuration's `refine_implementation` is what was asked for.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        masked (`bool`, *optional*): whether there is a mask.
    """
    name = check_refine_implementation(refinement.config.refine_implementation)
    if name != "auto":
        if obstacle := REFINE_IMPLEMENTATIONS[name].why_not(refinement, attention_map, masked):
            _log_once(logger.warning_once, f"Attention maps are refined by 'eager' and not by {name!r}: {obstacle}.")
            name = "eager"
        return name
    name, reason = _fastest(refinement, attention_map, masked)
    _log_once(logger.info_once, f"Attention maps are refined by {name!r}: {reason}.")
    return name


def _fastest(refinement: RefinerMapRefinement, attention_map: torch.Tensor, masked: bool) -> tuple[str, str]:
    device = attention_map.device.type
    if is_transformed(attention_map):
        return "eager", "the model is being traced or transformed, which takes plain operations"
    fastest = {name: each for name, each in REFINE_IMPLEMENTATIONS.items() if device in each.fastest_from}
    if not fastest:
        return "eager", f"there is nothing faster for {device}"
    able = (name for name, each in fastest.items() if each.why_not(refinement, attention_map, masked) is None)
    name = next(able, None)
    if name is None:
        last = list(fastest)[-1]  # which can do the most
        return "eager", f"{last!r} doesn't fit, {fastest[last].why_not(refinement, attention_map, masked)}"
    # Processes that synchronize must pick alike, whatever the sizes of their batches.
    if needs_training_form(refinement, attention_map) and not refinement.output_norm.synchronizing:
        expanded = attention_map[:, 0].numel() * refinement.expanded_heads * attention_map.itemsize
        least = fastest[name].fastest_from[device]
        if masked and device == "cpu":
            least = refinement.masked_pieces_pay_from
        if expanded < least:
            return "eager", f"with gradients, expanded maps below {least >> 20} MB are quick to keep"
        return name, f"with gradients, expanded maps from {least >> 20} MB up would cost memory and time"
    return name, f"the fastest on {device}"


def _log_once(log: Callable[[str], None], message: str) -> None:
    """With a logger's `warning_once` or `info_once`, which compilers can't trace."""
    if not torch.compiler.is_compiling():
        log(message)
