"""What a network costs on paper."""

from itertools import chain

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .image_config import image_shape_of
from .modes import in_evaluation


@torch.no_grad()
def count_flops(model: PreTrainedModel) -> int:
    """Floating-point operations for one image of the model's own size in evaluation, 2 per multiply-add."""
    shapes_only = {name: tensor.to("meta") for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    image = torch.empty(1, *image_shape_of(model.config), device="meta", dtype=model.dtype)
    with in_evaluation(model), FlopCounterMode(display=False) as counter:
        functional_call(model, shapes_only, (image,))
    return counter.get_total_flops()
