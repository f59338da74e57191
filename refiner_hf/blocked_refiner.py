# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement in plain torch, one piece of the maps after the other, so that the expanded piece stays in the
processor's cache.

A piece is the maps of some images; if one image's maps are too large, it is some of their rows, with the neighbours
that the convolution needs. Expanded pieces have the channels last: the matrix product writes this layout, and
depthwise convolutions are fastest in it.

With a mask, as for padded texts, a piece is cut to the rectangle in which its places are real, so that most padding
costs nothing. What isn't real within the rectangle is zeroed where a convolution or a sum would see it.

Shapes: I images, R rows and C columns of a piece, M = R C positions, E expanded heads. A piece of the maps is
(I, H, R, C), an expanded one (I, E, R, C) with the channels last, or flat (I, M, E); its mask (I, M, 1).
"""

from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .folding_refiner import Expansion, Folded, Local, arithmetic_type, fold, needs_training_form, operands_of
from .normalization_refiner import combine_moments
from .operations_refiner import refine_operation
from .recomputing_refiner import BackwardInputs, Moments, Recomputed, sums_type


# Bytes of an expanded piece: few enough for a CPU's shared cache, enough to be worth the calls.
_PIECE = 8 * 2**20


def blocked_refine(
    refinement: nn.Module, attention_map: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The refinement in pieces: with batch statistics or gradients as in [`Recomputed`], else with every norm
    folded into the weights before it.

    Args:
        refinement: the module that holds weights and norms.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        scale: a factor on the result.
        mask (`torch.BoolTensor` of shape (B, 1, N, N), *optional*): where places are real; elsewhere the map is zero.

    Returns:
        `torch.Tensor` of shape (B, H, N, N).
    """
    if needs_training_form(refinement, attention_map):
        return blocked_training(refinement, attention_map, scale, mask)
    return _blocked_refine(attention_map, mask, *operands_of(refinement), scale)


@refine_operation("blocked")
def _blocked_refine(
    attention_map: torch.Tensor,
    mask: torch.Tensor | None,
    weights: list[torch.Tensor | None],
    eps: list[float],
    scale: float,
) -> torch.Tensor:
    with torch.autocast(attention_map.device.type, enabled=False):
        return _folded_refine(fold(weights, eps, arithmetic_type(attention_map), scale), attention_map, mask)


def _folded_refine(folded: Folded, attention_map: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    new = torch.empty_like if mask is None else torch.zeros_like
    output = new(attention_map, memory_format=torch.contiguous_format)
    identity, constant = folded.identity[:, None], folded.constant[:, None]
    kernel = 1 if folded.local is None else folded.local.weight.shape[-1]
    for piece in _pieces(attention_map, mask, folded.reduction.shape[1], kernel):
        hidden = piece.expand(attention_map, folded.expansion)
        if folded.local is not None:
            hidden = piece.known_rows(_convolve(hidden, folded.local)).clamp_(0, 6)
        target = piece.of(output)
        in_place = target.is_contiguous() and target.dtype == constant.dtype
        refined = torch.addcmul(
            constant, identity, piece.of(attention_map).flatten(2), out=target.flatten(2) if in_place else None
        )
        refined.baddbmm_(folded.reduction.expand(len(refined), -1, -1), _flat(hidden).transpose(1, 2))  # (I, H, M)
        if not in_place:
            target.copy_(refined.view_as(target))
    return output


class BlockedPasses:
    """The passes of [`recomputing_refiner.Passes`] in plain torch."""

    def __init__(self, attention_map: torch.Tensor, weight_shape: torch.Size, mask: torch.Tensor | None):
        self.attention_map, self.mask = attention_map, mask
        self.dtype = arithmetic_type(attention_map)

    def map_moments(self) -> Moments:
        attention_map = self.attention_map
        counts, means, scatters = [], [], []
        for images in image_slices(attention_map):
            values = attention_map[images].flatten(2).to(arithmetic_type(attention_map))  # (I, H, N N)
            real = None if self.mask is None else self.mask[images].flatten(2).to(values.dtype)  # (I, 1, N N)
            count = _count(values[:, 0], real)
            mean = values.sum((0, 2)) / max(count, 1)
            centred = _masked(values - mean[:, None], real)
            counts.append(count)
            means.append(mean)
            scatters.append((centred @ centred.transpose(1, 2)).sum(0))
        means = torch.stack(means)
        return _join(counts, means[:, :, None], means[:, None, :], scatters)

    def local_moments(self, expansion: Expansion | None, weight: torch.Tensor) -> Moments:
        expansion, weight = self._cast(expansion, weight)
        counts, means, scatters = [], [], []
        for piece in _pieces(self.attention_map, self.mask, *weight.shape[::3]):
            h1 = piece.expand(self.attention_map, expansion)
            values = _flat(piece.known_rows(_convolve(h1, Local(weight, None))))  # (I, M, E)
            count = _count(values[:, :, 0], piece.real)
            mean = _masked(values, piece.real).sum((0, 1)) / max(count, 1)
            counts.append(count)
            means.append(mean)
            scatters.append(_masked(values.sub_(mean), piece.real).square_().sum((0, 1)))
        means = torch.stack(means)
        return _join(counts, means, means, scatters)

    def project(
        self, expansion: Expansion | None, local: Local, reduction: torch.Tensor
    ) -> tuple[torch.Tensor, Moments]:
        expansion, local, reduction = self._cast(expansion, local, reduction)
        reduced = self._new(self.attention_map)
        counts, means_z, means_a, scatters = [], [], [], []
        for piece in _pieces(self.attention_map, self.mask, *local.weight.shape[::3]):
            h1 = piece.expand(self.attention_map, expansion)
            h2 = _flat(piece.known_rows(_convolve(h1, local)).clamp_(0, 6))
            z3 = reduction @ h2.transpose(1, 2)  # (I, H, M)
            target = piece.of(reduced)
            target.copy_(z3.view_as(target))
            own = piece.of(self.attention_map).flatten(2).to(z3.dtype)
            real = None if piece.real is None else piece.real.transpose(1, 2)
            count = _count(z3[:, 0], real)
            mean_z, mean_a = (each.sum((0, 2)) / max(count, 1) for each in (_masked(z3, real), own))
            z3 = _masked(z3.sub_(mean_z[:, None]), real)
            counts.append(count)
            means_z.append(mean_z)
            means_a.append(mean_a)
            scatters.append(torch.stack((z3.square().sum((0, 2)), (z3 * own).sum((0, 2)))))
        means_z, means_a = torch.stack(means_z), torch.stack(means_a)
        x, y = torch.stack((means_z, means_z), 1), torch.stack((means_z, means_a), 1)  # (T, 2, H)
        return reduced, _join(counts, x, y, scatters)

    def combine(self, coefficients: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        alpha, gamma, beta = coefficients.to(self.dtype)[:, :, None, None]
        output = torch.empty_like(self.attention_map)
        for images in image_slices(self.attention_map):
            output[images] = torch.addcmul(beta, gamma, self.attention_map[images]).addcmul_(alpha, reduced[images])
        return output

    def outer_sums(self, gradient: torch.Tensor, reduced: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        mean_a, mean_z = means.to(self.dtype)[:, :, None, None]
        sums = 0
        for images in image_slices(self.attention_map):
            d = gradient[images].to(self.dtype)
            products = (d, (self.attention_map[images] - mean_a) * d, (reduced[images] - mean_z) * d)
            sums = sums + _exact(torch.stack([product.sum((0, 2, 3)) for product in products]))
        return sums

    def reduction_backward(self, inputs: BackwardInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (inputs,) = self._cast(inputs)
        sums = sums_of_products = weight_gradient = 0
        for piece in _pieces(self.attention_map, self.mask, *inputs.local.weight.shape[::3]):
            h1 = piece.expand(self.attention_map, inputs.expansion)
            dn2, normalised, h2, dz3 = self._second_norm_gradient(piece, h1, inputs)
            sums = sums + _exact(dn2.sum((0, 1)))
            sums_of_products = sums_of_products + _exact(normalised.mul_(dn2).sum((0, 1)))
            weight_gradient = weight_gradient + _exact((dz3 @ h2).sum(0))
        return sums, sums_of_products, weight_gradient

    def expansion_backward(
        self, inputs: BackwardInputs, second_norm: torch.Tensor, weight: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        inputs, second_norm, weight, centre = self._cast(inputs, second_norm, weight, centre)
        (expanded, kernel), expansion = weight.shape[::3], inputs.expansion
        part = self._new(self.attention_map, dtype=weight.dtype)
        weight_gradient, sum_g, sum_ga = 0, None if expansion is None else 0, None if expansion is None else 0
        for piece in _pieces(self.attention_map, self.mask, expanded, kernel, halos=2):
            h1 = piece.expand(self.attention_map, expansion)
            dn2, normalised, _, _ = self._second_norm_gradient(piece, h1, inputs)
            h1 = piece.known_rows(h1)
            dz2 = dn2.mul_(second_norm[0]).addcmul_(normalised, second_norm[1]).add_(second_norm[2])
            dz2 = _unflat(_masked(dz2, piece.real), h1)
            dh1 = nn.functional.conv_transpose2d(dz2, weight, padding=kernel // 2, groups=expanded)
            piece.blank_halo(dz2)  # those rows' share of the weight's gradient belongs to other pieces
            weight_gradient = weight_gradient + _exact(
                nn.grad.conv2d_weight(h1, weight.shape, dz2, padding=kernel // 2, groups=expanded)
            )
            dh1 = piece.own_rows(dh1)
            target = piece.of(part)
            if expansion is None:
                target.copy_(dh1)
                continue
            g = _flat(_relu6_backward(dh1, piece.own_rows(h1)))  # (I, M, E)
            own = piece.of(self.attention_map).flatten(2) - centre[:, None]  # (I, H, M); where nothing is real, g is 0
            sum_g = sum_g + _exact(g.sum((0, 1)))
            sum_ga = sum_ga + _exact((own @ g).sum(0).t())
            target.copy_((expansion.weight.t() @ g.transpose(1, 2)).view_as(target))
        return weight_gradient, sum_g, sum_ga, part

    def finish(
        self, part: torch.Tensor, inputs: BackwardInputs, coefficients: torch.Tensor, mixing: torch.Tensor | None
    ) -> torch.Tensor:
        coefficients, mixing = self._cast(coefficients, mixing)
        for images in image_slices(part):
            part[images] += self._combination(inputs, coefficients, images, slice(None), slice(None))
            if mixing is not None:
                maps = self.attention_map[images].flatten(2).to(self.dtype)
                part[images].flatten(2).baddbmm_(mixing.expand(len(maps), -1, -1), maps)
        return part.to(self.attention_map.dtype)

    def _second_norm_gradient(
        self, piece: "_Piece", h1: torch.Tensor, inputs: BackwardInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """dn2, z2^ and h2, all (I, M, E), and dz3 (I, H, M), where the piece's convolution is known."""
        normalised = _flat(piece.known_rows(_convolve(h1, inputs.local)))
        h2 = torch.addcmul(inputs.offset, inputs.gain, normalised).clamp_(0, 6)
        dz3 = self._combination(inputs, inputs.coefficients, piece.images, piece.known, piece.columns).flatten(2)
        dz3 = _masked(dz3, None if piece.real is None else piece.real.transpose(1, 2))
        return _relu6_backward(dz3.transpose(1, 2) @ inputs.reduction, h2), normalised, h2, dz3

    def _combination(
        self, inputs: BackwardInputs, coefficients: torch.Tensor, images: slice, rows: slice, columns: slice
    ) -> torch.Tensor:
        """c0 d + c1 A + c2 z3 + c3 for some images, rows and columns, (I, H, R, C)."""
        c0, c1, c2, c3 = coefficients[:, :, None, None]
        where = images, slice(None), rows, columns
        d, a, z3 = (maps[where] for maps in (inputs.gradient, self.attention_map, inputs.reduced))
        return torch.addcmul(c3, c0, d.to(c0.dtype)).addcmul_(c1, a.to(c0.dtype)).addcmul_(c2, z3.to(c0.dtype))

    def _new(self, like: torch.Tensor, **options) -> torch.Tensor:
        """Where pieces are written; those of a mask leave places out."""
        return (torch.empty_like if self.mask is None else torch.zeros_like)(like, **options)

    def _cast(self, *values) -> list:
        """Vectors and weights, also within tuples, in the type of the computation. (Maps never have a larger type.)"""

        def cast(value):
            if isinstance(value, tuple):
                return type(value)(*self._cast(*value))
            return value.to(self.dtype) if value is not None and value.dtype == torch.float64 else value

        return [cast(value) for value in values]


blocked_training = Recomputed("blocked", BlockedPasses)


class _Piece(NamedTuple):
    """
    Images, and rows of them: those that are its `own`, those where a convolution is `known`, `all` it looks at. Where
    its known rows are real says `real` (I, M, 1), and `all_real` where all are; `None` if everywhere.
    """

    images: slice
    own: slice
    known: slice
    all: slice
    columns: slice
    real: torch.Tensor | None
    all_real: torch.Tensor | None

    def of(self, maps: torch.Tensor) -> torch.Tensor:
        """Its own rows of maps (B, H, N, N), a view (I, H, R, C)."""
        return maps[self.images, :, self.own, self.columns]

    def expand(self, attention_map: torch.Tensor, expansion: Expansion | None) -> torch.Tensor:
        """h1 of all its rows, (I, E, R, C) with the channels last."""
        maps = attention_map[self.images, :, self.all, self.columns].to(arithmetic_type(attention_map))
        if expansion is None:
            return maps.contiguous(memory_format=torch.channels_last)
        weight = expansion.weight.t().expand(len(maps), -1, -1)
        hidden = torch.baddbmm(expansion.bias, maps.flatten(2).transpose(1, 2), weight).clamp_(0, 6)  # (I, M, E)
        return _unflat(_masked(hidden, self.all_real), maps)

    def known_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """From all its rows to those where a convolution is known."""
        return hidden[:, :, self.known.start - self.all.start : self.known.stop - self.all.start]

    def own_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the rows where a convolution is known to its own."""
        return hidden[:, :, self.own.start - self.known.start : self.own.stop - self.known.start]

    def blank_halo(self, hidden: torch.Tensor) -> None:
        """Zeroes, of the rows where a convolution is known, those that aren't its own."""
        hidden[:, :, : self.own.start - self.known.start] = 0
        hidden[:, :, self.own.stop - self.known.start :] = 0


def _pieces(
    attention_map: torch.Tensor, mask: torch.Tensor | None, expanded: int, kernel: int, halos: int = 1
) -> Iterator[_Piece]:
    """
    All rows of all images that hold anything real; each piece looks at `halos` times the kernel's reach beyond its own
    rows.
    """
    size, dtype = attention_map.shape[-1], arithmetic_type(attention_map)
    fitting = _PIECE // (expanded * size * dtype.itemsize)  # rows of all images
    for images in _slices(len(attention_map), max(1, fitting // size)):
        rows, columns, everywhere = (slice(0, size),) * 2 + (True,) if mask is None else real_part(mask, images)
        count = max(8, fitting * size // max(columns.stop - columns.start, 1))
        for own in _slices(rows.stop, count, rows.start):
            known, seen = (
                slice(max(own.start - by, rows.start), min(own.stop + by, rows.stop))
                for by in ((halos - 1) * (kernel // 2), halos * (kernel // 2))
            )
            masks = (None, None)
            if mask is not None and not everywhere:
                masks = (mask[images, 0, part, columns].flatten(1)[..., None].to(dtype) for part in (known, seen))
            yield _Piece(images, own, known, seen, columns, *masks)


_REAL_PARTS: MutableMapping = WeakTensorKeyDictionary()  # of masks, which all layers share


def real_part(mask: torch.Tensor, images: slice) -> tuple[slice, slice, bool]:
    """The rows and columns of some images that hold anything real, and whether all places there are."""
    if mask not in _REAL_PARTS:
        real = mask[:, 0]
        _REAL_PARTS[mask] = (real.any(2).cpu(), real.any(1).cpu(), real.sum((1, 2)).cpu())
    by_rows, by_columns, counts = _REAL_PARTS[mask]
    rows, columns = (_extent(by[images].any(0)) for by in (by_rows, by_columns))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, bool((counts[images] == area).all())


def _extent(flags: torch.Tensor) -> slice:
    """From the first to the last that is true."""
    places = flags.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def image_slices(maps: torch.Tensor) -> Iterator[slice]:
    """Images whose maps make a piece together without being expanded."""
    return _slices(len(maps), max(1, _PIECE // (maps[0].numel() * arithmetic_type(maps).itemsize)))


def _slices(stop: int, count: int, start: int = 0) -> Iterator[slice]:
    return (slice(first, min(first + count, stop)) for first in range(start, stop, count))


def _count(values: torch.Tensor, real: torch.Tensor | None) -> float:
    """How many values of one channel are real."""
    return values.numel() if real is None else float(real.sum(dtype=torch.float64))


def _masked(values: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Zeroes in place what isn't real."""
    return values if real is None else values.mul_(real)


def _convolve(hidden: torch.Tensor, local: Local) -> torch.Tensor:
    # At the border of all rows, this pads where the map goes on; those rows are cut off, see `known_rows`.
    padding = local.weight.shape[-1] // 2
    return nn.functional.conv2d(hidden, local.weight, local.bias, padding=padding, groups=hidden.shape[1])


def _relu6_backward(gradient: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
    # It asks where the input was inside (0, 6), which the activated values tell as well.
    return torch.ops.aten.hardtanh_backward(gradient, activated, 0, 6)


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    """(I, E, R, N) with the channels last -> (I, M, E); a view where the rows are whole."""
    return hidden.permute(0, 2, 3, 1).flatten(1, 2)


def _unflat(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(I, M, E) -> (I, E, R, N) with the channels last and the rows of `like`, a view."""
    return hidden.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _exact(sums: torch.Tensor) -> torch.Tensor:
    return sums.to(sums_type(sums))


def _join(counts: list[float], x: torch.Tensor, y: torch.Tensor, scatters: list[torch.Tensor]) -> Moments:
    counts = torch.tensor(counts, device=x.device)
    return Moments(*combine_moments(*(_exact(moment) for moment in (counts, x, y, torch.stack(scatters)))))
