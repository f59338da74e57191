# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Refiner vision transformers (arXiv 2106.03714) for Hugging Face. Importing this registers the Auto classes.

All that is public comes when it is first asked for: torch and transformers' models take seconds to import, and some of
it needs packages that using a model doesn't (`pip install 'refiner_hf[train]'` and the like).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register
from .version import __version__


if TYPE_CHECKING:
    from .attention_refiner import REFINE_IMPLEMENTATIONS
    from .configuration_refiner import RefinerConfig
    from .conversion.checkpoint import convert_checkpoint
    from .data.digits import digits_splits
    from .data.masking import MaskPatches
    from .demo.app import build_demo
    from .encoders.adapter import RefinementAdapterConfig
    from .encoders.refine import refine
    from .export.graph import export_onnx
    from .export.quantize import quantize_onnx
    from .hub.publish import publish_folder
    from .image_processing_pil_refiner import RefinerImageProcessorPil
    from .image_processing_refiner import RefinerImageProcessor
    from .inspection.analysis import analyze
    from .inspection.attention_views import view_attention
    from .inspection.layer_views import refined_maps, watch_layers
    from .inspection.networks import Network, open_network
    from .modeling_refiner import (
        RefinerBackbone,
        RefinerForImageClassification,
        RefinerForMaskedImageModeling,
        RefinerImageClassifierOutput,
        RefinerModel,
        RefinerModelOutput,
        RefinerPreTrainedModel,
    )
    from .prediction.predict import predict
    from .training.arguments import RefinerTrainingArguments
    from .training.norm_statistics_callback import NormStatisticsCallback
    from .training.trainer import RefinerTrainer

register()

# Where each name lies that is imported when it is first asked for.
_MODULES = {
    "REFINE_IMPLEMENTATIONS": "attention_refiner",
    "MaskPatches": "data.masking",
    "Network": "inspection.networks",
    "NormStatisticsCallback": "training.norm_statistics_callback",
    "RefinementAdapterConfig": "encoders.adapter",
    "RefinerBackbone": "modeling_refiner",
    "RefinerConfig": "configuration_refiner",
    "RefinerForImageClassification": "modeling_refiner",
    "RefinerForMaskedImageModeling": "modeling_refiner",
    "RefinerImageClassifierOutput": "modeling_refiner",
    "RefinerImageProcessor": "image_processing_refiner",
    "RefinerImageProcessorPil": "image_processing_pil_refiner",
    "RefinerModel": "modeling_refiner",
    "RefinerModelOutput": "modeling_refiner",
    "RefinerPreTrainedModel": "modeling_refiner",
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
    "quantize_onnx": "export.quantize",
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
