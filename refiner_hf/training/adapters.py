"""The PEFT adapter of a run: refinements or LoRA beside a network whose own weights stay as they are."""

from typing import Any

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.image_sample import decoded
from ..data.rows import Rows
from ..normalization_refiner import RefinerBatchNorm2d
from ..utils.errors import explain_errors
from ..utils.heads import head_modules
from .model_arguments import ModelArguments


def add_adapter(model: PreTrainedModel, processor: BaseImageProcessor, images: Rows, args: ModelArguments) -> Any:
    """
    Args:
        model: the network; its head is trained and saved whole beside the adapter.
        processor: prepares images for it.
        images: some dozens, from which a refinement's norms take their statistics.
        args: say which adapter, and its options.

    Returns:
        [`~peft.PeftModel`].

    Raises:
        `ValueError`: an option that the adapter doesn't have, or a network that it doesn't fit.
    """
    from peft import LoraConfig, get_peft_model

    from ..encoders.adapter import RefinementAdapterConfig

    head = head_modules(model.config, model)
    config: Any
    with explain_errors(f"There can't be such an adapter ({args.adapter})"):
        if args.adapter == "lora":
            for norm in (module for module in model.modules() if isinstance(module, RefinerBatchNorm2d)):
                norm.frozen = True  # the adapter doesn't hold their statistics
            options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **args.adapter_fields}
            config = LoraConfig(**options, modules_to_save=head, exclude_modules=head)
        else:
            pictures = [{"image": picture} for picture in decoded(images.read())]
            config = RefinementAdapterConfig(
                inputs=pictures, processing_class=processor, modules_to_save=head, **args.adapter_fields
            )
        return get_peft_model(model, config)
