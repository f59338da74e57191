"""What a network costs on paper."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..modeling_refiner import RefinerPreTrainedModel


def count_flops(model: RefinerPreTrainedModel) -> int:
    """Floating-point operations for one image of the model's own size in evaluation, 2 per multiply-add."""
    config = model.config
    with torch.device("meta"):
        shapes_only = type(model)(config).eval()
        image = torch.empty(1, config.num_channels, *config.image_height_width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes_only(image)
    return counter.get_total_flops()
