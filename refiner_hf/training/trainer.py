"""The HF Trainer, with what Refiners need of it."""

import torch
from torch import nn

from ..modeling_refiner import RefinerForMaskedImageModeling
from .pushing import PushingTrainer


# Kept free of weight decay beside everything with fewer than two dimensions (norms, biases, layer scale).
_UNDECAYED = ("cls_token", "mask_token", "position_embeddings")


class RefinerTrainer(PushingTrainer):
    """
    [`~transformers.Trainer`] with these differences:

    - no weight decay on norms, biases, layer scale, class and mask token and positions, as in the reference. The stock
      Trainer decays the last three;
    - an evaluation of masked image modelling has a loss. The stock Trainer looks for labels and finds none;
    - `label_smoothing_factor` becomes soft labels, so that it reaches the dense head and token mixing. The stock
      Trainer would take the model's own loss away and put one on the class logits in its place. Evaluation losses
      are not smoothed;
    - pushing to the Hub as [`~refiner_hf.training.pushing.PushingTrainer`] does it.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith(_UNDECAYED)
        ]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(self.model, RefinerForMaskedImageModeling) and self.args.label_names is None:
            self.label_names = ["bool_masked_pos"]  # without a label, an evaluation would have no loss
        self.label_smoother = None  # `compute_loss` smooths the labels themselves

    def compute_loss(self, model, inputs, *args, **kwargs):
        smoothing = self.args.label_smoothing_factor
        if smoothing and model.training and "labels" in inputs:
            num_labels = self.accelerator.unwrap_model(model).config.num_labels
            inputs = {**inputs, "labels": smooth_labels(inputs["labels"], num_labels, smoothing)}
        return super().compute_loss(model, inputs, *args, **kwargs)


def smooth_labels(labels: torch.Tensor, num_labels: int, smoothing: float) -> torch.Tensor:
    """
    Soft labels (images, labels): `1 - smoothing` on the given ones, `smoothing` spread evenly over all.

    Args:
        labels (`torch.Tensor`): integers (images,) or soft labels (images, labels).
    """
    if not labels.is_floating_point():
        labels = nn.functional.one_hot(labels.long(), num_labels).float()
    return (1 - smoothing) * labels + smoothing / num_labels
