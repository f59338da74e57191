"""
The running statistics of batch norms, re-estimated over images or texts as if all of them were one batch.

In one large batch a norm's statistics are those of all examples, where every norm before it has normalised with the
statistics of all examples, too. So the norms are settled one after the other, in the order in which they run: all
examples, in pieces, run up to a norm, and what they bring there is pooled. Layers whose norms are settled don't
compute again: what they gave is kept for each piece.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..normalization_refiner import combine_moments
from .model_inputs import Inputs, moved
from .modes import in_evaluation


Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # number of values, mean and scatter by channel

_ON_DEVICE = 2 * 2**30  # bytes of what layers gave that stay where they were computed
# Bytes of images that a CPU takes at a time: of few, the maps stay in its cache, which makes it twice as fast.
_ON_CPU = 2**20


class _Reached(Exception):
    """A forward pass has got as far as it shall."""


@torch.no_grad()
def reestimate_norm_statistics(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Inputs],
    *,
    together: Sequence[Sequence[_BatchNorm]] | None = None,
) -> int:
    """
    Replaces the running statistics of every batch norm by those of one batch of all examples, however they are divided
    into `batches`, with everything else in evaluation mode: no drop path, no dropout, no token mixing, no random
    numbers drawn. Weights don't change.

    It takes about three forward passes of each layer that has norms. Between the layers the tokens and the map that is
    handed on are kept for all examples, about 2 MB an image for Refiner-S at 224 pixels in float32: up to 2 GB on the
    model's device, the rest in the machine's memory.

    Args:
        model (`nn.Module`): its layers must run one after the other. Its training modes are restored.
        batches (iterable of `torch.Tensor` of shape (batch, channels, height, width), or of `dict`): images prepared
            as for evaluation, on any device, or all that the model takes, such as `pixel_values` with
            `bool_masked_pos`, or `input_ids` with `attention_mask`. A few hundred examples are enough.
        together (*optional*): groups of norms, in the order in which they run, where those of a group don't see each
            other's statistics: a group takes one pass. By default all norms, one by one.

    Returns:
        `int`: the number of examples used; 0 where the model has no batch norm or there are no batches, and then
        nothing changed.
    """
    norms: list[Any] = [
        module
        for module in (model.modules() if together is None else [norm for group in together for norm in group])
        if isinstance(module, _BatchNorm) and module.track_running_stats and not getattr(module, "frozen", False)
    ]
    pieces = [piece for batch in batches if norms for piece in _pieces(model, batch)]
    if not pieces:
        return 0
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    passes = _Passes(model, norms, pieces)
    try:
        counts = {}
        with in_evaluation(model):
            for group in [[norm] for norm in passes.order_of(norms)] if together is None else together:
                passes.settle_before(group[0])
                for norm, moments in passes.moments_at(group).items():
                    counts[norm] = _settle(norm, moments)
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
    return sum(map(_examples, pieces))


def _examples(inputs: Inputs) -> int:
    """How many there are in a batch."""
    return len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))


def _pieces(model: nn.Module, batch: torch.Tensor | Inputs) -> Iterator[Inputs]:
    inputs = {**batch} if isinstance(batch, Mapping) else {"pixel_values": batch}
    count = size = _examples(inputs)
    if next(model.parameters()).device.type == "cpu" and "pixel_values" in inputs:
        size = max(1, _ON_CPU * count // max(inputs["pixel_values"].nbytes, 1))

    def part(value: Any, start: int) -> Any:
        of_each = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count
        return value[start : start + size] if of_each else value

    for start in range(0, count, size):
        yield {name: part(value, start) for name, value in inputs.items()}


def _moments(values: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """Of the values that a norm gets, (B, C, ...), where its mask (B, 1, ...) is true."""
    values = values.to(torch.promote_types(values.dtype, torch.float32)).transpose(0, 1).flatten(1)
    if mask is not None:
        values = values[:, mask.flatten()]
    mean = values.mean(1)
    scatter = (values - mean[:, None]).square().sum(1)
    return mean.new_tensor(values.shape[1], dtype=torch.float64), mean.double(), scatter.double()


def _settle(norm: Any, moments: list[Moments]) -> torch.Tensor:
    """Mean and biased variance of all pieces; returns of how many values they are."""
    counts, means, scatters = (torch.stack(each) for each in zip(*moments))
    count, mean, _, scatter = combine_moments(counts, means, means, scatters)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(scatter / count)
    return count


def _layers_of(model: nn.Module, norms: list[_BatchNorm]) -> Sequence[nn.Module]:
    """The list of layers to which all norms belong, or all but those of the modules before it; empty without one."""
    base = getattr(model, "base_model", model)
    if isinstance(layers := getattr(base, "layers", None), nn.ModuleList):
        return layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((each for each in reversed(lists) if set(norms) <= set(each.modules())), nn.ModuleList())


class _Passes:
    """
    Forward passes of pieces through parts of a model.

    The model's own forward runs each time, as a whole. In those segments (a Refiner's embeddings, and each layer) that
    are settled, nothing is computed: they give what the last of them gave, which is all that the next one takes.
    """

    def __init__(self, model: nn.Module, norms: list[_BatchNorm], pieces: list[Inputs]):
        self.model, self.pieces = model, pieces
        self.device = next(model.parameters()).device
        self.layers = _layers_of(model, norms)
        # One module before the layers: with more, one would have to know what passes between them.
        base = getattr(model, "base_model", model)
        stem = (
            [base.embeddings] if getattr(base, "layers", None) is self.layers and hasattr(base, "embeddings") else []
        )
        self.segments = [*stem, *self.layers]
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
            with self._stopping_at(self.segments[last], outputs):
                self._run(piece)
            # What it is made of isn't needed any more, and two of all would be more than memory may hold.
            self.kept[piece] = self._keep(outputs.pop())
        for i in range(self.settled + 1, last + 1):
            segment = self.segments[i]
            self.forwards[segment] = segment.__dict__.get("forward")
            segment.forward = self._all_of_kept if i > 0 or segment in self.layers else self._first_of_kept
        self.settled = last

    def moments_at(self, norms: Sequence[_BatchNorm]) -> dict[_BatchNorm, list[Moments]]:
        """Of what each piece brings to norms."""
        moments: dict[_BatchNorm, list[Moments]] = {norm: [] for norm in norms}
        for piece in range(len(self.pieces)):

            def note(norm: _BatchNorm, args: tuple, piece: int = piece) -> None:
                moments[norm].append(_moments(*args))
                if all(len(each) > piece for each in moments.values()):
                    raise _Reached

            hooks = [norm.register_forward_pre_hook(note) for norm in norms]
            try:
                self._run(piece)
            finally:
                for hook in hooks:
                    hook.remove()
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
        try:
            self.model(**moved(self.model, self.pieces[piece]))
        except _Reached:
            pass

    @contextmanager
    def _stopping_at(self, module: nn.Module, found: list) -> Iterator[None]:
        """Passes end at `module`; what it gave is in `found`."""

        def stop(module: nn.Module, args: tuple, output: Any) -> None:
            found.append(output)
            raise _Reached

        hook = module.register_forward_hook(stop)
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
