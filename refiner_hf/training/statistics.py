"""
Running statistics of the batch norms, re-estimated.

The norms that refine the maps see inputs of tiny variance whose distribution moves as the attention learns, and
their running statistics lag behind it: accuracy in evaluation can fall for an epoch although the weights got better.
`docs/norm_statistics.md` has the measurements.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_norm_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """
    Replaces the running statistics of every batch norm by their average over `batches`, with everything else in
    evaluation mode: no drop path, no dropout, no token mixing, no random numbers drawn. Weights don't change.

    Args:
        model (`nn.Module`): takes `pixel_values`; its training modes are restored.
        batches (iterable of `torch.Tensor` of shape (batch, channels, height, width)): images prepared as for
            evaluation. A few hundred are enough.

    Returns:
        `int`: the number of images used; 0 where the model has no batch norm or there are no batches, and then
        nothing changed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    images = 0
    try:
        model.eval()
        for pixel_values in batches if norms else ():
            if images == 0:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain average over what follows
                    norm.train()
            model(pixel_values)
            images += len(pixel_values)
    finally:
        for norm, momentum, count in zip(norms, momenta, counts):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
        for module, mode in modes.items():
            module.training = mode
    return images
