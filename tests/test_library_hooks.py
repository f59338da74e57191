"""
What our classes override of transformers', PEFT's and evaluate's is as it was when we wrote it. A new release that
changes it breaks this test, and not a user's network. (Those of the Trainer: `training/test_trainer_hooks.py`.)
"""

import importlib
import inspect
import pkgutil

from transformers import PreTrainedConfig, PreTrainedModel, Trainer, ViTConfig, ViTModel
from transformers.utils.output_capturing import capture_outputs

import refiner_hf
from refiner_hf.encoder_models_refiner import refined_config_class, refined_model_class


LIBRARIES = ("transformers", "evaluate", "peft")
_STEPS = (
    "images do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean "
    "image_std do_pad pad_size"
)
# What Python and transformers note at a class themselves, the latter while it runs, as other tests have it do.
NOTED = {
    "_abc_impl",
    "_auto_class",
    "_can_set_attn_implementation_cached_value",
    "_can_set_experts_implementation_cached_value",
}
# What is overridden, by the library's class that has it: a method with its parameters, or None for an attribute.
OVERRIDDEN = {
    "PreTrainedConfig": {
        "from_dict": "config_dict kwargs",
        "model_type": None,
        "output_attentions": None,
        "save_pretrained": "save_directory push_to_hub kwargs",
        "to_dict": "",
        "validate": "",
        "validate_output_attentions": "",
    },
    "ViTConfig": {"model_type": None},
    "ViTModel": {"config_class": None},
    "DINOv3ViTPreTrainedModel": {"config_class": None},
    "BackboneConfigMixin": {"out_features": None, "out_indices": None, "to_dict": ""},
    "PreTrainedModel": {
        "_can_compile_fullgraph": None,
        "_can_record_outputs": None,
        "_can_set_attn_implementation": "",
        "_from_config": "config kwargs",
        "_init_weights": "module",
        "_no_split_modules": None,
        "base_model_prefix": None,
        "config_class": None,
        "from_pretrained": "pretrained_model_name_or_path model_args config cache_dir ignore_mismatched_sizes "
        "force_download local_files_only token revision use_safetensors weights_only fusion_config disable_mmap "
        "kwargs",
        "get_correct_attn_implementation": "requested_attention is_init_check",
        "input_modalities": None,
        "main_input_name": None,
        "supports_gradient_checkpointing": None,
    },
    "EmbeddingAccessMixin": {"_input_embed_layer": None},
    "BackboneMixin": {"forward": "pixel_values output_hidden_states output_attentions return_dict"},
    "TrainingArguments": {"remove_unused_columns": None},
    "TrainerCallback": dict.fromkeys(
        ("on_epoch_begin", "on_epoch_end", "on_step_end", "on_train_begin", "on_train_end"),
        "args state control kwargs",
    ),
    "EarlyStoppingCallback": {
        "on_evaluate": "args state control metrics kwargs",
        "on_train_begin": "args state control kwargs",
    },
    "ImageProcessingMixin": {
        "fetch_images": "image_url_or_urls",
        "save_pretrained": "save_directory push_to_hub kwargs",
    },
    "BaseImageProcessor": {
        "_standardize_kwargs": "size crop_size pad_size default_to_square image_mean image_std kwargs",
        "valid_kwargs": None,
    },
    "PilBackend": {
        "_preprocess": f"{_STEPS} return_tensors kwargs",
        "center_crop": "image size kwargs",
        "process_image": "image do_convert_rgb input_data_format kwargs",
        "resize": "image size resample reducing_gap kwargs",
    },
    "TorchvisionBackend": {
        "_preprocess": f"{_STEPS} disable_grouping return_tensors kwargs",
        "center_crop": "image size kwargs",
        "fetch_images": "image_url_or_urls",
        "process_image": "image do_convert_rgb input_data_format device kwargs",
        "resize": "image size resample antialias kwargs",
    },
    "BaseTuner": {
        "_check_merge_allowed": "",
        "_check_target_module_exists": "key",
        "_create_and_replace": "peft_config adapter_name target target_name parent current_key parameter_name",
        "_prepare_adapter_config": "peft_config model_config",
        "_remove_adapter_name_from_key": "key adapter_name",
        "_replace_module": "parent child_name new_module child",
        "inject_adapter": "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
        "merge_and_unload": "progressbar safe_merge adapter_names",
        "unload": "",
    },
    "BaseTunerLayer": {"_get_base_layer_device_and_dtype": "base_layer", "adapter_layer_names": None},
    "PeftConfigMixin": {"to_dict": ""},
    "EvaluationModule": {"_compute": "predictions references kwargs", "_info": ""},
}


def our_classes() -> set[type]:
    found = set()
    for module in pkgutil.walk_packages(refiner_hf.__path__, "refiner_hf."):
        if not module.name.endswith("__main__") and module.name != "refiner_hf.export.preprocess":  # programs
            kinds = vars(importlib.import_module(module.name)).values()
            found |= {kind for kind in kinds if inspect.isclass(kind) and kind.__module__.startswith("refiner_hf")}
    config = refined_config_class(ViTConfig)
    found |= {config, refined_model_class(ViTModel, config)}
    return {kind for kind in found if not issubclass(kind, Trainer)}


def overridden() -> dict[str, dict[str, str | None]]:
    found: dict[str, dict[str, str | None]] = {}
    for kind in our_classes():
        ours = [base for base in kind.__mro__ if base.__module__.startswith("refiner_hf")]
        theirs = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        for name in {name for base in ours for name in vars(base) if not name.startswith("__")} - NOTED:
            if (owner := next((base for base in theirs if name in vars(base)), None)) is not None:
                there = inspect.getattr_static(owner, name)
                there = getattr(there, "__func__", there)
                takes = " ".join(list(inspect.signature(there).parameters)[1:]) if inspect.isfunction(there) else None
                found.setdefault(owner.__name__, {})[name] = takes
    return found


def test_what_is_overridden_is_as_it_was():
    assert overridden() == OVERRIDDEN


def test_what_is_called_is_there():
    """Names of the library that we use without overriding them."""
    assert list(inspect.signature(capture_outputs).parameters)[1:] == ["tie_last_hidden_states"]
    assert PreTrainedModel._auto_class is None and PreTrainedConfig._auto_class is None
