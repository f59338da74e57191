"""A classifier's logits as probabilities."""

import torch
from transformers import PreTrainedConfig


def probabilities(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    Logits (B, K) to each label's probability, (B, K): shares of 1, or where an image may have any number of labels, or
    there is only one, each for itself; a regression's numbers stay. As in transformers' pipeline.
    """
    if config.problem_type == "regression":
        return logits
    one_of_many = config.problem_type != "multi_label_classification" and logits.shape[-1] > 1
    return logits.softmax(-1) if one_of_many else logits.sigmoid()
