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
    shape = (1, *image_shape_of(model.config))
    with in_evaluation(model):
        try:
            tensors = chain(model.named_parameters(), model.named_buffers())
            only_shapes = {name: tensor.to("meta") for name, tensor in tensors}
            with FlopCounterMode(display=False) as counter:
                functional_call(model, only_shapes, (torch.empty(shape, device="meta", dtype=model.dtype),))
        except RuntimeError:  # it looks at numbers, as BEiT does
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(shape, device=model.device, dtype=model.dtype))
    return counter.get_total_flops()
