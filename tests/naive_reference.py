"""
The reference network in evaluation, written once more and differently: plain functions over a state dict with the
reference's names, straight from the facts in the golden files' description. What the package must equal at sizes for
which there are no golden numbers.
"""

import torch
from torch.nn import functional as F


def naive_logits(state: dict[str, torch.Tensor], images: torch.Tensor, heads: int) -> torch.Tensor:
    """Logits (B, K) of a square reference network in evaluation."""
    tokens = _embed(state, images)
    previous, layer = None, 0
    while f"blocks.{layer}.norm1.weight" in state:
        tokens, previous = _layer(state, f"blocks.{layer}.", tokens, previous, heads)
        layer += 1
    tokens = F.layer_norm(tokens, tokens.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    logits = tokens[:, 0] @ state["head.weight"].T + state["head.bias"]
    if "aux_head.weight" in state:
        patches = tokens[:, 1:] @ state["aux_head.weight"].T + state["aux_head.bias"]
        logits = logits + 0.5 * patches.max(dim=1).values
    return logits


def _bn(state, name, x):
    mean, var = state[name + ".running_mean"], state[name + ".running_var"]
    scale = state[name + ".weight"] / torch.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + state[name + ".bias"][:, None, None]


def _embed(state, images):
    x = images
    if "patch_embed.conv1.weight" in state:
        for i, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], start=1):
            x = F.conv2d(x, state[f"patch_embed.conv{i}.weight"], stride=stride, padding=padding)
            x = torch.relu(_bn(state, f"patch_embed.bn{i}", x))
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    patches = x.flatten(2).transpose(1, 2)
    return torch.cat([state["cls_token"].expand(len(images), -1, -1), patches], 1) + state["pos_embed"]


def _layer(state, name, x, previous, heads):
    width = x.shape[-1]
    y = F.layer_norm(x / 2, (width,), state[name + "norm1.weight"], state[name + "norm1.bias"], 1e-6)
    branch, previous = _attention(state, name + "attn.", y, previous, heads)
    x = x + 2 * branch
    y = F.layer_norm(x / 2, (width,), state[name + "norm2.weight"], state[name + "norm2.bias"], 1e-6)
    y = F.gelu(y @ state[name + "mlp.fc1.weight"].T + state[name + "mlp.fc1.bias"])
    y = (y @ state[name + "mlp.fc2.weight"].T + state[name + "mlp.fc2.bias"]) * state[name + "mlp.scale_channel"]
    return x + 2 * y, previous


def _attention(state, name, x, previous, heads):
    batch, count, width = x.shape
    depth = width // heads
    packed = x @ state[name + "qkv.weight"].T + state[name + "qkv.bias"]
    parts = packed.reshape(batch, count, -1, heads, depth).permute(2, 0, 3, 1, 4)
    value = parts[-1]
    refines = name + "adapt_bn.weight" in state
    if len(parts) == 1:  # shares the map of the layer before
        used, passed_on = _refine(state, name, previous) / depth**0.5, previous
    else:
        used = (torch.einsum("bhnd,bhmd->bhnm", parts[0], parts[1]) / depth**0.5).softmax(-1)
        if previous is not None:
            used = used + previous / depth**0.5
        used = passed_on = _refine(state, name, used) if refines else used
    mixed = torch.einsum("bhnm,bhmd->bnhd", used, value).reshape(batch, count, width)
    return mixed @ state[name + "proj.weight"].T + state[name + "proj.bias"], passed_on


def _refine(state, name, maps):
    dla = name + "DLA."
    if dla + "conv.weight" in state:
        kernel = state[dla + "conv.weight"]
        refined = F.conv2d(maps, kernel, padding=kernel.shape[-1] // 2)
    else:
        h = maps
        if dla + "conv_exp.weight" in state:
            h = F.conv2d(h, state[dla + "conv_exp.weight"])
            h = _bn(state, dla + "bn1", h).clamp(0, 6)
        kernel = state[dla + "depth_sep_conv.weight"]
        h = F.conv2d(h, kernel, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
        h = _bn(state, dla + "bn2", h).clamp(0, 6)
        refined = _bn(state, dla + "bn3", F.conv2d(h, state[dla + "conv_pro.weight"])) + maps
    return _bn(state, name + "adapt_bn", refined)


def random_reference(  # noqa: C901 - the functions inside count
    *, layers: int, width: int, heads: int, image_size: int = 224, patch_size: int = 16, labels: int = 1000,
    types: tuple[str, ...] = ("plain", "shared"), ratio: int = 3, dense: bool = True, stem: bool = True,
    convolution_only: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A state dict with the reference's names, every tensor random and every norm away from its initial state."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    state = {
        "cls_token": normal(1, 1, width, std=0.1),
        "pos_embed": normal(1, 1 + (image_size // patch_size) ** 2, width, std=0.1),
    }

    def linear(name, out, inputs):
        state[name + ".weight"], state[name + ".bias"] = normal(out, inputs, std=inputs**-0.5), normal(out, std=0.1)

    def norm(name, channels, batch=False, mean=0.0, var=1.0):
        state[name + ".weight"] = 1 + normal(channels, std=0.1)
        state[name + ".bias"] = normal(channels, std=0.1)
        if batch:
            state[name + ".running_mean"] = mean + normal(channels, std=abs(mean) + 0.01 * var**0.5)
            state[name + ".running_var"] = var * (1 + torch.rand(channels, generator=generator))
            state[name + ".num_batches_tracked"] = torch.tensor(7)

    if stem:
        for i, (out, inputs, kernel) in enumerate([(32, 3, 7), (64, 32, 3), (128, 64, 3)], start=1):
            state[f"patch_embed.conv{i}.weight"] = normal(
                out, inputs, kernel, kernel, std=(inputs * kernel**2) ** -0.5
            )
            norm(f"patch_embed.bn{i}", out, batch=True)
    kernel, channels = (patch_size // 2, 128) if stem else (patch_size, 3)
    state["patch_embed.proj.weight"] = normal(width, channels, kernel, kernel, std=(channels * kernel**2) ** -0.5)
    state["patch_embed.proj.bias"] = normal(width, std=0.1)
    for layer in range(layers):
        name, kind = f"blocks.{layer}.", types[layer % len(types)]
        norm(name + "norm1", width)
        norm(name + "norm2", width)
        linear(name + "attn.qkv", width if kind == "shared" else 3 * width, width)
        linear(name + "attn.proj", width, width)
        linear(name + "mlp.fc1", 3 * width, width)
        linear(name + "mlp.fc2", width, 3 * width)
        state[name + "mlp.scale_channel"] = 0.1 * torch.rand(width, generator=generator)
        if kind == "plain":
            continue
        expanded, dla = heads * ratio, name + "attn.DLA."
        if convolution_only:
            state[dla + "conv.weight"] = normal(heads, heads, 3, 3, std=0.1)
        else:
            if ratio > 1:
                state[dla + "conv_exp.weight"] = normal(expanded, heads, 1, 1, std=heads**-0.5)
                norm(dla + "bn1", expanded, batch=True, mean=0.005, var=1e-5)
            state[dla + "depth_sep_conv.weight"] = normal(expanded, 1, 3, 3, std=0.3)
            norm(dla + "bn2", expanded, batch=True)
            state[dla + "conv_pro.weight"] = normal(heads, expanded, 1, 1, std=expanded**-0.5)
            norm(dla + "bn3", heads, batch=True)
        norm(name + "attn.adapt_bn", heads, batch=True)
    norm("norm", width)
    linear("head", labels, width)
    if dense:
        linear("aux_head", labels, width)
    return state
