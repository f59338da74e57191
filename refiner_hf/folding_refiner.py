# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""The refinement in evaluation with every batch norm folded into the weights before it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

from .normalization_refiner import RefinerBatchNorm2d


NORMS = ("expansion_norm", "local_attention_norm", "reduction_norm", "output_norm")


class Expansion(NamedTuple):
    """h1 = relu6(weight A + bias): the first norm folded into the attention expansion."""

    weight: torch.Tensor  # (E, H)
    bias: torch.Tensor  # (E,)


class Local(NamedTuple):
    """weight * h1 + bias: the distributed local attention with all or a part of the second norm folded into it."""

    weight: torch.Tensor  # (E, 1, k, k)
    bias: torch.Tensor  # (E,)


class Folded(NamedTuple):
    """
    reduction relu6(local(h1)) + identity A + constant: what is left of a refinement in evaluation. Without expansion
    h1 is the map, without local attention relu6(local(h1)) is h1.
    """

    expansion: Expansion | None
    local: Local | None
    reduction: torch.Tensor  # (H, E)
    identity: torch.Tensor  # (H,)
    constant: torch.Tensor  # (H,)


def operands_of(refinement: nn.Module, statistics: bool = True) -> tuple[list[torch.Tensor | None], list[float]]:
    """
    What the operations on a refinement's maps take: the weights of its three convolutions, then of each norm in
    [`NORMS`] weight, bias, running mean and running variance; and the norms' eps. `None` (and an eps of 0) stands for
    what it doesn't have, and without `statistics` for these.
    """
    norms: dict[str, Any] = named_norms_of(refinement)
    convolutions = (refinement._modules.get(name) for name in ("expansion", "local_attention", "reduction"))
    operands = [None if convolution is None else convolution.weight for convolution in convolutions]
    for name in NORMS:
        norm = norms.get(name)
        operands += 2 * [None] if norm is None else [norm.weight, norm.bias]
        operands += 2 * [None] if norm is None or not statistics else [norm.running_mean, norm.running_var]
    return operands, [norms[name].eps if name in norms else 0.0 for name in NORMS]


def fold(
    weights: Sequence[torch.Tensor | None], eps: Sequence[float], dtype: torch.dtype, scale: float = 1.0
) -> Folded:
    """
    Folds a refinement's norms, with the weights and statistics as they are now. It takes a few dozen operations on
    short vectors and is done at each call, so that no change of a weight is missed. (A version counter doesn't see an
    edit of `weight.data`.)

    Args:
        weights, eps: of any refinement but a `"convolution"`, as [`operands_of`] gives them.
        dtype: the type to compute in.
        scale: a factor on the result.
    """
    w1, w2, w3, *vectors = weights
    norms = {i: vectors[4 * i : 4 * i + 4] for i in range(len(NORMS)) if vectors[4 * i] is not None}
    # All norms together: on a GPU, each operation on a short vector costs as much as one on them all.
    gains, biases, means = (torch.cat([norm[i] for norm in norms.values()]).to(dtype) for i in range(3))
    gains = gains * torch.cat([norm[3].to(dtype) + eps[i] for i, norm in norms.items()]).rsqrt()
    biases = torch.addcmul(biases, gains, means, value=-1)
    sizes = [len(norm[0]) for norm in norms.values()]
    affine = dict(zip(norms, zip(gains.split(sizes), biases.split(sizes))))

    expansion = local = None
    if w1 is not None:
        gain, bias = affine[0]
        expansion = Expansion(gain[:, None] * w1.flatten(1).to(dtype), bias)
    if w2 is not None:
        gain, bias = affine[1]
        local = Local(gain[:, None, None, None] * w2.to(dtype), bias)
    gain, bias = affine[2]
    output_gain, output_bias = (scale * vector for vector in affine[3])
    reduction = (output_gain * gain)[:, None] * w3.flatten(1).to(dtype)
    return Folded(expansion, local, reduction, output_gain, torch.addcmul(output_bias, output_gain, bias))


def arithmetic_type(tensor: torch.Tensor) -> torch.dtype:
    """The type that maps are refined in: float32, and float64 where they are that already."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norms_of(refinement: nn.Module) -> list[nn.Module]:
    """The norms of a refinement in order, those that it has."""
    return list(named_norms_of(refinement).values())


def named_norms_of(refinement: nn.Module) -> dict[str, nn.Module]:
    """[`norms_of`] by name."""
    modules = refinement._modules  # several times as fast as attributes
    return {name: modules[name] for name in NORMS if modules.get(name) is not None}


def cast_together(tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Small tensors in another type, as views of one; it takes as many operations for many as for one."""
    given = [tensor for tensor in tensors if tensor is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in given]).to(dtype)
    pieces = iter(flat.split([tensor.numel() for tensor in given]))
    return [None if tensor is None else next(pieces).view(tensor.shape) for tensor in tensors]


def needs_training_form(refinement: nn.Module, attention_map: torch.Tensor) -> bool:
    """Whether a call needs batch statistics or gradients, so that folding isn't enough."""
    return any(norm.training for norm in norms_of(refinement)) or (
        torch.is_grad_enabled()
        and (attention_map.requires_grad or any(weight.requires_grad for weight in _weights_of(refinement)))
    )


def _weights_of(refinement: nn.Module) -> Iterator[torch.Tensor]:
    # Not parameters(): the replicas that nn.DataParallel makes have none, only tensors in their place.
    for module in refinement.children():
        yield from (weight for weight in (module.weight, module.bias) if weight is not None)


def fold_convolution(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that is one without bias and, in evaluation, the norm after it."""
    weight = convolution.weight
    gain, bias = as_affine(norm, arithmetic_type(weight))
    return (gain[:, None, None, None] * weight).to(weight.dtype), bias.to(weight.dtype)


def can_bypass(*modules: nn.Module | None) -> bool:
    """
    Whether convolutions and the norms after them may be replaced by arithmetic on their weights: they are as this
    package made them, the convolution without a bias, and [`is_untouched`].
    """
    return all(
        is_untouched(module)
        and (module.bias is None if isinstance(module, nn.Conv2d) else module.affine and module.track_running_stats)
        for module in modules
        if module is not None
    )


def is_untouched(module: nn.Module) -> bool:
    """
    Whether a convolution or norm needn't be called: it is no adapter around one, and has no hook, neither a user's nor
    accelerate's, which loads an offloaded weight when the module is called.
    """
    return type(module) in (nn.Conv2d, RefinerBatchNorm2d) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor as torch makes them: neither quantized nor divided among devices."""
    return type(tensor) in (torch.Tensor, nn.Parameter)


def is_transformed(tensor: torch.Tensor) -> bool:
    """
    Whether the operations on `tensor` are recorded or transformed, and not only computed: by `torch.jit.trace`,
    `torch.export`, `torch.func`, forward-mode differentiation, or on the meta device. These need plain operations.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or tensor.device.type == "meta"
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def as_affine(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm in evaluation as gain x + bias."""
    gain = norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).rsqrt()
    return gain, norm.bias.to(dtype) - gain * norm.running_mean.to(dtype)
