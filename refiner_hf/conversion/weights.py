"""Names, shapes and architecture: a reference state dict in, a [`RefinerConfig`] and this package's state dict out."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_refiner import RefinerConfig


# The reference's names on the left. `attn.qkv` is split by code, the rest is renamed.
_RENAMES = [
    (r"^cls_token$", r"refiner.embeddings.cls_token"),
    (r"^pos_embed$", r"refiner.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", r"refiner.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.conv(\d)\.", r"refiner.embeddings.patch_embeddings.stem.convolution\1."),
    (r"^patch_embed\.bn(\d)\.", r"refiner.embeddings.patch_embeddings.stem.convolution\1_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"refiner.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"refiner.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"refiner.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.attn\.adapt_bn\.", r"refiner.layers.\1.attention.refinement.output_norm."),
    (r"^blocks\.(\d+)\.attn\.DLA\.conv_exp\.", r"refiner.layers.\1.attention.refinement.expansion."),
    (r"^blocks\.(\d+)\.attn\.DLA\.bn1\.", r"refiner.layers.\1.attention.refinement.expansion_norm."),
    (r"^blocks\.(\d+)\.attn\.DLA\.depth_sep_conv\.", r"refiner.layers.\1.attention.refinement.local_attention."),
    (r"^blocks\.(\d+)\.attn\.DLA\.bn2\.", r"refiner.layers.\1.attention.refinement.local_attention_norm."),
    (r"^blocks\.(\d+)\.attn\.DLA\.conv_pro\.", r"refiner.layers.\1.attention.refinement.reduction."),
    (r"^blocks\.(\d+)\.attn\.DLA\.bn3\.", r"refiner.layers.\1.attention.refinement.reduction_norm."),
    (r"^blocks\.(\d+)\.attn\.DLA\.conv\.", r"refiner.layers.\1.attention.refinement.convolution."),
    (r"^blocks\.(\d+)\.mlp\.(fc[12])\.", r"refiner.layers.\1.mlp.\2."),
    (r"^blocks\.(\d+)\.mlp\.scale_channel$", r"refiner.layers.\1.layer_scale.lambda1"),
    (r"^norm\.", r"refiner.norm."),
    (r"^head\.", r"classifier."),
    (r"^aux_head\.", r"dense_classifier."),
]
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def rename_state_dict(reference: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A reference state dict under this package's names, with the fused projections taken apart. Works on any subset of
    a network's tensors, gradients too.

    Raises:
        `ValueError`: tensors whose names belong to no reference network; they are all named.
    """
    width = _need(reference, "cls_token").shape[-1]
    renamed, unknown = {}, []
    for name, tensor in reference.items():
        if fused := _QKV.match(name):
            layer, kind = fused.groups()
            # A layer that refines the map of the layer before has values only.
            parts = {width: ["v_proj"], 3 * width: ["q_proj", "k_proj", "v_proj"]}.get(tensor.shape[0])
            if parts is None:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; its rows must number {width} (values only) or "
                    f"{3 * width} (queries, keys and values)."
                )
            for part, chunk in zip(parts, tensor.chunk(len(parts))):
                renamed[f"refiner.layers.{layer}.attention.{part}.{kind}"] = chunk.clone()
            continue
        for pattern, replacement in _RENAMES:
            new_name, hits = re.subn(pattern, replacement, name)
            if hits:
                renamed[new_name] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"These tensors belong to no reference Refiner: {', '.join(sorted(unknown))}.")
    return renamed


def read_config(reference: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> RefinerConfig:
    """
    The architecture behind a reference state dict, read from names and shapes.

    Args:
        reference: the state dict.
        num_attention_heads (`int`, *optional*): needed where no layer refines its map, since nothing else shows it.

    Raises:
        `ValueError`: something is missing, contradicts the rest, or has to be given.
    """
    layers = sorted({int(m.group(1)) for name in reference if (m := re.match(r"blocks\.(\d+)\.", name))})
    if not layers:
        raise ValueError("There is no layer in this checkpoint: no tensor's name starts with 'blocks.0.'.")
    missing_layers = sorted(set(range(layers[-1] + 1)) - set(layers))
    if missing_layers:
        raise ValueError(f"The checkpoint has no tensors of layers {missing_layers} ('blocks.{missing_layers[0]}.').")

    hidden_size = _need(reference, "cls_token").shape[-1]
    conv_stem = "patch_embed.conv1.weight" in reference
    projection = _need(reference, "patch_embed.proj.weight").shape
    patch_size = [side * (2 if conv_stem else 1) for side in projection[2:]]
    first_conv = reference["patch_embed.conv1.weight"] if conv_stem else reference["patch_embed.proj.weight"]

    patches = _need(reference, "pos_embed").shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"pos_embed has {patches} patches, which is no square grid: the reference knows no other.")

    return RefinerConfig(
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        intermediate_size=_need(reference, "blocks.0.mlp.fc1.weight").shape[0],
        image_size=_square([side * pixels for pixels in patch_size]),
        patch_size=_square(patch_size),
        num_channels=first_conv.shape[1],
        qkv_bias="blocks.0.attn.qkv.bias" in reference,
        use_conv_stem=conv_stem,
        use_dense_head="aux_head.weight" in reference,
        num_labels=_need(reference, "head.weight").shape[0],
        **_read_refinement(reference, layers, hidden_size, num_attention_heads),
    )


def _read_refinement(
    reference: Mapping[str, torch.Tensor], layers: list[int], hidden_size: int, num_attention_heads: int | None
) -> dict[str, Any]:
    types = []
    for layer in layers:
        rows = _need(reference, f"blocks.{layer}.attn.qkv.weight").shape[0]
        if not any(
            name.startswith((f"blocks.{layer}.attn.DLA.", f"blocks.{layer}.attn.adapt_bn.")) for name in reference
        ):
            types.append("plain")
        else:
            types.append("shared_refined" if rows == hidden_size else "refined")
    fields: dict[str, Any] = {"attention_types": types}

    refining = [layer for layer, attention_type in zip(layers, types) if attention_type != "plain"]
    if not refining:
        if num_attention_heads is None:
            raise ValueError(
                "No layer of this checkpoint refines its map, so the number of attention heads can't be read from "
                "it. Give it: --num_attention_heads N."
            )
        return {**fields, "num_attention_heads": num_attention_heads}

    attention = f"blocks.{refining[0]}.attn."
    heads = _need(reference, attention + "adapt_bn.weight").shape[0]
    if num_attention_heads not in (None, heads):
        raise ValueError(f"The checkpoint has {heads} attention heads, not {num_attention_heads}.")
    fields["num_attention_heads"] = heads
    if (convolution := reference.get(attention + "DLA.conv.weight")) is not None:
        return {**fields, "refinement": "convolution", "refinement_kernel_size": convolution.shape[-1]}
    fields["expansion_ratio"] = _need(reference, attention + "DLA.conv_pro.weight").shape[1] // heads
    if (local := reference.get(attention + "DLA.depth_sep_conv.weight")) is None:
        return {**fields, "refinement": "expansion"}
    return {**fields, "refinement": "expansion_convolution", "refinement_kernel_size": local.shape[-1]}


def check_tensors(renamed: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """
    Raises a `ValueError` that names every missing, unexpected and misshapen tensor of `renamed` against `expected`.
    """
    problems = []
    if missing := sorted(expected.keys() - renamed.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(renamed.keys() - expected.keys()):
        problems.append(f"unexpected: {', '.join(unexpected)}")
    misshapen = [
        f"{name} has shape {tuple(renamed[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & renamed.keys())
        if renamed[name].shape != expected[name].shape
    ]
    if misshapen:
        problems.append(f"misshapen: {'; '.join(misshapen)}")
    if problems:
        raise ValueError(
            "The checkpoint's tensors don't make the network that its names and shapes describe (names as in this "
            "package). " + ". ".join(problems) + "."
        )


def _need(reference: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in reference:
        raise ValueError(f"The checkpoint has no tensor {name!r}: it isn't a reference Refiner's.")
    return reference[name]


def _square(sides: list[int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else sides
