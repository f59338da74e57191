"""The Auto classes and PEFT know this package's classes, in whatever order things are imported."""

import subprocess
import sys

import pytest


CHECK = """
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForMaskedImageModeling, pipeline
config = AutoConfig.for_model(
    "refiner", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
autos = AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling, AutoBackbone
names = [type(auto.from_config(config)).__name__ for auto in autos]
assert names == ["RefinerModel", "RefinerForImageClassification", "RefinerForMaskedImageModeling", "RefinerBackbone"]
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
assert IMAGE_PROCESSOR_MAPPING[type(config)]["pil"].__name__ == "RefinerImageProcessorPil"
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert CONFIG_MAPPING["refined"].__name__ == "RefinedConfig"
from transformers import DINOv3ViTConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
assert DINOv3ViTConfig in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
try:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
except ImportError:
    pass
else:
    assert "REFINEMENT" in PEFT_TYPE_TO_CONFIG_MAPPING
"""
FIRST = [
    "",
    "import transformers",
    "from transformers import pipeline",
    "from transformers import AutoModel",
    "from transformers import AutoImageProcessor",
    "from transformers import Trainer",
    "from transformers import PreTrainedModel",
    "from transformers.image_processing_utils import BaseImageProcessor",
    "import peft",
    "import timm",
    "from refiner_hf import RefinerConfig",
    "from refiner_hf import RefinerForImageClassification",
    "from refiner_hf import RefinerTrainer",
    "from refiner_hf import RefinerImageProcessor",
    "import refiner_hf.encoder_models_refiner",
    "import refiner_hf.encoder_configuration_refiner",
    "from refiner_hf import refine",
    "from refiner_hf import RefinementAdapterConfig",
]


@pytest.mark.parametrize(
    "first", [pytest.param(each, marks=[] if i in (0, 2, 8, 12) else pytest.mark.slow) for i, each in enumerate(FIRST)]
)
@pytest.mark.parametrize("order", ["package first", "package last"])
def test_whatever_is_imported_first(first, order):
    lines = ["import refiner_hf", first] if order == "package first" else [first, "import refiner_hf"]
    run = subprocess.run([sys.executable, "-c", "\n".join([*lines, CHECK])], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_reloaded():
    code = "import importlib, refiner_hf; importlib.reload(refiner_hf)"
    run = subprocess.run([sys.executable, "-c", code + CHECK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_module_keeps_its_own_loader():
    """So that its source is still found, by tracebacks and by whatever publishes code."""
    import inspect

    import refiner_hf.modeling_refiner as module

    assert "exec_module" not in vars(module.__spec__.loader)
    assert inspect.getsource(module.RefinerModel).startswith("class RefinerModel")
