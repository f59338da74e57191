"""
Running statistics of the batch norms, re-estimated.

The norms that refine the maps see inputs of tiny variance whose distribution moves as the attention learns, and
their running statistics lag behind it: accuracy in evaluation can fall for an epoch although the weights got better.
`docs/norm_statistics.md` has the measurements.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, default_data_collator

from ..utils.norm_statistics import reestimate_norm_statistics
from .ema import EmaCallback


class NormStatisticsCallback(TrainerCallback):
    """
    Re-estimates the batch norms' statistics whenever the Trainer is about to evaluate or to save, and at the end, so
    that what is measured and what is saved is the same good model. Training itself never sees these statistics.

    Every process goes through the same images and gets the same statistics, so nothing has to be exchanged.

    Args:
        dataset: training images prepared as for evaluation, rows with `pixel_values`.
        batch_size (`int`): images per forward pass; the statistics don't depend on it.
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
        ema: EmaCallback | None = None,
    ):
        self.ema = ema
        # A loader draws a random number at each iteration. With a generator of its own it doesn't change the random
        # numbers of the training.
        self.loader = DataLoader(dataset, batch_size=batch_size, collate_fn=data_collator, generator=torch.Generator())

    def on_step_end(self, args, state, control, model, **kwargs):
        if control.should_evaluate or control.should_save:
            self._refresh(model)

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_train_end(self, args, state, control, model, **kwargs):
        self._refresh(model)

    def _refresh(self, model: nn.Module) -> None:
        for each in (model,) if self.ema is None else (model, self.ema.model):
            with torch.random.fork_rng(devices=[]):  # a collator may draw masks
                batches = ({k: v for k, v in batch.items() if k != "labels"} for batch in self.loader)
                reestimate_norm_statistics(each, batches)
