"""Optimizers of timm, and learning rates: of layers, of batch sizes, and at the end of a training."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def optimizer_of_timm(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """
    The class of an optimizer of timm, and the options that its name stands for.

    Raises:
        `ValueError`: timm has none of this name.
    """
    from timm.optim import get_optimizer_info  # a package for training, while options are read without it

    try:
        info = get_optimizer_info(name)
    except ValueError as error:
        raise ValueError(
            f"--timm_optim {name}: timm has no optimizer of this name. Among others it has nmuon, adan and lion; all "
            "are listed by: python -c 'import timm; print(timm.optim.list_optimizers())'"
        ) from error
    return info.opt_class, dict(info.defaults or {})


def layerwise_groups(groups: list[dict], model: nn.Module, decay: float) -> list[dict]:
    """
    Parameter groups of an optimizer, divided by layer: the heads and the last norm learn at the full rate, each layer
    before them at `decay` times the rate of the one after it, the embeddings slowest.

    Args:
        groups (`list[dict]`): groups whose `lr` is the full rate.
        model (`nn.Module`): a Refiner or another transformer with a head.
        decay (`float`): above 0, at most 1.
    """
    depths = dict(_depths(model))
    last = max(depths.values())
    divided = []
    for group in groups:
        by_depth: dict[int, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(depths[parameter], []).append(parameter)
        divided += [
            {**group, "params": by_depth[depth], "lr": group["lr"] * decay ** (last - depth)}
            for depth in sorted(by_depth, reverse=True)  # the Trainer logs the first group's rate: the full one
        ]
    return divided


def _depths(model: nn.Module) -> Iterator[tuple[torch.Tensor, int]]:
    """Each parameter with the number of its layer: 0 the embeddings, then the layers, then everything after them."""
    layers = 0
    for name, parameter in model.named_parameters():
        if layer := re.search(r"\blayers?\.(\d+)\.", name):
            layers = max(layers, int(layer[1]) + 1)
            yield parameter, int(layer[1]) + 1
        elif re.search(r"\bembeddings\.", name):
            yield parameter, 0
    for name, parameter in model.named_parameters():
        if not re.search(r"\blayers?\.\d+\.|\bembeddings\.", name):
            yield parameter, layers + 1


def hold_from(scheduler: LRScheduler, step: int) -> None:
    """
    Has a schedule stay from `step` on where it is then (the reference's ten last epochs at the minimum).

    Raises:
        `ValueError`: a schedule that isn't a function of the step, such as one that watches a metric.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(f"--cooldown_steps doesn't go with {type(scheduler).__name__}.")
    # Some of transformers' schedules are at their end one step earlier than others, and would go up again.
    scheduler.lr_lambdas = [
        lambda at, rate=rate: rate(at) if at < step else min(rate(step - 1), rate(step))
        for rate in scheduler.lr_lambdas
    ]


def scaled_learning_rate(rate: float, batch_size: int, meant_for: int | None) -> float:
    """The rate for steps of `batch_size` images, in proportion, where `rate` is meant for another number of them."""
    return rate if meant_for is None else rate * batch_size / meant_for
