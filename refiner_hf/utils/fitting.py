"""Whether a network and its image processor fit each other, before anything long begins."""

from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME

from .errors import explain_errors
from .image_config import channels_of, image_shape_of


def check_processor(processor: BaseImageProcessor, config: PreTrainedConfig) -> None:
    """
    Raises:
        `ValueError`: the processor makes images of another size than the network takes, of which some networks would
            make answers too.
    """
    with explain_errors(f"The image processor ({type(processor).__name__}) can't prepare a picture"):
        made = tuple(_pixels(processor, config).shape[1:])
    wanted = image_shape_of(config)
    if made != wanted:
        raise ValueError(
            f"The image processor ({type(processor).__name__}) makes {made} (channels, height, width) of a picture, "
            f"and the model takes {wanted}: its {IMAGE_PROCESSOR_NAME} doesn't fit its config.json."
        )


@torch.no_grad()
def try_out(name: str, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """
    Gives a picture to the processor and what it makes of it to the network.

    Raises:
        `ValueError`: one can't take what the other makes, or the answer isn't finite.
    """
    with explain_errors(f"The network of {name} can't take what its image processor makes of a picture"):
        answer = model(pixel_values=_pixels(processor, model.config).to(model.device)).to_tuple()[0]
    if not answer.isfinite().all():
        raise ValueError(
            f"{name} answers with numbers that aren't finite: its weights are damaged, its training broke, or its "
            f"{IMAGE_PROCESSOR_NAME} is wrong."
        )


@torch.no_grad()
def try_out_on_text(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """As [`try_out`], for a network that reads texts."""
    with explain_errors(f"The network of {name} can't take what its tokenizer makes of a text"):
        embeddings: Any = model.get_input_embeddings()
        if len(tokenizer) > (size := embeddings.num_embeddings):
            raise ValueError(f"the tokenizer knows {len(tokenizer):,} tokens, and the network {size:,}.")
        answer = model(**tokenizer("a text", return_tensors="pt").to(model.device)).to_tuple()[0]
    if not answer.isfinite().all():
        raise ValueError(
            f"{name} answers with numbers that aren't finite: its weights are damaged, or its training broke."
        )


def _pixels(processor: BaseImageProcessor, config: PreTrainedConfig) -> torch.Tensor:
    mode = "L" if channels_of(config) == 1 else "RGB"
    return processor(Image.new(mode, (48, 32), 128), return_tensors="pt").pixel_values
