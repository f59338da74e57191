"""
The running statistics of batch norms, re-estimated over images as if all of them were one batch.

In one large batch a norm's statistics are those of all images, where every norm before it has normalised with the
statistics of all images, too. So the norms are settled one after the other, in the order in which they run: all
images, in pieces, run up to a norm, and what they bring there is pooled. Layers whose norms are settled don't compute
again: what they gave is kept for each piece.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..normalization_refiner import combine_moments
from .modes import in_evaluation


Inputs = dict[str, torch.Tensor]

_ON_DEVICE = 2 * 2**30  # bytes of what layers gave that stay where they were computed
# Bytes of images that a CPU takes at a time: of few, the maps stay in its cache, which makes it twice as fast.
_ON_CPU = 2**20


class _Reached(Exception):
    """A forward pass has got as far as it shall."""


@torch.no_grad()
def reestimate_norm_statistics(model: nn.Module, batches: Iterable[torch.Tensor | Inputs]) -> int:
    """
    Replaces the running statistics of every batch norm by those of one batch of all images, however they are divided
    into `batches`, with everything else in evaluation mode: no drop path, no dropout, no token mixing, no random
    numbers drawn. Weights don't change.

    It takes about three forward passes of each layer that has norms. Between the layers the tokens and the map that is
    handed on are kept for all images, about 2 MB an image for Refiner-S at 224 pixels in float32: up to 2 GB on the
    model's device, the rest in the machine's memory.

    Args:
        model (`nn.Module`): takes `pixel_values`. If its base model has `embeddings` and `layers`, they must run one
            after the other. Its training modes are restored.
        batches (iterable of `torch.Tensor` of shape (batch, channels, height, width), or of `dict`): images prepared
            as for evaluation, on any device, alone or as `pixel_values` with what else the model takes beside them,
            such as `bool_masked_pos`. A few hundred images are enough.

    Returns:
        `int`: the number of images used; 0 where the model has no batch norm or there are no batches, and then
        nothing changed.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not getattr(module, "frozen", False)
    ]
    pieces = [piece for batch in batches if norms for piece in _pieces(model, batch)]
    if not pieces:
        return 0
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    passes = _Passes(model, pieces)
    try:
        counts = {}
        with in_evaluation(model):
            for norm in passes.order_of(norms):
                passes.settle_before(norm)
                counts[norm] = _settle(norm, passes.moments_at(norm))
        # Within a batch norms normalise with its biased variance, and what they keep of it is the unbiased one.
        for norm, count in counts.items():
            norm.running_var.mul_((count / (count - 1).clamp(min=1)).to(norm.running_var.dtype))
    except BaseException:
        for norm, (mean, variance) in zip(norms, before):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        raise
    finally:
        passes.end()
    return sum(len(piece["pixel_values"]) for piece in pieces)


def _pieces(model: nn.Module, batch: torch.Tensor | Inputs) -> Iterator[Inputs]:
    inputs = dict(batch) if isinstance(batch, dict) else {"pixel_values": batch}
    images = inputs["pixel_values"]
    count = len(images)
    if next(model.parameters()).device.type == "cpu":
        count = max(1, _ON_CPU * len(images) // max(images.nbytes, 1))
    parts = {name: value.split(count) for name, value in inputs.items()}
    for values in zip(*parts.values()):
        yield dict(zip(parts, values))


def _settle(norm: _BatchNorm, moments: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Mean and biased variance of all pieces; returns of how many values they are."""
    counts, means, scatters = (torch.stack(each) for each in zip(*moments))
    count, mean, _, scatter = combine_moments(counts, means, means, scatters)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(scatter / count)
    return count


class _Passes:
    """
    Forward passes of pieces through parts of a model.

    The model's own forward runs each time, as a whole. In those segments (the embeddings, and each layer) that are
    settled, nothing is computed: they give what the last of them gave, which is all that the next one takes.
    """

    def __init__(self, model: nn.Module, pieces: list[Inputs]):
        self.model, self.pieces = model, pieces
        self.device = next(model.parameters()).device
        base = getattr(model, "base_model", model)
        layers = list(getattr(base, "layers", ()))
        # One module before the layers: with more, one would have to know what passes between them.
        self.segments = [base.embeddings, *layers] if layers and hasattr(base, "embeddings") else []
        self.settled = -1  # the last segment that needn't compute
        self.kept: list[Any] = [None] * len(pieces)
        self.kept_bytes = 0
        self.piece = 0  # that runs now
        self.forwards: dict[nn.Module, Any] = {}  # what `end` puts back

    def order_of(self, norms: list[_BatchNorm]) -> list[_BatchNorm]:
        """The norms that are reached, in that order."""
        reached: dict[_BatchNorm, None] = {}
        hooks = [norm.register_forward_pre_hook(lambda norm, args: reached.setdefault(norm)) for norm in norms]
        try:
            self._run(0)
        finally:
            for hook in hooks:
                hook.remove()
        return list(reached)

    def settle_before(self, norm: _BatchNorm) -> None:
        """Keeps what the segments before that of `norm` give."""
        inside = (i for i, segment in enumerate(self.segments) if norm in set(segment.modules()))
        last = next(inside, 0) - 1
        if last <= self.settled:
            return
        outputs, self.kept_bytes = [], 0
        for piece in range(len(self.pieces)):
            with self._stopping_at(self.segments[last], outputs, before=False):
                self._run(piece)
            # What it is made of isn't needed any more, and two of all would be more than memory may hold.
            self.kept[piece] = self._keep(outputs.pop())
        for i in range(self.settled + 1, last + 1):
            segment = self.segments[i]
            self.forwards[segment] = segment.__dict__.get("forward")
            segment.forward = self._first_of_kept if i == 0 else self._all_of_kept
        self.settled = last

    def moments_at(self, norm: _BatchNorm) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of what each piece brings to a norm: number of values, mean and sum of squared deviations by channel."""
        moments: list = []
        for piece in range(len(self.pieces)):
            arrived: list[torch.Tensor] = []
            with self._stopping_at(norm, arrived, before=True):
                self._run(piece)
            values = arrived.pop()
            values = values.to(torch.promote_types(values.dtype, torch.float32)).transpose(0, 1).flatten(1)
            mean = values.mean(1)
            scatter = (values - mean[:, None]).square().sum(1)
            moments.append((mean.new_tensor(values.shape[1], dtype=torch.float64), mean.double(), scatter.double()))
        return moments

    def end(self) -> None:
        """Everything computes again."""
        for segment, forward in self.forwards.items():
            del segment.forward
            if forward is not None:  # somebody else's, such as accelerate's for offloaded weights
                segment.forward = forward
        self.kept = []

    def _run(self, piece: int) -> None:
        self.piece = piece
        inputs = {name: value.to(self.device) for name, value in self.pieces[piece].items()}
        try:
            self.model(**inputs)
        except _Reached:
            pass

    @contextmanager
    def _stopping_at(self, module: nn.Module, found: list, before: bool) -> Iterator[None]:
        """Passes end at `module`; its input, or what it gave, is in `found`."""

        def stop(module: nn.Module, args: tuple, output: Any = None) -> None:
            found.append(args[0] if before else output)
            raise _Reached

        hook = module.register_forward_pre_hook(stop) if before else module.register_forward_hook(stop)
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._keep(each) for each in output)
        if isinstance(output, torch.Tensor):
            self.kept_bytes += output.nbytes
            return output if self.kept_bytes <= _ON_DEVICE else output.cpu()
        return output

    def _all_of_kept(self, *args: Any, **kwargs: Any) -> Any:
        kept = self.kept[self.piece]
        if isinstance(kept, tuple):
            return tuple(each.to(self.device) if isinstance(each, torch.Tensor) else each for each in kept)
        return kept.to(self.device)

    def _first_of_kept(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept = self.kept[self.piece]
        return (kept[0] if isinstance(kept, tuple) else kept).to(self.device)
