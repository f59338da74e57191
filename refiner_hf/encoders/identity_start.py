"""How refinements start as the identity, up to their output norms, whose weight and bias undo their own statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention_refiner import RefinerMapRefinement
from ..normalization_refiner import RefinerBatchNorm2d
from ..utils.model_inputs import Inputs, moved
from ..utils.modes import in_evaluation
from ..utils.norm_statistics import reestimate_norm_statistics


@torch.no_grad()
def start_as_identity(
    model: PreTrainedModel, refinements: list[RefinerMapRefinement], batches: Sequence[Inputs]
) -> None:
    """
    Args:
        model: runs the refinements; no map changes meanwhile.
        refinements: those that start. All of one kind.
        batches: of the model's inputs, from which their norms take their statistics.

    Raises:
        `ValueError`: the maps aren't finite.
    """
    for refinement in refinements:
        refinement.start_as_identity()
    # Maps pass the output norms unchanged, so that each layer sees those of the model without refinements, and the
    # first norm of one doesn't see that of another.
    norms = ([m for m in r.modules() if isinstance(m, RefinerBatchNorm2d)] for r in refinements)
    together: list[Any] = list(zip(*norms, strict=True))
    output_norms: list[Any] = [r.output_norm for r in refinements if r.output_norm is not None]
    passes = [norm.register_forward_hook(lambda norm, inputs, output: inputs[0]) for norm in output_norms]
    try:
        reestimate_norm_statistics(model, batches, together=together)
    finally:
        for each in passes:
            each.remove()
    if not output_norms:
        with in_evaluation(model):
            output = model(**moved(model, batches[0])).to_tuple()[0]
        if not output.isfinite().all():
            raise ValueError(
                "The model's answers to these inputs aren't finite: inputs or weights hold NaN or infinity."
            )
    for norm in output_norms:
        if not norm.running_var.isfinite().all():
            raise ValueError("The model's maps of these inputs aren't finite: inputs or weights hold NaN or infinity.")
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
