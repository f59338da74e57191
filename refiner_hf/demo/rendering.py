"""What the page shows: answers, maps drawn over the picture, captions. Nothing here depends on Gradio."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention_refiner import RefinerMapRefinement
from ..inspection.attention_views import CLASS_TOKEN, AttentionViews, Query, coloured, view_attention
from ..inspection.networks import Network, classes_of_layers
from ..prediction.scores import probabilities


TOP = 5  # classes
_SIDE = 480  # pixels that a drawing's longer side has at least
_MARK = (0, 200, 0)


@dataclass(frozen=True)
class VisitorState:
    """
    All that is kept of a visitor's picture: the likeliest classes with their probabilities (`None` without a
    classifier), what was seen at first, and what is shown now. The query is the last one in `shown`.
    """

    classes: dict[str, float] | None
    first: AttentionViews
    shown: AttentionViews

    @property
    def query(self) -> Query:
        return self.shown.queries[-1]

    def back(self) -> "VisitorState":
        """The state before any patch was clicked."""
        return replace(self, shown=self.first)


def view_picture(network: Network, image: Image.Image) -> VisitorState:
    """
    Args:
        network: the network to run. Several visitors may use it at the same time.
        image: an upright RGB image.
    """
    views, config = view_attention(network, image), network.model.config
    classes = None
    if views.logits is not None and config.problem_type != "regression":
        classes = likeliest(views.logits, config)
    return VisitorState(classes, views, views)


def view_from_patch(network: Network, patch: tuple[int, int], image: Image.Image, state: VisitorState) -> VisitorState:
    """The maps for a patch of the same image as the query."""
    return replace(state, shown=view_attention(network, image, [patch]))


def likeliest(logits: torch.Tensor, config: PreTrainedConfig) -> dict[str, float]:
    """The five likeliest classes and their probabilities; classes of one name are told apart by their numbers."""
    best, classes = probabilities(logits.float()[None], config)[0].cpu().topk(min(TOP, len(logits)))
    all_names = dict(config.id2label or {})
    namesakes = Counter(all_names.values())
    labels = [(all_names[index], index) for index in classes.tolist()]
    names = [label if namesakes[label] == 1 else f"{label} ({index})" for label, index in labels]
    return dict(zip(names, best.tolist()))


def which_refine(model: PreTrainedModel) -> list[bool]:
    """For each layer, whether it refines its map."""
    layer_class, _ = classes_of_layers(model)
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    return [any(isinstance(part, RefinerMapRefinement) for part in layer.modules()) for layer in layers]


def weights_of(state: VisitorState, stage: str, layer: int, head: int | None = None) -> np.ndarray | None:
    """
    A map's row, (rows, columns); `None` where the layer has no such stage.

    Args:
        state ([`VisitorState`]): of the visitor.
        stage (`str`): one of [`~refiner_hf.inspection.attention_views.STAGES`].
        layer (`int`): from 0.
        head (`int`, *optional*): from 0; by default the mean of all. Of expanded heads it is the mean of its own.
    """
    maps = state.shown.layers[layer].stages.get(stage)
    if maps is None:
        return None
    of_each = maps.shape[1] // state.shown.num_heads
    return maps[-1].mean(0) if head is None else maps[-1, head * of_each : (head + 1) * of_each].mean(0)


def draw_picture(state: VisitorState) -> np.ndarray:
    """The picture as the network gets it, with a frame around the query's patch. Small pictures are enlarged."""
    return _marked(_enlarged(state.shown.picture), state)


def draw_map(state: VisitorState, weights: np.ndarray) -> np.ndarray:
    """The picture in grey with a map over it. Each map has its own scale: red patches add, blue patches subtract."""
    ground = _enlarged(state.shown.grey)[..., None]
    height, width, _ = ground.shape
    places = (np.arange(side) * count // side for side, count in zip((height, width), weights.shape))
    shades = coloured(weights)[np.ix_(*places)]
    return _marked(ground + shades[..., 3:] * (shades[..., :3] - ground), state)


def patch_at(state: VisitorState, x: int, y: int) -> tuple[int, int]:
    """Row and column of the patch at a pixel of a drawing."""
    (rows, columns), (height, width) = state.shown.grid, drawing_size(state)
    return min(y * rows // height, rows - 1), min(x * columns // width, columns - 1)


def drawing_size(state: VisitorState) -> tuple[int, int]:
    """Height and width of the drawings, in pixels."""
    picture = state.shown.picture
    return picture.shape[0] * _factor(picture), picture.shape[1] * _factor(picture)


def in_words(weights: np.ndarray) -> str:
    """A sentence on the strength of a map's weights, which a drawing on the map's own scale can't show."""
    if (weights < 0).any():
        return f"{(weights >= 0).sum()} of {weights.size} patches add, {(weights < 0).sum()} are subtracted."
    return f"Every patch adds; the weakest counts {100 * weights.min() / (weights.max() or 1):.0f} % of the strongest."


def only_one_map(name: str, refining: Sequence[bool], layer: int) -> str:
    """Why a layer that doesn't refine has one map."""
    layers = [f"{index + 1}" for index, refines in enumerate(refining) if refines]
    if not layers:
        return f"No layer of {name} refines its map, so there is only one."
    which = f"layer {layers[0]} does" if len(layers) == 1 else f"layers {', '.join(layers[:-1])} and {layers[-1]} do"
    return f"Layer {layer + 1} doesn't refine its map, so there is only one; {which}."


def _factor(picture: np.ndarray) -> int:
    return max(1, -(-_SIDE // max(picture.shape[:2])))


def _enlarged(picture: np.ndarray) -> np.ndarray:
    factor = _factor(picture)
    return picture.repeat(factor, 0).repeat(factor, 1)


def _marked(drawing: np.ndarray, state: VisitorState) -> np.ndarray:
    image = Image.fromarray((255 * drawing).round().astype(np.uint8))
    if state.query is not CLASS_TOKEN:
        (row, column), (rows, columns) = state.query, state.shown.grid
        left, right = (-(-image.width * place // columns) for place in (column, column + 1))
        top, bottom = (-(-image.height * place // rows) for place in (row, row + 1))
        frame = max(2, max(image.size) // 120)
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline=_MARK, width=frame)
    return np.asarray(image)
