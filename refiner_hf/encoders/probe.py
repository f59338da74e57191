"""Which attention modules a model has, found by running it once with an attention function that takes notes."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..encoder_attention_refiner import attend, visible
from ..utils.modes import in_evaluation


_PROBE = "refinement_probe"  # an `attn_implementation`
# What models hand to an attention function beside what ours takes, and what changes nothing in an eager one.
_HARMLESS = {
    "is_causal", "sliding_window", "deterministic", "output_attentions", "output_hidden_states", "return_dict",
    "use_cache", "position_ids", "cache_position", "num_items_in_batch", "position_embeddings", "cu_seq_lens_q",
    "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "max_seqlen", "cache", "past_key_values",
}  # fmt: skip
_KNOWN = {"scaling", "dropout", "position_bias"}


class SeenAttention(NamedTuple):
    """An attention module that ran: its heads, their width, and why its maps can't be refined, or `None`."""

    module: nn.Module
    heads: int
    head_width: int
    obstacle: str | None


_seen: ContextVar[list[SeenAttention]] = ContextVar("seen")


def find_attention(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, SeenAttention]:
    """
    The attention modules of a model by name, in the order in which they run, and why any can't be refined.

    Args:
        model: its attention function is exchanged while it runs once, without gradients, as it is in evaluation.
        inputs: of its forward.
    """
    before = model.config._attn_implementation
    with _watching() as seen, in_evaluation(model), torch.no_grad():
        try:
            model.set_attn_implementation(_PROBE)
            model(**inputs)
        finally:
            model.set_attn_implementation(before)
    names = {module: name for name, module in model.named_modules()}
    return {names[each.module]: each for each in seen}


@contextmanager
def _watching() -> Iterator[list[SeenAttention]]:
    seen: list[SeenAttention] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def _probe(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    obstacle = _obstacle(module, query, key, attention_mask, kwargs)
    _seen.get().append(SeenAttention(module, query.shape[1], value.shape[3], obstacle))
    known = {name: value for name, value in kwargs.items() if name in _KNOWN}
    return attend(module, getattr(module, "refinement", None), query, key, value, attention_mask, **known)


AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, eager_mask)


def _obstacle(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> str | None:
    if query.shape[2] != key.shape[2]:
        return (
            "it looks at other tokens than its own (cross attention), so its map isn't one of tokens with themselves"
        )
    causal = kwargs.get("is_causal")
    if getattr(module, "is_causal", False) if causal is None else causal:
        return "it is a decoder's, and a refined map would look ahead"
    if mask is not None and query.shape[2] > 1 and mask.shape[-2] > 1:
        if not visible(mask).triu(1).any():
            return "its mask lets no token look ahead, as a decoder's, and a refined map would look ahead"
    if unknown := sorted(
        name for name, value in kwargs.items() if value is not None and name not in _HARMLESS | _KNOWN
    ):
        return f"it hands on {', '.join(unknown)}, of which it isn't known what becomes of the map"
    return None
