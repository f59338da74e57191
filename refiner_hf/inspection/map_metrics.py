"""
Properties of maps and tokens as numbers: one for each image, each a mean over heads and queries.

A refined map is no probability distribution: its rows don't add up to 1, and weights may be negative. Where a metric
needs a distribution, each weight counts by its absolute value, because a negative weight changes a token as well.

Shapes: B images, H heads, N tokens of which the last P = rows * columns are patches, D width.
"""

import math

import torch


def head_similarity(attention_map: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """
    Similarity of a layer's heads: the cosine between two heads' rows for the same query, mean over all pairs.

    Args:
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        centred (`bool`, *optional*): subtract each row's mean first, which makes the cosine a correlation. Two rows of
            positive weights, as softmax gives them, have a cosine well above 0 even where they don't correlate.

    Returns:
        `torch.Tensor` of shape (B,), from -1 / (H - 1) to 1; NaN with one head.
    """
    rows = _directions(attention_map, centred)
    heads = rows.shape[1]
    if heads == 1:
        return torch.full_like(rows[:, 0, 0, 0], math.nan)
    lengths = rows.square().sum((1, 3))  # 1 for each head, but 0 for a row of zeros
    return ((rows.sum(1).square().sum(-1) - lengths) / (heads * (heads - 1))).mean(-1)


def map_entropy(attention_map: torch.Tensor) -> torch.Tensor:
    """
    How widely a query attends: the entropy of a row, divided by that of a uniform row, log N.

    Args:
        attention_map (`torch.Tensor` of shape (B, H, N, N)).

    Returns:
        `torch.Tensor` of shape (B,), from 0 (all weight on one token) to 1 (uniform).
    """
    shares = _shares(attention_map.float())
    return torch.special.entr(shares).sum(-1).mean((1, 2)) / math.log(shares.shape[-1])


def effective_rank(attention_map: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """
    The effective rank of a head's map: the exponential of the entropy of its normalised singular values (Roy and
    Vetterli, 2007).

    Args:
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        centred (`bool`, *optional*): subtract each row's mean first. This removes the direction of uniform attention,
            which dominates a softmax's map and which a batch norm removes anyway.

    Returns:
        `torch.Tensor` of shape (B,), from 1 to N.
    """
    rows = attention_map.float()
    if centred:
        rows = _centred(rows)
    shares = _shares(torch.linalg.svdvals(rows))
    return torch.special.entr(shares).sum(-1).exp().mean(1)


def attention_distance(attention_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Attention distance: the mean distance between the centres of a query's patch and of the patches that it attends to,
    weighted by the map. Tokens that are no patches don't count.

    Args:
        attention_map (`torch.Tensor` of shape (B, H, N, N)).
        grid (`tuple[int, int]`): rows and columns of patches.

    Returns:
        `torch.Tensor` of shape (B,), in patches.
    """
    patches = math.prod(grid)
    shares = _shares(attention_map[..., -patches:, -patches:].float())
    places = torch.cartesian_prod(*(torch.arange(side, dtype=shares.dtype, device=shares.device) for side in grid))
    return (shares * torch.cdist(places, places)).sum(-1).mean((1, 2))


def token_similarity(hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Similarity of the patches' tokens (over-smoothing): the mean cosine between two of them.

    Args:
        hidden_states (`torch.Tensor` of shape (B, N, D)).
        grid (`tuple[int, int]`): rows and columns of patches.

    Returns:
        `torch.Tensor` of shape (B,), from -1 / (P - 1) to 1; NaN with one patch.
    """
    return head_similarity(hidden_states[:, -math.prod(grid) :, None])


def layer_similarity(attention_maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Similarity of the maps of different layers: the cosine between two layers' rows for the same head and query.

    Args:
        attention_maps (`list[torch.Tensor]`): of each layer, (B, H, N, N). Where a layer has expanded heads, several
            of each head in a row, they are compared with that head of the others.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: cosines, and correlations (each row's mean subtracted first), both
        (B, layers, layers).
    """
    heads, tokens = max(each.shape[1] for each in attention_maps), attention_maps[0].shape[2]
    cosines = correlations = attention_maps[0].new_zeros(())
    for head in range(heads):  # one at a time, since stacking copies the maps
        # (B, N, layers, N)
        rows = torch.stack([each[:, head * each.shape[1] // heads] for each in attention_maps], dim=2)
        directions, centred = _directions(rows, False), _directions(rows, True)
        cosines = cosines + (directions @ directions.mT).sum(1)
        correlations = correlations + (centred @ centred.mT).sum(1)
    return cosines / (heads * tokens), correlations / (heads * tokens)


def _directions(rows: torch.Tensor, centred: bool) -> torch.Tensor:
    """Rows scaled to length 1, so that their products are cosines; `centred`, correlations."""
    rows = rows.float()
    if centred:
        rows = _centred(rows)
    return torch.nn.functional.normalize(rows, dim=-1, eps=_EPS)


def _centred(rows: torch.Tensor) -> torch.Tensor:
    """Rows minus their mean; zeros where only rounding errors remain."""
    rest = rows - rows.mean(-1, keepdim=True)
    return torch.where(rest.norm(dim=-1, keepdim=True) > 1e-6 * rows.norm(dim=-1, keepdim=True), rest, 0.0)


def _shares(values: torch.Tensor) -> torch.Tensor:
    values = values.abs()
    return values / values.sum(-1, keepdim=True).clamp_min(_EPS)


_EPS = 1e-20  # for rows of zeros. It is so small because weights of 1e-8 are common.
