# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Refiner vision transformers (arXiv 2106.03714) for Hugging Face. Importing this registers the Auto classes.

The model is imported at once. Everything else that is public comes when it is first asked for: it may need packages
that using a model doesn't (`pip install 'refiner_hf[train]'` and the like).
"""

from importlib import import_module
from importlib.metadata import version as version_of
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from packaging.version import Version
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
from .encoder_models_refiner import RefinedConfig
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
from .version import __version__


if TYPE_CHECKING:
    from .conversion.checkpoint import convert_checkpoint
    from .data.digits import digits_splits
    from .data.masking import MaskPatches
    from .demo.app import build_demo
    from .encoders.adapter import RefinementAdapterConfig
    from .encoders.refine import refine
    from .export.graph import export_onnx, quantize_onnx
    from .hub.publish import publish_folder
    from .inspection.analysis import analyze
    from .inspection.attention_views import view_attention
    from .inspection.layer_views import refined_maps, watch_layers
    from .inspection.networks import Network, open_network
    from .prediction.predict import predict
    from .training.arguments import RefinerTrainingArguments
    from .training.norm_statistics_callback import NormStatisticsCallback
    from .training.trainer import RefinerTrainer

AutoConfig.register("refiner", RefinerConfig)
AutoConfig.register("refined", RefinedConfig)
AutoModel.register(RefinerConfig, RefinerModel)
AutoModelForImageClassification.register(RefinerConfig, RefinerForImageClassification)
AutoModelForMaskedImageModeling.register(RefinerConfig, RefinerForMaskedImageModeling)
AutoBackbone.register(RefinerConfig, RefinerBackbone)
AutoImageProcessor.register(
    RefinerConfig,
    image_processor_classes={"torchvision": RefinerImageProcessor, "pil": RefinerImageProcessorPil},
)

if find_spec("peft") and Version(version_of("peft")) >= Version("0.21"):  # PEFT then knows adapters of refinements
    from .encoders import adapter  # noqa: F401

# Where each name lies that is imported when it is first asked for.
_MODULES = {
    "MaskPatches": "data.masking",
    "Network": "inspection.networks",
    "NormStatisticsCallback": "training.norm_statistics_callback",
    "RefinementAdapterConfig": "encoders.adapter",
    "RefinerTrainer": "training.trainer",
    "RefinerTrainingArguments": "training.arguments",
    "analyze": "inspection.analysis",
    "build_demo": "demo.app",
    "convert_checkpoint": "conversion.checkpoint",
    "digits_splits": "data.digits",
    "export_onnx": "export.graph",
    "open_network": "inspection.networks",
    "predict": "prediction.predict",
    "publish_folder": "hub.publish",
    "quantize_onnx": "export.graph",
    "refine": "encoders.refine",
    "refined_maps": "inspection.layer_views",
    "view_attention": "inspection.attention_views",
    "watch_layers": "inspection.layer_views",
}

__all__ = [
    "REFINE_IMPLEMENTATIONS",
    "MaskPatches",
    "Network",
    "NormStatisticsCallback",
    "RefinementAdapterConfig",
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
    "RefinerTrainer",
    "RefinerTrainingArguments",
    "__version__",
    "analyze",
    "build_demo",
    "convert_checkpoint",
    "digits_splits",
    "export_onnx",
    "open_network",
    "predict",
    "publish_folder",
    "quantize_onnx",
    "refine",
    "refined_maps",
    "view_attention",
    "watch_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
