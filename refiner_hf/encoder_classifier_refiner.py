# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
A classifier for DINOv3, of which transformers has the encoder only.

As DINOv2's own: a linear layer on the class token beside the mean of the patches' tokens.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils.generic import can_return_tuple


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """
    [`~transformers.DINOv3ViTModel`] with a classifier. [`~transformers.AutoModelForImageClassification`] finds it in a
    process that has imported this package.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DINOv3ViTModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape (B, channels, height, width)).
            labels (`torch.Tensor` of shape (B,), *optional*): numbers of labels, or what `config.problem_type` says.
            kwargs: as [`~transformers.DINOv3ViTModel.forward`].

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: logits (B, K), and a loss where there are labels.
        """
        outputs = self.model(pixel_values, **kwargs)
        tokens = outputs.last_hidden_state
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        logits = self.classifier(torch.cat((tokens[:, 0], patches.mean(1)), 1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


if DINOv3ViTConfig not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
    # Its own function for this ignores the library's configurations, and doesn't say so (in 5.17 without exception).
    AutoModelForImageClassification._model_mapping._extra_content[DINOv3ViTConfig] = DINOv3ViTForImageClassification
