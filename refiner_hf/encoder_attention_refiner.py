# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Refinement of the attention maps of transformers' own encoders (section 3 of the paper).

transformers looks up attention functions by name, and with each of them the function that makes its mask. The one here
does what a model's own eager attention does, and refines the map of every attention module that has a `refinement`. So
no model is copied or changed, whatever its head.

Shapes: B batch, H heads, N tokens, D width of a head.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from .attention_refiner import RefinerMapRefinement
from .configuration_refiner import RefinerConfig
from .refinements_refiner import make_refinement


REFINED_ATTENTION = "refined"  # an `attn_implementation`


def refined_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention whose map `module.refinement` refines; where that is `None`, it is a model's own eager attention.

    Args:
        module: the attention module.
        query, key, value (`torch.Tensor` of shape (B, H, N, D)): as the module made them.
        attention_mask (`torch.Tensor`, *optional*): what is added to the scores, (B or 1, H or 1, N or 1, N), very
            negative where a query must not look; or booleans, false there.
        scaling (`float`, *optional*): of the scores, by default 1 / sqrt(D).
        dropout (`float`, *optional*, defaults to 0.0): of the map, in training.
        position_bias (`torch.Tensor`, *optional*): is added to the scores as well.

    Returns:
        the output (B, N, H, D), and the map that weighted the values (B, H, N, N), or (B, E, N, N) where that has E
            heads.

    Raises:
        `RuntimeError`: the module has no such attribute: a refined model was loaded as another class.
    """
    if not hasattr(module, "refinement"):
        raise RuntimeError(
            f"A {type(module).__name__} was loaded without its refinement. Load the model with an Auto class, such as "
            "AutoModelForImageClassification, after `import refiner_hf`."
        )
    return attend(module, module.refinement, query, key, value, attention_mask, scaling, dropout, position_bias)


AttentionInterface.register(REFINED_ATTENTION, refined_attention)
AttentionMaskInterface.register(REFINED_ATTENTION, eager_mask)  # without it, models would make no mask at all


def attend(
    module: nn.Module,
    refinement: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`refined_attention`], with a refinement that is given."""
    if key.shape[1] != query.shape[1]:  # several queries' heads share a key's
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    if refinement is not None:
        scores = refinement.refine_scores(scores)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    attention_map = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    attention_map = nn.functional.dropout(attention_map, dropout, module.training)
    if refinement is not None:
        mask = real_pairs(attention_mask, attention_map)
        attention_map, value = refinement(attention_map, mask=mask), refinement.refine_values(value, mask)
    output = (attention_map @ value).transpose(1, 2)  # (B, N, H, D); of more maps than heads, each has less than D
    return output.reshape(*output.shape[:2], query.shape[1], -1).contiguous(), attention_map


_PAIRS: MutableMapping = WeakTensorKeyDictionary()  # by mask, which all layers share


def real_pairs(attention_mask: torch.Tensor | None, attention_map: torch.Tensor) -> torch.Tensor | None:
    """
    Where a real query may look at a real key: (B, 1, N, N) of booleans, or `None` where that is everywhere.

    A token is real if it may look at itself: at padding nobody looks. Masks say nothing of padded queries; but a map's
    row and column of the same number are of one token.
    """
    if attention_mask is None:
        return None
    if torch.compiler.is_compiling():
        return _pairs(attention_mask, attention_map)
    version = None if attention_mask.is_inference() else attention_mask._version
    if attention_mask not in _PAIRS or _PAIRS[attention_mask][0] != version:
        pairs = _pairs(attention_mask, attention_map)
        _PAIRS[attention_mask] = version, None if pairs.all() else pairs
    return _PAIRS[attention_mask][1]


def _pairs(attention_mask: torch.Tensor, attention_map: torch.Tensor) -> torch.Tensor:
    batch, _, tokens, _ = attention_map.shape
    pairs = visible(attention_mask).any(1, keepdim=True).expand(batch, 1, tokens, tokens)
    real = pairs.diagonal(dim1=-2, dim2=-1)
    return pairs & real[..., None] & real[..., None, :]


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Where queries may look, as booleans."""
    # The bound is far below biases of positions.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attach_refinement(module: nn.Module, config: RefinerConfig) -> RefinerMapRefinement:
    """Gives an attention module its refinement, in the module's mode, type and place."""
    like = next(module.parameters())
    module.refinement = make_refinement(config).to(like.device, like.dtype).train(module.training)
    return module.refinement
