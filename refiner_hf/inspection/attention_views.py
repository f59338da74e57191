"""Where a network looks in one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..attention_refiner import RefinerMapRefinement
from .layer_views import LayerView, watch_layers
from .networks import Network


CLASS_TOKEN = None
Query = tuple[int, int] | None  # row and column of a patch, from 0; CLASS_TOKEN

# A map's first and last stage. Between them is what a kind of refinement has in its middle.
BEFORE, APPLIED = "before refinement", "as applied"
_ADDS, _SUBTRACTS = (0.84, 0.1, 0.1), (0.1, 0.3, 0.9)


@dataclass
class LayerAttention:
    """
    Where the queries look in one layer: `stages`, by name (queries, heads, rows, columns), and `rollout`, through all
    layers up to this one (queries, rows, columns). In the rollout a patch's weight on itself, which is far larger than
    the others, is lowered to the largest of the others. `refinement` is the module, where the layer refines.
    """

    stages: dict[str, np.ndarray]
    rollout: np.ndarray
    refinement: RefinerMapRefinement | None = None


@dataclass
class AttentionViews:
    """
    The attention of a network in one picture: the `picture` as the network gets it, (height, width, 3) in 0..1, the
    `grid` of patches, the `queries`, each layer's maps for them, and the logits (labels,) where the network has a
    classifier.
    """

    picture: np.ndarray
    grid: tuple[int, int]
    queries: list[Query]
    layers: list[LayerAttention] = field(default_factory=list)
    logits: torch.Tensor | None = None

    def check(self, layer: int, heads: Sequence[int] | None = None) -> None:
        """Raises a `ValueError` where there is no such layer, or it has no such heads (all from 0)."""
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"There is no layer {layer + 1}; there are {len(self.layers)}.")
        count = self.layers[layer].stages[APPLIED].shape[1]
        if unknown := [head + 1 for head in heads or [] if not 0 <= head < count]:
            raise ValueError(f"There is no head {unknown[0]}; there are {count}.")

    @property
    def num_heads(self) -> int:
        """The network's heads; some refinements leave a layer with more maps than these."""
        stages = (stage for layer in self.layers for name, stage in layer.stages.items() if name in (BEFORE, APPLIED))
        return min(stage.shape[1] for stage in stages)

    @property
    def grey(self) -> np.ndarray:
        """The picture without colours, (height, width), neither black nor white: the maps are drawn on it."""
        return 0.2 + 0.6 * self.picture.mean(-1)

    @property
    def stages(self) -> list[str]:
        """The stages that any layer has, in their order."""
        middle = dict.fromkeys(name for layer in self.layers for name in layer.stages)
        first = [BEFORE] if BEFORE in middle else []
        return [*first, *(name for name in middle if name not in (BEFORE, APPLIED)), APPLIED]

    @property
    def refining_layers(self) -> list[int]:
        """The layers that refine their map, from 0."""
        return [i for i, layer in enumerate(self.layers) if layer.refinement is not None]


def view_attention(network: Network, image: Image.Image, patches: Sequence[tuple[int, int]] = ()) -> AttentionViews:
    """
    Where the class token and some patches look, in every layer.

    Rollout (Abnar and Zuidema, 2020) takes half of each token from itself and half from where the heads look on
    average. There a refined map's weights count by their absolute values, so that each row can be scaled to sum to 1.

    Args:
        network ([`~refiner_hf.inspection.networks.Network`]): the network.
        image: an upright RGB image.
        patches (`Sequence[tuple[int, int]]`, *optional*): rows and columns of patches, from 0. In a model without a
            class token by default the patch in the middle.

    Raises:
        `ValueError`: a patch that doesn't exist, or a model that gives no maps.
    """
    pixel_values = network.processor(image, return_tensors="pt").pixel_values.to(network.device)
    grid = network.grid(pixel_values)
    for patch in patches:
        if not all(0 <= place < side for place, side in zip(patch, grid)):
            raise ValueError(f"There is no {name_of(patch)}; there are {grid[0]} rows and {grid[1]} columns.")
    views = AttentionViews(as_picture(network.processor, pixel_values[0]), grid, [])
    places, rollout = [], torch.empty(0)

    def look(view: LayerView) -> None:
        nonlocal places, rollout
        if view.index == 0:
            tokens = view.applied.shape[-1]
            others = tokens - math.prod(grid)
            views.queries = [CLASS_TOKEN, *patches] if others else list(patches) or [(grid[0] // 2, grid[1] // 2)]
            places = [0 if q is CLASS_TOKEN else others + q[0] * grid[1] + q[1] for q in views.queries]
            rollout = torch.eye(tokens, device=view.applied.device)
        weights = view.applied[0].float().abs().mean(0)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        rollout = (weights @ rollout + rollout) / 2

        def rows(maps: torch.Tensor) -> np.ndarray:
            """The queries' rows of maps, (..., N, N) -> (..., queries, rows, columns)."""
            return maps[..., places, -math.prod(grid) :].unflatten(-1, grid).float().cpu().numpy()

        maps = {} if view.before is None else {BEFORE: view.before}
        maps |= dict([middle]) if (middle := view.middle_maps()) else {}
        stages = {name: rows(each[0]).swapaxes(0, 1) for name, each in (maps | {APPLIED: view.applied}).items()}
        views.layers.append(LayerAttention(stages, _without_own_peak(rows(rollout), views.queries), view.refinement))

    outputs = watch_layers(network.model, pixel_values, look)
    if (logits := getattr(outputs, "logits", None)) is not None:
        views.logits = logits[0].float().cpu()
    return views


def name_of(query: Query) -> str:
    """A query in words; rows and columns of patches count from 1 there."""
    return "the class token" if query is CLASS_TOKEN else f"patch {query[0] + 1},{query[1] + 1}"


def as_picture(processor: BaseImageProcessor, pixel_values: torch.Tensor) -> np.ndarray:
    """Prepared pixels (C, height, width) as a picture (height, width, 3) in 0..1."""
    pixels = pixel_values.float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    return pixels.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()


def coloured(weights: np.ndarray) -> np.ndarray:
    """The colours of a map's row over a picture, (rows, columns, red green blue alpha): red adds, blue subtracts."""
    colours = np.where(weights[..., None] >= 0, _ADDS, _SUBTRACTS)
    return np.dstack((colours, 0.9 * np.abs(weights) / (np.abs(weights).max() or 1)))


def _without_own_peak(rollout: np.ndarray, queries: list[Query]) -> np.ndarray:
    for weights, query in zip(rollout, queries):
        if query is not CLASS_TOKEN:
            weights[query] = 0
            weights[query] = weights.max()
    return rollout
