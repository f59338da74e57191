"""
Running statistics of the batch norms, re-estimated.

The norms that refine the maps see inputs of tiny variance whose distribution moves as the attention learns, and
their running statistics lag behind it: accuracy in evaluation can fall for an epoch although the weights got better.
`docs/norm_statistics.md` has the measurements.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, default_data_collator


if TYPE_CHECKING:
    from .ema import EmaCallback  # takes timm, which only training needs


@torch.no_grad()
def reestimate_norm_statistics(model: nn.Module, batches: Iterable[torch.Tensor | dict[str, torch.Tensor]]) -> int:
    """
    Replaces the running statistics of every batch norm by their average over `batches`, with everything else in
    evaluation mode: no drop path, no dropout, no token mixing, no random numbers drawn. Weights don't change.

    Args:
        model (`nn.Module`): takes `pixel_values`; its training modes are restored.
        batches (iterable of `torch.Tensor` of shape (batch, channels, height, width), or of `dict`): images prepared
            as for evaluation, alone or as `pixel_values` with what else the model takes beside them, such as
            `bool_masked_pos`. A few hundred are enough.

    Returns:
        `int`: the number of images used; 0 where the model has no batch norm or there are no batches, and then
        nothing changed.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and not getattr(m, "frozen", False)
    ]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    before = [
        (norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()) for norm in norms
    ]
    images = 0
    try:
        model.eval()
        for batch in batches if norms else ():
            inputs = batch if isinstance(batch, dict) else {"pixel_values": batch}
            if images == 0:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain average over what follows
                    norm.train()
            model(**inputs)
            images += len(inputs["pixel_values"])
    except BaseException:
        for norm, (mean, variance, _) in zip(norms, before):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        raise
    finally:
        for norm, momentum, (_, _, count) in zip(norms, momenta, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
        for module, mode in modes.items():
            module.training = mode
    return images


class NormStatisticsCallback(TrainerCallback):
    """
    Re-estimates the batch norms' statistics whenever the Trainer is about to evaluate or to save, and at the end, so
    that what is measured and what is saved is the same good model. Training itself never sees these statistics.

    Every process goes through the same images and gets the same statistics, so nothing has to be exchanged.

    Args:
        dataset: training images prepared as for evaluation, rows with `pixel_values`.
        batch_size (`int`): images per forward pass.
        data_collator (*optional*): makes a batch of rows, by default transformers' own. For masked image modelling,
            the one of the training: under masks the norms see other maps than without.
        ema ([`EmaCallback`], *optional*): its average of the weights gets statistics of its own. It must come before
            this callback among the Trainer's.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        data_collator: Callable = default_data_collator,
        ema: "EmaCallback | None" = None,
    ):
        self.ema = ema
        # A loader draws a number each time it is gone through; from a generator of its own, so that training goes on
        # with the very random numbers it would have had.
        self.loader = DataLoader(dataset, batch_size=batch_size, collate_fn=data_collator, generator=torch.Generator())

    def on_step_end(self, args, state, control, model, **kwargs):
        if control.should_evaluate or control.should_save:
            self._refresh(model)

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, model, **kwargs):
        self._refresh(model)

    def _refresh(self, model: nn.Module) -> None:
        for each in (model,) if self.ema is None else (model, self.ema.model):
            device = next(each.parameters()).device
            with torch.random.fork_rng(devices=[]):  # a collator may draw masks
                batches = ({k: v.to(device) for k, v in batch.items() if k != "labels"} for batch in self.loader)
                reestimate_norm_statistics(each, batches)
