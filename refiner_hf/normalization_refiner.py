# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""The batch norm of the refinement and of the convolutional stem."""

import torch
from torch import nn


class RefinerBatchNorm2d(nn.BatchNorm2d):
    """
    `nn.BatchNorm2d` whose running statistics move once a training step, also under activation checkpointing.

    Checkpointing runs a layer's forward a second time, inside the backward pass; torch's own norm then counts the
    batch twice. A forward inside a backward pass is always such a repetition, so here it leaves the buffers alone.

    With `frozen` it stays in evaluation mode, whatever `train()` says: fine-tuning with small batches, or with
    gradient accumulation that equals one large batch.
    """

    frozen = False

    def train(self, mode: bool = True) -> "RefinerBatchNorm2d":
        return super().train(mode and not self.frozen)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and self.track_running_stats and _inside_backward():
            # Copies, and not None: a recomputation must save as many tensors as the forward that it repeats.
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            return nn.functional.batch_norm(
                hidden_states, mean, variance, self.weight, self.bias, training=True, eps=self.eps
            )
        return super().forward(hidden_states)


def _inside_backward() -> bool:
    # torch.utils.checkpoint itself tells its recomputation by this id. While compiling, checkpointed regions are
    # traced once, outside any backward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
