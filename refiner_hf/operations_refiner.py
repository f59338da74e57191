# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the fast implementations do, as operations of torch: compilers take each as it is, profilers show it by name, and
counters of operations know what it is worth.
"""

from collections.abc import Callable, Sequence
from itertools import count
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _free_namespace() -> str:
    """The package's name; where a model's code from the Hub runs beside the package, one with a number."""
    names = (f"refiner_hf{number or ''}" for number in count())
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "blocked_refine"))


_NAMESPACE = _free_namespace()


def operation(schema: str, fake: Callable[..., Any], flops: Callable[..., int]) -> Callable[[Callable[..., Any]], Any]:
    """
    A decorator that makes a function an operation, on every device.

    Args:
        schema (`str`): name, arguments and results as torch writes them.
        fake: the same function for tensors that have only a shape.
        flops: from the arguments, with shapes in place of tensors, to additions and multiplications. What is computed
            again isn't counted.
    """
    name, _, signature = schema.partition("(")

    def define(function: Callable[..., Any]) -> Any:
        torch.library.define(f"{_NAMESPACE}::{name}", f"({signature}")
        torch.library.impl(f"{_NAMESPACE}::{name}", "default", function)
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake)
        packet = getattr(getattr(torch.ops, _NAMESPACE), name)
        register_flop_formula(packet)(lambda *arguments, **results: flops(*arguments))
        return packet.default

    return define


def products_of_weights(map_shape: torch.Size, weight_shapes: Sequence[torch.Size | None]) -> int:
    """Additions and multiplications of a refinement's convolutions, which have the weights of four dimensions."""
    batch, _, rows, columns = map_shape
    convolutions = [shape for shape in weight_shapes if shape is not None and len(shape) == 4]
    return 2 * batch * rows * columns * sum(map(prod, convolutions))


def like_the_map(attention_map: torch.Tensor, *others: Any) -> torch.Tensor:
    """The fake form of an operation whose result is a map as its first argument is."""
    return torch.empty_like(attention_map, memory_format=torch.contiguous_format)


def side_by_side(heads: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) -> (B, N, H D), which is how a layer's projections come."""
    return heads.transpose(1, 2).flatten(2).contiguous()


def refine_operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """
    As [`operation`], for a function that refines a map in evaluation. It takes the map, a mask or `None`, weights and
    eps as [`~folding_refiner.operands_of`] gives them, and a factor on the result.
    """
    return operation(
        f"{name}_refine(Tensor map, Tensor? mask, Tensor?[] weights, float[] eps, float scale) -> Tensor",
        fake=like_the_map,
        flops=lambda map_shape, mask, weight_shapes, *others: products_of_weights(map_shape, weight_shapes),
    )
