"""The attention maps of a network, layer by layer while it runs: they needn't all be in memory at once."""

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention_refiner import RefinerMapRefinement
from ..modeling_refiner import RefinerAttention, RefinerPreTrainedModel
from .networks import classes_of_layers, patch_grid, reads_texts


# The call of `watch_layers` to which the forward pass in this thread belongs.
_watching: ContextVar[object | None] = ContextVar("watching", default=None)


@dataclass
class LayerView:
    """
    One layer in a forward pass: its number from 0, the tokens that enter and leave it, (B, N, D), and the map that
    weights its values, (B, H, N, N), of more heads where a refinement leaves them expanded. In a layer that refines,
    also the map before refinement, and the module.
    """

    index: int
    entering: torch.Tensor
    leaving: torch.Tensor
    applied: torch.Tensor
    before: torch.Tensor | None = None
    refinement: RefinerMapRefinement | None = None

    @torch.no_grad()
    def middle_maps(self) -> tuple[str, torch.Tensor] | None:
        """The maps in the middle of the refinement, (B, E, N, N), and after which step they are; if there are any."""
        if self.refinement is None or self.before is None:
            return None
        return self.refinement.middle_maps(self.before)


@torch.no_grad()
def watch_layers(  # noqa: C901 - its hooks count
    model: PreTrainedModel, inputs: torch.Tensor | Mapping[str, torch.Tensor], look: Callable[[LayerView], None]
) -> Any:
    """
    Runs a network and calls `look` after each layer. Nothing is kept, unless `look` keeps it.

    Several threads may do so with one model at the same time, and others may use it: each call of this function gets
    only the layers of its own forward pass.

    Args:
        model: a Refiner, or one of transformers' encoders with `attn_implementation="eager"`; in evaluation.
        inputs (`torch.Tensor` of shape (B, C, height, width), or `dict`): images as the processor prepares them, or
            all that the model takes, such as `input_ids` with `attention_mask`.
        look: called with each [`LayerView`], first layer first.

    Returns:
        what the model gives.

    Raises:
        `ValueError`: the model gives no maps, or has fewer tokens than patches.
    """
    this_call = object()

    def own(hook: Callable) -> Callable:
        """The hook, but only in forward passes of this call."""

        @wraps(hook)
        def in_this_call(*args: Any) -> Any:
            return hook(*args) if _watching.get() is this_call else None

        return in_this_call

    layer_class, attention_class = classes_of_layers(model)
    inputs = inputs if isinstance(inputs, Mapping) else {"pixel_values": inputs}
    patches = 0 if reads_texts(model) else math.prod(patch_grid(model, inputs["pixel_values"]))
    seen: dict[str, torch.Tensor] = {}
    count = 0

    def want_map(module: nn.Module, args: tuple) -> tuple:
        return *args[:2], True  # a plain layer computes no map unless it is asked to

    def keep_refined(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["before"], seen["refinement"] = args[0], module

    def keep_map(module: nn.Module, args: tuple, output: tuple) -> None:
        seen["applied"] = output[1]

    def show(module: nn.Module, args: tuple, output) -> None:
        nonlocal count
        applied = seen.get("applied")
        if applied is None or applied.ndim != 4 or applied.shape[-1] != applied.shape[-2]:
            raise ValueError(
                f"The layers of a {type(model).__name__} show no maps from all tokens to all. Load it with "
                "attn_implementation='eager', or take another model."
            )
        if applied.shape[-1] < patches:
            raise ValueError(
                f"A {type(model).__name__} has fewer tokens than patches: its maps can't be laid over an image."
            )
        leaving = output[0] if isinstance(output, tuple) else output
        look(LayerView(count, args[0], leaving, **seen))
        seen.clear()
        count += 1

    hooks = []
    for module in model.modules():
        if isinstance(module, RefinerAttention):
            hooks.append(module.register_forward_pre_hook(own(want_map)))
        if isinstance(module, RefinerMapRefinement):
            hooks.append(module.register_forward_hook(own(keep_refined)))
        if isinstance(module, attention_class):
            hooks.append(module.register_forward_hook(own(keep_map)))
        if isinstance(module, layer_class):
            hooks.append(module.register_forward_hook(own(show)))
    before = _watching.set(this_call)
    try:
        # Even if the configuration asks for them: transformers would keep all maps in memory.
        return model(**inputs, output_attentions=False, output_hidden_states=False)
    finally:
        _watching.reset(before)
        for hook in hooks:
            hook.remove()


def refined_maps(
    model: RefinerPreTrainedModel, pixel_values: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """
    The maps that go into and come out of each layer's refinement, the latter as they weight the values.

    Args:
        model: any Refiner, in evaluation.
        pixel_values (`torch.Tensor` of shape (B, C, height, width)): images as the processor prepares them.

    Returns:
        `dict[int, tuple]`: by layer, the map before and after, both (B, H, N, N).

    Raises:
        `ValueError`: no layer of the model refines its map.
    """
    maps = {}

    def keep(view: LayerView) -> None:
        if view.refinement is not None:
            maps[view.index] = (view.before, view.applied)

    watch_layers(model, pixel_values, keep)
    if not maps:
        raise ValueError("No layer of this model refines its attention map.")
    return maps
