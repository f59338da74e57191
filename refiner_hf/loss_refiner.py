# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
The training loss: integer, soft and dense labels, with or without the dense head and token mixing.

Shapes: B batch, K labels, P patches.
"""

from collections.abc import Callable

import torch
from torch import nn

from .choices_refiner import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .configuration_refiner import RefinerConfig
from .token_mixing_refiner import mix_targets


def image_classification_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config: RefinerConfig,
    patch_logits: torch.Tensor | None = None,
    mixing_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `criterion(logits, class target) + dense_loss_weight * criterion(patch_logits, patch targets)`.

    Args:
        labels (`torch.Tensor`): one of

            - integers of shape (B,): cross-entropy;
            - probabilities of shape (B, K): soft cross-entropy (mixup, smoothing, distillation);
            - dense targets of shape (B, K, 2 + P), as the reference's data pipeline makes them: column 0 unused,
              column 1 the class target, the rest one target for each patch, row by row. With no patch columns, or
              with labels of another shape, every patch gets the image's target;
            - what `config.problem_type` says otherwise: (B, K) zeros and ones for `"multi_label_classification"`,
              numbers of shape (B, K), or (B,) with one label, for `"regression"`. An explicit `problem_type` wins over
              what the labels look like.
        logits (`torch.Tensor` of shape (B, K)): class logits.
        config ([`RefinerConfig`]): gives `num_labels`, `problem_type` and `dense_loss_weight`.
        patch_logits (`torch.Tensor` of shape (B, P, K), *optional*): those of the dense head.
        mixing_mask (`torch.BoolTensor` of shape (height, width), *optional*): the box that token mixing swapped.

    Returns:
        `torch.Tensor`, a scalar.

    Raises:
        `ValueError`: labels whose shape, kind or range doesn't fit; the message says what would.
    """
    problem = problem_type_of(labels, config)
    criterion = _CRITERIA[problem]
    class_target, patch_target = _targets(labels, logits, problem, patch_logits)

    mixed_target = class_target
    if mixing_mask is not None:
        if problem == SINGLE_LABEL and class_target.ndim == 1:
            mixed_target = nn.functional.one_hot(class_target, logits.shape[-1])
        mixed_target = mix_targets(mixed_target.float(), mixing_mask)

    loss = criterion(logits, mixed_target)
    if patch_logits is not None:
        if patch_target is None:
            patch_target = class_target[:, None].expand(-1, patch_logits.shape[1], *class_target.shape[1:])
        loss = loss + config.dense_loss_weight * criterion(patch_logits.flatten(0, 1), patch_target.flatten(0, 1))
    return loss


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), target.float() if target.is_floating_point() else target)


def _binary_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), target.float())


def _squared_error(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(logits.float(), target.float())


_CRITERIA: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    SINGLE_LABEL: _cross_entropy,
    MULTI_LABEL: _binary_cross_entropy,
    REGRESSION: _squared_error,
}


def problem_type_of(labels: torch.Tensor, config: RefinerConfig) -> str:
    """
    Which problem labels belong to, as `config.problem_type` says or else by what they look like.

    Raises:
        `ValueError`: several integers an image, which may mean several things.
    """
    if config.problem_type:
        return config.problem_type
    if config.num_labels == 1:
        return REGRESSION
    if labels.ndim > 1 and labels.shape[-1] > 1 and not labels.is_floating_point():
        raise ValueError(
            f"Integer labels of shape {tuple(labels.shape)} are ambiguous. For several labels an image set "
            "config.problem_type='multi_label_classification'; for soft labels pass floating point numbers."
        )
    return SINGLE_LABEL


def _targets(
    labels: torch.Tensor, logits: torch.Tensor, problem: str, patch_logits: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The class target, (B,) or (B, K), and the patches' own, (B, P, K), where the labels have them."""
    batch, num_labels = logits.shape
    if problem == SINGLE_LABEL and labels.numel() == batch and not labels.is_floating_point():
        class_target = labels.reshape(batch).long()
        _check_range(class_target, num_labels)
        return class_target, None
    if problem != SINGLE_LABEL and labels.numel() == batch and num_labels == 1:
        return labels.reshape(batch, 1), None
    if labels.shape == logits.shape:
        return labels.float(), None
    if problem == SINGLE_LABEL and labels.ndim == 3 and labels.shape[:2] == logits.shape and labels.shape[2] >= 2:
        patch_target = labels[:, :, 2:].transpose(1, 2)
        if patch_target.shape[1] == 0 or patch_logits is None:
            return labels[:, :, 1], None
        if patch_target.shape[1] != patch_logits.shape[1]:
            raise ValueError(
                f"Dense labels have targets for {patch_target.shape[1]} patches (shape {tuple(labels.shape)}), the "
                f"model has {patch_logits.shape[1]} patches."
            )
        return labels[:, :, 1], patch_target
    fitting = f"floating point numbers of shape ({batch}, {num_labels})"
    if problem == SINGLE_LABEL:
        fitting = f"integers of shape ({batch},), soft labels of shape ({batch}, {num_labels})"
        fitting += f" or dense ones of shape ({batch}, {num_labels}, 2 + patches)"
    raise ValueError(
        f"Labels of type {labels.dtype} and shape {tuple(labels.shape)} don't fit {problem} of {batch} images with "
        f"{num_labels} labels. Pass {fitting}."
    )


def _check_range(class_target: torch.Tensor, num_labels: int) -> None:
    # Only where looking costs nothing: on a GPU it would wait for the device. -100 is torch's "ignore".
    if class_target.device.type != "cpu" or torch.compiler.is_compiling() or class_target.numel() == 0:
        return
    valid = ((class_target >= 0) & (class_target < num_labels)) | (class_target == -100)
    if not valid.all():
        wrong = sorted(set(class_target[~valid].tolist()))
        raise ValueError(f"Labels must lie in 0..{num_labels - 1} (num_labels={num_labels}), got {wrong}.")
