"""
Linear CKA between the features of all layers, from minibatches (Kornblith et al., 2019; Nguyen et al., 2021).

Each layer's features enter as the products between a minibatch's images, (n, n): however wide the layers are, nothing
else is kept. The estimate of HSIC is the unbiased one (Song et al., 2012), so that minibatches may be small.
"""

import math

import torch


SMALLEST = 4  # images for which the unbiased estimate exists


def gram_matrix(features: torch.Tensor) -> torch.Tensor:
    """
    The products between images.

    Args:
        features (`torch.Tensor` of shape (n, ...)): one layer's, of a minibatch.

    Returns:
        `torch.Tensor` of shape (n, n), float64.
    """
    flat = features.flatten(1).float()
    # The estimate is the same with or without the mean; what remains after it has more digits.
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double()


def unbiased_hsic(grams: torch.Tensor) -> torch.Tensor:
    """
    HSIC between all pairs.

    Args:
        grams (`torch.Tensor` of shape (K, n, n)): from [`gram_matrix`], n at least 4.

    Returns:
        `torch.Tensor` of shape (K, K).

    Raises:
        `ValueError`: fewer than 4 images.
    """
    n = grams.shape[-1]
    if n < SMALLEST:
        raise ValueError(f"An unbiased HSIC needs at least {SMALLEST} images, got {n}.")
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows = grams.sum(-1)  # (K, n)
    sums = rows.sum(-1)  # (K,)
    flat = grams.flatten(1)
    return (flat @ flat.T + torch.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (
        n * (n - 3)
    )


class MinibatchCKA:
    """Adds up minibatches; `result` at any time."""

    def __init__(self) -> None:
        self.hsics: list[torch.Tensor] = []

    def add(self, grams: torch.Tensor) -> None:
        """A minibatch's products in all K layers, (K, n, n)."""
        self.hsics.append(unbiased_hsic(grams))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        CKA between all pairs of layers and its standard error (jackknife over the minibatches; NaN with one), both
        (K, K).
        """
        hsics = torch.stack(self.hsics)
        count = len(hsics)
        whole = _cka(hsics.mean(0))
        if count == 1:
            return whole, torch.full_like(whole, math.nan)
        without = torch.stack([_cka((hsics.sum(0) - each) / (count - 1)) for each in hsics])
        return whole, ((count - 1) * without.var(0, correction=0)).sqrt()


def _cka(hsic: torch.Tensor) -> torch.Tensor:
    own = hsic.diagonal().clamp_min(0).sqrt()
    return hsic / torch.outer(own, own)
