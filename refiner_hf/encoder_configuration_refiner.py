# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""What the Auto classes make of the configuration of a refined model of transformers."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class RefinedConfig(PreTrainedConfig):
    """
    What [`~transformers.AutoConfig`] makes of a refined model's `config.json`: the configuration of the model that it
    is made of, with two more fields.

    - `base_model_type` (`str`): the model type of that model.
    - `refinement_config` (`dict`): `refinement`, `expansion_ratio` and `refinement_kernel_size` as in
      [`RefinerConfig`], and `modules`: the name of every attention module with its `num_attention_heads` and
      `hidden_size` where it is refined, else `None`.
    """

    model_type = "refined"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Raises:
            `ValueError`: `base_model_type` is missing or unknown.
        """
        from .encoder_models_refiner import refined_config_class  # which needs the models

        name = config_dict.get("base_model_type")
        if not isinstance(name, str) or name not in CONFIG_MAPPING:
            raise ValueError(f"The configuration says base_model_type={name!r}, which transformers doesn't know.")
        return refined_config_class(CONFIG_MAPPING[name]).from_dict(config_dict, **kwargs)
