# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The refinement in plain torch, a piece of a map at a time, so that the expanded piece stays in the processor's cache.

A piece is some rows of one image's maps, with the neighbours that the convolution looks at. Expanded pieces lie with
the channels last: the matrix product then writes the very layout in which depthwise convolutions are fastest.

Shapes: R rows of a piece, E expanded heads; a piece of the map is (H, R, N), an expanded one (1, E, R, N).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from .exact_refiner import BackwardInputs, Moments, exact_refine, sums_type
from .folding_refiner import Expansion, Folded, Local, arithmetic_type, fold, needs_exact
from .normalization_refiner import join_moments


# Bytes of an expanded piece. Measured on a CPU with 32 MB of shared cache: flat from 4 to 8 MB, slower below.
_PIECE = 8 * 2**20


def blocked_refine(refinement: nn.Module, attention_map: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """
    The refinement in pieces: with batch statistics or gradients as in [`exact_refine`], else with every norm folded
    into the weights before it.

    Args:
        refinement: the module that holds weights and norms.
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        scale: a factor on the result.

    Returns:
        `torch.Tensor` of shape (B, H, N, N).
    """
    if needs_exact(refinement, attention_map):
        return exact_refine(refinement, attention_map, scale, BlockedPasses)
    with torch.autocast(attention_map.device.type, enabled=False):
        return _folded_refine(fold(refinement, arithmetic_type(attention_map), scale), attention_map)


def _folded_refine(folded: Folded, attention_map: torch.Tensor) -> torch.Tensor:
    output = torch.empty_like(attention_map, memory_format=torch.contiguous_format)
    identity, constant = folded.identity[:, None], folded.constant[:, None]
    kernel = 1 if folded.local is None else folded.local.weight.shape[-1]
    for piece in _pieces(attention_map, folded.reduction.shape[1], kernel):
        hidden = piece.expand(attention_map, folded.expansion)
        if folded.local is not None:
            hidden = piece.known_rows(_convolve(hidden, folded.local)).clamp_(0, 6)
        target = piece.of(output)
        in_place = target.is_contiguous() and target.dtype == constant.dtype
        refined = torch.addcmul(
            constant, identity, piece.of(attention_map).flatten(1), out=target.flatten(1) if in_place else None
        )
        refined.addmm_(folded.reduction, _flat(hidden).t())  # (H, R N)
        if not in_place:
            target.copy_(refined.view_as(target))
    return output


class BlockedPasses:
    """The passes of [`exact_refiner.Passes`] in plain torch."""

    @staticmethod
    def map_moments(attention_map: torch.Tensor) -> Moments:
        counts, means, scatters = [], [], []
        for image in attention_map:
            values = image.flatten(1).to(arithmetic_type(image))  # (H, M)
            mean = values.mean(1)
            centred = values - mean[:, None]
            counts.append(values.shape[1])
            means.append(mean)
            scatters.append(centred @ centred.t())
        means = torch.stack(means)
        return _join(counts, means[:, :, None], means[:, None, :], torch.stack(scatters))

    @staticmethod
    def local_moments(attention_map: torch.Tensor, expansion: Expansion | None, weight: torch.Tensor) -> Moments:
        counts, means, scatters = [], [], []
        for piece in _pieces(attention_map, *weight.shape[::3]):
            h1 = piece.expand(attention_map, expansion)
            values = _flat(piece.known_rows(_convolve(h1, Local(weight, None))))  # (M, E)
            mean = values.sum(0) / len(values)
            counts.append(len(values))
            means.append(mean)
            scatters.append(values.sub_(mean).square_().sum(0))
        means = torch.stack(means)
        return _join(counts, means, means, torch.stack(scatters))

    @staticmethod
    def project(
        attention_map: torch.Tensor, expansion: Expansion | None, local: Local, reduction: torch.Tensor
    ) -> tuple[torch.Tensor, Moments]:
        reduced = torch.empty_like(attention_map)
        counts, means_z, means_a, scatters = [], [], [], []
        for piece in _pieces(attention_map, *local.weight.shape[::3]):
            h1 = piece.expand(attention_map, expansion)
            z3 = reduction @ _flat(piece.known_rows(_convolve(h1, local)).clamp_(0, 6)).t()  # (H, M)
            piece.of(reduced).copy_(z3.unflatten(1, (-1, reduced.shape[-1])))
            own = piece.of(attention_map).flatten(1).to(z3.dtype)
            mean_z, mean_a = z3.mean(1), own.mean(1)
            z3 -= mean_z[:, None]
            counts.append(z3.shape[1])
            means_z.append(mean_z)
            means_a.append(mean_a)
            scatters.append(torch.stack((z3.square().sum(1), (z3 * own).sum(1))))
        means_z, means_a = torch.stack(means_z), torch.stack(means_a)
        x, y = torch.stack((means_z, means_z), 1), torch.stack((means_z, means_a), 1)  # (T, 2, H)
        return reduced, _join(counts, x, y, torch.stack(scatters))

    @staticmethod
    def combine(coefficients: torch.Tensor, attention_map: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        alpha, gamma, beta = coefficients[:, :, None, None]
        output = torch.empty_like(attention_map)
        for image, z3, out in zip(attention_map, reduced, output):
            out.copy_(torch.addcmul(beta, gamma, image).addcmul_(alpha, z3))
        return output

    @staticmethod
    def outer_sums(
        gradient: torch.Tensor, attention_map: torch.Tensor, reduced: torch.Tensor, means: torch.Tensor
    ) -> torch.Tensor:
        mean_a, mean_z = means[:, :, None, None]
        sums = 0
        for d, image, z3 in zip(gradient, attention_map, reduced):
            d = d.to(means.dtype)
            values = torch.stack([v.sum((1, 2)) for v in (d, (image - mean_a) * d, (z3 - mean_z) * d)])
            sums = sums + values.to(sums_type(values))
        return sums

    @staticmethod
    def reduction_backward(inputs: BackwardInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sums = sums_of_products = weight_gradient = 0
        for piece in _pieces(inputs.attention_map, *inputs.local.weight.shape[::3]):
            h1 = piece.expand(inputs.attention_map, inputs.expansion)
            dn2, normalised, hidden, dz3 = _second_norm_gradient(piece, h1, inputs)
            sums = sums + dn2.sum(0).to(sums_type(dn2))
            sums_of_products = sums_of_products + normalised.mul_(dn2).sum(0).to(sums_type(dn2))
            weight_gradient = weight_gradient + (dz3 @ hidden).to(sums_type(dn2))
        return sums, sums_of_products, weight_gradient

    @staticmethod
    def expansion_backward(
        inputs: BackwardInputs, second_norm: torch.Tensor, weight: torch.Tensor, centre: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        (expanded, kernel), expansion = weight.shape[::3], inputs.expansion
        part = torch.empty_like(inputs.attention_map, dtype=weight.dtype)
        weight_gradient, sum_g, sum_ga = 0, None if expansion is None else 0, None if expansion is None else 0
        for piece in _pieces(inputs.attention_map, expanded, kernel, halos=2):
            h1 = piece.expand(inputs.attention_map, expansion)
            dn2, normalised, _, _ = _second_norm_gradient(piece, h1, inputs)
            h1 = piece.known_rows(h1)
            dz2 = dn2.mul_(second_norm[0]).addcmul_(normalised, second_norm[1]).add_(second_norm[2])
            dz2 = dz2.view(1, *h1.shape[-2:], expanded).permute(0, 3, 1, 2)
            dh1 = nn.functional.conv_transpose2d(dz2, weight, padding=kernel // 2, groups=expanded)
            piece.blank_halo(dz2)  # those rows' share of the weight's gradient belongs to other pieces
            weight_gradient = weight_gradient + nn.grad.conv2d_weight(
                h1, weight.shape, dz2, padding=kernel // 2, groups=expanded
            ).to(sums_type(h1))
            dh1 = piece.own_rows(dh1)
            target = piece.of(part)
            if expansion is None:
                target.copy_(dh1[0])
                continue
            g = _flat(_relu6_backward(dh1, piece.own_rows(h1)))  # (M, E)
            own = piece.of(inputs.attention_map).flatten(1) - centre[:, None]  # (H, M)
            sum_g = sum_g + g.sum(0).to(sums_type(g))
            sum_ga = sum_ga + (own @ g).t().to(sums_type(g))
            target.copy_((expansion.weight.t() @ g.t()).view_as(target))
        return weight_gradient, sum_g, sum_ga, part

    @staticmethod
    def finish(
        part: torch.Tensor, inputs: BackwardInputs, coefficients: torch.Tensor, mixing: torch.Tensor | None
    ) -> torch.Tensor:
        for image in range(len(part)):
            part[image] += _combination(inputs, coefficients, image, slice(None))
            if mixing is not None:
                part[image].flatten(1).addmm_(mixing, inputs.attention_map[image].flatten(1).to(mixing.dtype))
        return part.to(inputs.attention_map.dtype)


class _Piece(NamedTuple):
    """Rows of an image: those that are its `own`, those where a convolution is `known`, and `all` it looks at."""

    image: int
    own: slice
    known: slice
    all: slice

    def of(self, maps: torch.Tensor) -> torch.Tensor:
        """Its own rows of maps (B, H, N, N), a view (H, R, N)."""
        return maps[self.image, :, self.own]

    def expand(self, attention_map: torch.Tensor, expansion: Expansion | None) -> torch.Tensor:
        """h1 of all its rows, (1, E, R, N) with the channels last."""
        rows = attention_map[self.image, :, self.all].to(arithmetic_type(attention_map))  # (H, R, N)
        if expansion is None:
            return rows.unsqueeze(0).contiguous(memory_format=torch.channels_last)
        hidden = torch.addmm(expansion.bias, rows.flatten(1).t(), expansion.weight.t()).clamp_(0, 6)
        return hidden.view(1, *rows.shape[1:], -1).permute(0, 3, 1, 2)

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


def _pieces(attention_map: torch.Tensor, expanded: int, kernel: int, halos: int = 1) -> Iterator[_Piece]:
    """All rows of all images; each piece looks at `halos` times the kernel's reach beyond its own rows."""
    images, _, size, _ = attention_map.shape
    count = max(8, _PIECE // (expanded * size * arithmetic_type(attention_map).itemsize))

    def widened(rows: slice, by: int) -> slice:
        return slice(max(rows.start - by, 0), min(rows.stop + by, size))

    for image in range(images):
        for start in range(0, size, count):
            own = slice(start, min(start + count, size))
            yield _Piece(image, own, widened(own, (halos - 1) * (kernel // 2)), widened(own, halos * (kernel // 2)))


def _convolve(hidden: torch.Tensor, local: Local) -> torch.Tensor:
    # At the border of all rows, this pads where the map goes on; those rows are cut off, see `known_rows`.
    padding = local.weight.shape[-1] // 2
    return nn.functional.conv2d(hidden, local.weight, local.bias, padding=padding, groups=hidden.shape[1])


def _second_norm_gradient(
    piece: _Piece, h1: torch.Tensor, inputs: BackwardInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dn2, z2^ and h2, all (M, E), and dz3 (H, M), where the piece's convolution is known."""
    normalised = _flat(piece.known_rows(_convolve(h1, inputs.local)))
    hidden = torch.addcmul(inputs.offset, inputs.gain, normalised).clamp_(0, 6)
    dz3 = _combination(inputs, inputs.coefficients, piece.image, piece.known).flatten(1)
    return _relu6_backward(dz3.t() @ inputs.reduction, hidden), normalised, hidden, dz3


def _combination(inputs: BackwardInputs, coefficients: torch.Tensor, image: int, rows: slice) -> torch.Tensor:
    """c0 d + c1 A + c2 z3 + c3 for some rows of an image, (H, R, N)."""
    c0, c1, c2, c3 = coefficients[:, :, None, None]
    d, a, z3 = (maps[image, :, rows] for maps in (inputs.gradient, inputs.attention_map, inputs.reduced))
    return torch.addcmul(c3, c0, d.to(c0.dtype)).addcmul_(c1, a.to(c0.dtype)).addcmul_(c2, z3.to(c0.dtype))


def _relu6_backward(gradient: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
    # It asks where the input was inside (0, 6), which the activated values tell as well.
    return torch.ops.aten.hardtanh_backward(gradient, activated, 0, 6)


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    """(1, E, R, N) with the channels last -> (R N, E), without a copy."""
    return hidden.permute(0, 2, 3, 1).reshape(-1, hidden.shape[1])


def _join(counts: list[int], x: torch.Tensor, y: torch.Tensor, scatter: torch.Tensor) -> Moments:
    exact = sums_type(x)
    counts = torch.tensor(counts, dtype=exact, device=x.device)
    return Moments(*join_moments(counts, x.to(exact), y.to(exact), scatter.to(exact)))
