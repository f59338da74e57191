"""Scores that say how often they are right: a temperature, fitted after training."""

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from ..utils.heads import head_modules
from .trainer import RefinerTrainer


_RANGE = (0.05, 20.0)  # of temperatures
_ROUNDING = 0.02  # of bfloat16, where the training computes in it


def calibrate(trainer: RefinerTrainer) -> float:
    """
    Divides a trained classifier's logits by the temperature that makes the evaluation images' labels most likely (Guo
    et al., 2017, arXiv 1706.04599). The division goes into the weights of its heads: answers stay, scores change, and
    whoever loads the model gets the new ones.

    Args:
        trainer: with evaluation images of one label each. An average of the weights gets a temperature of its own.

    Returns:
        the temperature: above 1 where the network was too sure of itself.

    Raises:
        `ValueError`: a network whose logits aren't proportional to its heads' weights.
    """
    if trainer.ema is not None:
        raw, trainer.model = trainer.model, trainer.ema.model
        try:
            _calibrate(trainer)
        finally:
            trainer.model = raw
    return _calibrate(trainer)


def _calibrate(trainer: RefinerTrainer) -> float:
    logits, labels = _answers(trainer)
    temperature = fit_temperature(logits, labels)
    _divide_logits(trainer, temperature)
    return temperature


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """
    Args:
        logits: (images, labels).
        labels: (images,), integers.

    Returns:
        the temperature under which the mean cross-entropy is lowest, between 0.05 and 20.
    """
    scores, truth = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels, dtype=torch.long)

    def loss(log_temperature: float) -> float:
        return nn.functional.cross_entropy(scores / np.exp(log_temperature), truth).item()

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_RANGE), method="bounded").x))


def _answers(trainer: RefinerTrainer) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of all evaluation images."""
    images: Any = trainer.eval_dataset
    keep = trainer.preprocess_logits_for_metrics, trainer.compute_metrics
    trainer.preprocess_logits_for_metrics, trainer.compute_metrics = _logits_only, None
    try:
        predicted: Any = trainer.predict(images)
    finally:
        trainer.preprocess_logits_for_metrics, trainer.compute_metrics = keep
    return predicted.predictions, predicted.label_ids


def _logits_only(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _divide_logits(trainer: RefinerTrainer, temperature: float) -> None:
    model: Any = trainer.model
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    pixels = batch["pixel_values"][:2]
    before = _logits(model, pixels)
    with torch.no_grad():
        for parameter in _of_the_heads(model):
            parameter.div_(temperature)
    after = _logits(model, pixels)
    if (after * temperature - before).abs().max() > _ROUNDING * before.abs().max():
        raise ValueError(
            f"The logits of a {type(model).__name__} can't be divided by way of its heads' weights. Leave out "
            "--calibrate."
        )


def _of_the_heads(model: Any) -> list[nn.Parameter]:
    """What makes the logits of the last features: weights and biases of the heads with a row for each label."""
    network = model.get_base_model() if hasattr(model, "peft_config") else model
    heads = tuple(f"{name}." for name in head_modules(network.config, network))
    return [
        parameter
        for name, parameter in network.named_parameters()
        # PEFT keeps a head that is trained beside the one from before.
        if name.startswith(heads) and ".original_module." not in name and len(parameter) == network.config.num_labels
    ]


def _logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(pixel_values=pixels).logits.float()
