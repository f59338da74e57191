"""How refinements start as the identity, up to their output norms, whose weight and bias undo their own statistics."""

from collections.abc import Callable
from typing import Any

import torch

from ..attention_refiner import RefinerMapRefinement


@torch.no_grad()
def start_as_identity(refinements: list[RefinerMapRefinement], measure: Callable[[], Any], what: str) -> None:
    """
    Args:
        refinements: of a model.
        measure (`Callable`): sets the running statistics of their norms. Meanwhile maps pass the output norms
            unchanged, so that each layer sees those of the model without refinements.
        what (`str`): the model's inputs, for an error: "images".

    Raises:
        `ValueError`: the maps aren't finite.
    """
    for refinement in refinements:
        refinement.start_as_identity()
    passes = [r.output_norm.register_forward_hook(lambda norm, inputs, output: inputs[0]) for r in refinements]
    try:
        measure()
    finally:
        for each in passes:
            each.remove()
    norm: Any  # its statistics are tensors
    for norm in (refinement.output_norm for refinement in refinements):
        if not norm.running_var.isfinite().all():
            raise ValueError(
                f"The model's maps of these {what} aren't finite: {what} or weights hold NaN or infinity."
            )
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
