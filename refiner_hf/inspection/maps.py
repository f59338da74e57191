"""What refinement does to a map: a layer's attention before and after, for one query, over the image."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..attention_refiner import RefinerMapRefinement
from ..modeling_refiner import RefinerPreTrainedModel


@torch.no_grad()
def refined_maps(
    model: RefinerPreTrainedModel, pixel_values: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """
    The maps that go into and come out of each layer's refinement, the latter as they weight the values.

    Args:
        model: any Refiner, in evaluation.
        pixel_values (`torch.Tensor` of shape (B, C, height, width)): images as the processor prepares them.

    Returns:
        `dict[int, tuple]`: by layer, the map before and after, both (B, H, N, N).

    Raises:
        `ValueError`: no layer of the model refines its map.
    """
    layers = [
        (i, layer.attention.refinement)
        for i, layer in enumerate(model.base_model.layers)
        if isinstance(getattr(layer.attention, "refinement", None), RefinerMapRefinement)
    ]
    if not layers:
        raise ValueError("No layer of this model refines its attention map.")
    maps = {}

    def keep(index: int):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor):
            maps[index] = (args[0], output)

        return hook

    hooks = [refinement.register_forward_hook(keep(i)) for i, refinement in layers]
    try:
        model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def plot_refinement(
    model: RefinerPreTrainedModel,
    image: Image.Image,
    pixel_values: torch.Tensor,
    path: str | Path,
    layer: int | None = None,
    query: int = 0,
) -> None:
    """
    Draws, head by head, where one token looks before and after a layer's refinement.

    Args:
        model: any Refiner, in evaluation.
        image: the picture to show beside the maps.
        pixel_values (`torch.Tensor` of shape (1, C, height, width)): the same picture, prepared.
        path: the PNG to write.
        layer (`int`, *optional*): the layer, from 0; by default the last one that refines.
        query (`int`, *optional*, defaults to 0): the token that looks; 0 is the class token, then the patches.

    Raises:
        `ValueError`: a layer that refines nothing, or a token that doesn't exist.
    """
    maps = refined_maps(model, pixel_values)
    layer = max(maps) if layer is None else layer
    if layer not in maps:
        raise ValueError(f"Layer {layer} refines no map; these do: {sorted(maps)}.")
    before, after = (attention_map[0].float() for attention_map in maps[layer])  # (H, N, N)
    heads, tokens, _ = before.shape
    if not 0 <= query < tokens:
        raise ValueError(f"There is no token {query}; there are {tokens}, 0 being the class token.")

    patch_height, patch_width = model.config.patch_height_width
    grid = pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width
    figure = Figure(figsize=(1.5 * heads + 2.6, 3.5), layout="constrained")
    spaces = figure.add_gridspec(2, heads + 1, width_ratios=[1.6] + [1] * heads)
    picture = figure.add_subplot(spaces[:, 0])
    picture.imshow(np.asarray(image), cmap="gray")
    picture.set_axis_off()
    for row, (name, attention_map) in enumerate((("before", before), ("after", after))):
        for head in range(heads):
            axis = figure.add_subplot(spaces[row, head + 1])
            axis.imshow(attention_map[head, query, 1:].reshape(grid).numpy(), cmap="magma")
            axis.set(xticks=[], yticks=[], title=f"head {head + 1}" if row == 0 else "")
            if head == 0:
                axis.set_ylabel(name)
    who = "the class token" if query == 0 else f"patch {query}"
    figure.suptitle(
        f"Where {who} looks, before and after the refinement in layer {layer} (each map on its own scale)", fontsize=11
    )
    figure.savefig(path, dpi=110)
