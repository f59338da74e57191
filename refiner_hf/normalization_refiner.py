# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""The batch norm of the refinement and of the stem, and its statistics over several processes."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn


class RefinerBatchNorm2d(nn.BatchNorm2d):
    """
    `nn.BatchNorm2d` whose running statistics move once a training step, also under activation checkpointing.

    Checkpointing runs a layer's forward a second time, inside the backward pass; torch's own norm then counts the
    batch twice. A forward inside a backward pass is always such a repetition, so here it leaves the buffers alone.

    With `frozen` it stays in evaluation mode, whatever `train()` says: fine-tuning with small batches, or with
    gradient accumulation that equals one large batch.

    With `synchronized` it normalises, in training, with the statistics of all processes' batches together, as
    `nn.SyncBatchNorm` does, but on any device: under data parallelism the processes then compute what one would
    compute on the joined batch.
    """

    frozen = False
    synchronized = False

    def train(self, mode: bool = True) -> "RefinerBatchNorm2d":
        return super().train(mode and not self.frozen)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): to normalise.
            mask (`torch.BoolTensor` of shape (B, 1, H, W), *optional*): where values count for the statistics of a
                batch. All are normalised.
        """
        if mask is not None and (self.training or not self.track_running_stats):
            return self._normalise_masked(hidden_states, mask)
        if self.synchronizing:
            output, count, mean, variance = _SynchronizedBatchNorm.apply(
                hidden_states, self.weight, self.bias, self.eps
            )
            self.track(mean, variance, count)
            return output
        if self.training and self.track_running_stats and _inside_backward():
            # Copies, and not None: a recomputation must save as many tensors as the forward that it repeats.
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            return nn.functional.batch_norm(
                hidden_states, mean, variance, self.weight, self.bias, training=True, eps=self.eps
            )
        return super().forward(hidden_states)

    def _normalise_masked(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        counted = mask.to(values.dtype)

        def mean_of(each: torch.Tensor) -> torch.Tensor:
            total = (each * counted).sum((0, 2, 3))
            return (_AllReduceSum.apply(total) if self.synchronizing else total) / count

        count = all_reduce_sum(counted.sum(dtype=torch.float64), self.synchronizing).clamp(min=1).to(values.dtype)
        mean = mean_of(values)
        centred = values - mean[:, None, None]
        variance = mean_of(centred.square())
        self.track(mean, variance, count.double())
        gain = self.weight.to(values.dtype) * (variance + self.eps).rsqrt()
        output = gain[:, None, None] * centred + self.bias.to(values.dtype)[:, None, None]
        return output.to(hidden_states.dtype)

    @property
    def synchronizing(self) -> bool:
        """Whether the next forward exchanges statistics: `synchronized`, in training, and not alone."""
        return (
            self.synchronized
            and self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )

    @torch.no_grad()
    def track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """
        Updates the running statistics as a forward in training does, from statistics that are computed already.

        Args:
            mean, variance (`torch.Tensor` of shape (C,)): of the batch; the variance is the biased one.
            count (`torch.Tensor` of shape ()): how many values of each channel they are of.
        """
        track_together([self], torch.cat((mean, variance)), count)


@torch.no_grad()
def track_together(norms: list[RefinerBatchNorm2d], statistics: torch.Tensor, count: torch.Tensor) -> None:
    """
    [`RefinerBatchNorm2d.track`] for several norms at once: on a GPU, each operation on a short vector costs as much as
    one on them all.

    Args:
        norms: they track, all or none.
        statistics (`torch.Tensor` of shape (2 C,)): the means of all norms one after the other, then the biased
            variances.
        count (`torch.Tensor` of shape ()): how many values of each channel they are of.
    """
    if not norms[0].track_running_stats or _inside_backward():
        return
    mean, variance = statistics.chunk(2)
    new = torch.cat((mean, variance * (count / (count - 1))))
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    sizes = [vector.numel() for vector in running]
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    settings = {(norm.momentum, norm.running_mean.dtype) for norm in norms}
    momentum, dtype = next(iter(settings))
    if len(settings) == 1 and momentum is not None and dtype in (torch.float32, torch.float64):
        torch._foreach_lerp_(running, new.to(dtype).split(sizes), momentum)
        return
    for norm, vector, value in zip(norms * 2, running, new.split(sizes)):
        # Without a momentum, a plain average over all batches.
        momentum = 1 / norm.num_batches_tracked.to(new.dtype) if norm.momentum is None else norm.momentum
        vector.copy_(vector + momentum * (value - vector))


def all_reduce_sum(sums: torch.Tensor, synchronizing: bool) -> torch.Tensor:
    """`sums` added up over all processes."""
    if synchronizing:
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


class _AllReduceSum(torch.autograd.Function):
    """[`all_reduce_sum`] with a gradient: what each process's sum gives to all processes' results."""

    @staticmethod
    def forward(ctx, sums):
        return all_reduce_sum(sums, True)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce_sum(gradient, True)


def all_gather_moments(moments: tuple[torch.Tensor, ...], synchronizing: bool) -> tuple[torch.Tensor, ...]:
    """
    The moments of all processes' values together: count, means of x and of y, sum of (x - mean)(y - mean).

    Args:
        moments: the same four of this process's own values, as in [`combine_moments`].
    """
    if not synchronizing:
        return moments
    # Gathered by a sum in which each process has a row of its own: the exchange that every backend has everywhere.
    packed = torch.cat([moment.flatten() for moment in moments])
    gathered = packed.new_zeros(dist.get_world_size(), len(packed))
    gathered[dist.get_rank()] = packed
    dist.all_reduce(gathered)
    parts = gathered.split([moment.numel() for moment in moments], dim=1)
    return combine_moments(*(part.unflatten(1, moment.shape or (1,)) for part, moment in zip(parts, moments)))


def combine_moments(
    counts: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scatter: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    The moments of several pieces' values together, without the cancellation of a plain sum of squares.

    Args:
        counts: how many values, one for each of T pieces.
        x, y (`torch.Tensor` of shape (T, ...)): the pieces' means; they broadcast with each other to the scatter.
        scatter (`torch.Tensor` of shape (T, ...)): the pieces' sums of (x - mean)(y - mean).

    Returns:
        count (), means of x and of y, and the scatter, without the first dimension.
    """
    count = counts.sum()

    def weights(like: torch.Tensor) -> torch.Tensor:
        return counts.view(-1, *[1] * (like.ndim - 1))

    mean_x, mean_y = ((weights(m) * m).sum(0) / count for m in (x, y))
    between = (weights(scatter) * ((x - mean_x) * (y - mean_y))).sum(0)
    return count, mean_x, mean_y, scatter.sum(0) + between


def differentiable_once(backward: Callable) -> Callable:
    """
    For an autograd function's `backward` that records nothing of what it does: a second derivative through it raises a
    `RuntimeError`. (torch's own `once_differentiable` lets those pass, as zeros, whose gradient needs none itself.)
    """

    @wraps(backward)
    def once(ctx, *gradients):
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        return tuple(None if r is None else _RefuseSecondDerivative.apply(r.requires_grad_()) for r in results)

    return once


def refuse_second_derivative(*_: Any) -> NoReturn:
    """Raises a `RuntimeError`, for an autograd formula's backward pass."""
    raise RuntimeError(
        "The fast implementations of the refinement, and synchronized norms, are differentiable once. For second "
        'derivatives use refine_implementation="eager" and norms that aren\'t synchronized.'
    )


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        refuse_second_derivative()


class _SynchronizedBatchNorm(torch.autograd.Function):
    """(x (B, C, H, W), weight, bias, eps) -> (normalised, count, mean, biased variance), over all processes."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, eps):
        dims, working = (0, 2, 3), torch.promote_types(hidden_states.dtype, torch.float32)
        variance, mean = torch.var_mean(hidden_states.to(working), dims, correction=0)
        mean, variance = mean.double(), variance.double()
        count = mean.new_tensor(hidden_states.numel() / hidden_states.shape[1])
        count, mean, _, scatter = all_gather_moments((count, mean, mean, variance * count), True)
        variance = scatter / count
        output = nn.functional.batch_norm(
            hidden_states.to(working), mean.to(working), variance.to(working), weight.to(working), bias.to(working),
            training=False, eps=eps,
        )  # fmt: skip
        ctx.save_for_backward(hidden_states, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(count, mean, variance)
        return output.to(hidden_states.dtype), count, mean, variance

    @staticmethod
    @differentiable_once
    def backward(ctx, gradient, *_):
        hidden_states, weight, mean, inverse, count = ctx.saved_tensors
        working = torch.promote_types(hidden_states.dtype, torch.float32)

        def channels(vector: torch.Tensor) -> torch.Tensor:
            return vector.to(working)[:, None, None]

        normalised = (hidden_states - channels(mean)) * channels(inverse)
        gradient = gradient.to(working)
        # This process's share; what corrects the input's gradient is the mean over all.
        d_bias, d_weight = gradient.sum((0, 2, 3)).double(), (gradient * normalised).sum((0, 2, 3)).double()
        mean_d, mean_dx = all_reduce_sum(torch.stack((d_bias, d_weight)), True) / count
        d_input = (gradient - channels(mean_d) - normalised * channels(mean_dx)) * channels(weight * inverse)
        return d_input.to(hidden_states.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None


def _inside_backward() -> bool:
    # torch.utils.checkpoint itself tells its recomputation by this id. While compiling, checkpointed regions are
    # traced once, outside any backward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
