# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Refiner vision transformers (arXiv 2106.03714) for Hugging Face. Importing this registers the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
)

from .attention_refiner import REFINE_IMPLEMENTATIONS
from .configuration_refiner import RefinerConfig
from .conversion.vit import refine_vit
from .image_processing_pil_refiner import RefinerImageProcessorPil
from .image_processing_refiner import RefinerImageProcessor
from .modeling_refiner import (
    RefinerBackbone,
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerImageClassifierOutput,
    RefinerModel,
    RefinerModelOutput,
    RefinerPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("refiner", RefinerConfig)
AutoModel.register(RefinerConfig, RefinerModel)
AutoModelForImageClassification.register(RefinerConfig, RefinerForImageClassification)
AutoModelForMaskedImageModeling.register(RefinerConfig, RefinerForMaskedImageModeling)
AutoBackbone.register(RefinerConfig, RefinerBackbone)
AutoImageProcessor.register(
    RefinerConfig,
    image_processor_classes={"torchvision": RefinerImageProcessor, "pil": RefinerImageProcessorPil},
)

__all__ = [
    "REFINE_IMPLEMENTATIONS",
    "RefinerBackbone",
    "RefinerConfig",
    "RefinerForImageClassification",
    "RefinerForMaskedImageModeling",
    "RefinerImageClassifierOutput",
    "RefinerImageProcessor",
    "RefinerImageProcessorPil",
    "RefinerModel",
    "RefinerModelOutput",
    "RefinerPreTrainedModel",
    "refine_vit",
]
