"""Pictures of maps over an image, and of a refinement's learned weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..attention_refiner import RefinerMapRefinement
from ..utils.plotting import literal_text
from .attention_views import APPLIED, BEFORE, CLASS_TOKEN, AttentionViews, coloured, name_of


_COLUMNS = 16  # of layers, side by side
_LEGEND = "each map on its own scale; red adds, blue subtracts"


@literal_text
def plot_heads(views: AttentionViews, layer: int, query: int, path: Path, heads: Sequence[int] | None = None) -> None:
    """
    Where one token looks in one layer: a column for each head and one for their mean, a row for each stage of the
    refinement. Expanded heads don't belong to particular heads; they fill as many rows as needed.

    Args:
        views ([`~refiner_hf.inspection.attention_views.AttentionViews`]): what to draw.
        layer (`int`): from 0.
        query (`int`): position in `views.queries`.
        path: the PNG to write.
        heads (`Sequence[int]`, *optional*): only these columns, from 0.

    Raises:
        `ValueError`: no such layer or head.
    """
    views.check(layer, heads)
    stages = {name: maps[query] for name, maps in views.layers[layer].stages.items()}
    count = len(stages[APPLIED])
    heads = range(count) if heads is None else heads

    rows = [  # (name, mean over heads, maps, number of the first)
        (name, maps.mean(0) if first == 0 else None, maps[first : first + count], first)
        for name, maps in stages.items()
        for first in range(0, len(maps), count)
    ]
    figure = Figure(
        figsize=(max(1.25 * (len(heads) + 1) + 2.4, 6), 1.42 * max(len(rows), 2) + 0.9), layout="constrained"
    )
    spaces = figure.add_gridspec(len(rows), len(heads) + 2, width_ratios=[1.7] + [1] * (len(heads) + 1))
    picture = figure.add_subplot(spaces[:, 0])
    _show_picture(picture, views)
    _mark(picture, views, query)
    for row, (name, mean, maps, first) in enumerate(rows):
        axis = figure.add_subplot(spaces[row, 1])
        if mean is None:
            axis.set_axis_off()
        else:
            _overlay(axis, views, mean)
            axis.set_ylabel(name.replace("after ", "after\n").replace("local ", "local\n"), fontsize=8)
            if row == 0:
                axis.set_title("mean", fontsize=9)
        for column, head in enumerate(heads):
            axis = figure.add_subplot(spaces[row, column + 2])
            if head >= len(maps):
                axis.set_axis_off()
                continue
            _overlay(axis, views, maps[head])
            own = name in (BEFORE, APPLIED) and len(stages[name]) == views.num_heads  # others are of expanded heads
            axis.set_title(f"{'head' if own else 'expanded'} {first + head + 1}", fontsize=8)
    figure.suptitle(f"Where {name_of(views.queries[query])} looks in layer {layer + 1}\n{_LEGEND}", fontsize=10)
    figure.savefig(path, dpi=110)


@literal_text
def plot_overview(views: AttentionViews, query: int, path: Path) -> None:
    """
    Where one token looks in all layers, averaged over heads: before refinement (in layers that refine), as applied,
    and through all layers up to this one (rollout).

    Args:
        views ([`~refiner_hf.inspection.attention_views.AttentionViews`]): what to draw.
        query (`int`): position in `views.queries`.
        path: the PNG to write.
    """
    rows = ([BEFORE] if views.refining_layers else []) + [APPLIED, "rollout"]
    columns = min(len(views.layers), _COLUMNS)
    blocks = -(-len(views.layers) // columns)
    figure = Figure(figsize=(max(1.25 * columns + 2, 6), 1.42 * len(rows) * blocks + 0.8), layout="constrained")
    spaces = figure.add_gridspec(len(rows) * blocks, columns + 1, width_ratios=[1.5] + [1] * columns)
    picture = figure.add_subplot(spaces[: len(rows), 0])
    _show_picture(picture, views)
    _mark(picture, views, query)
    for index, layer in enumerate(views.layers):
        for row, name in enumerate(rows):
            axis = figure.add_subplot(spaces[index // columns * len(rows) + row, index % columns + 1])
            if name == "rollout":
                _overlay(axis, views, layer.rollout[query])
            elif name in layer.stages:
                _overlay(axis, views, layer.stages[name][query].mean(0))
            else:
                axis.set(xticks=[], yticks=[], frame_on=False)
                axis.set_box_aspect(views.picture.shape[0] / views.picture.shape[1])
            if row == 0:
                axis.set_title(f"layer {index + 1}", fontsize=9)
            if index % columns == 0:
                axis.set_ylabel(name, fontsize=8)
    figure.suptitle(f"Where {name_of(views.queries[query])} looks, mean over heads\n{_LEGEND}", fontsize=10)
    figure.savefig(path, dpi=110)


@literal_text
def plot_weights(refinement: RefinerMapRefinement, layer: int, path: Path) -> None:
    """
    What a refinement has learned: the kernels of distributed local attention (over the plane of queries, down, and
    keys, across) and the matrices of attention expansion and reduction; of a full convolution all its kernels.

    Args:
        refinement: the module.
        layer (`int`): its layer, from 0, for the title.
        path: the PNG to write.
    """
    panels = refinement.weights_panels()
    figure = Figure(figsize=(4.2 * len(panels) + 1, 4.6), layout="constrained")
    for axis, (title, weights, across, down) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        values, are_kernels = weights.detach().float().cpu().numpy(), weights.ndim == 4
        if are_kernels:
            values = _mosaic(values)
        largest = np.nanmax(np.abs(values)) or 1
        aspect = "equal" if are_kernels else "auto"
        shown = axis.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect=aspect)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel=across, ylabel=down)
        if are_kernels:
            axis.set(xticks=[], yticks=[])
        else:
            for numbers, side in ((axis.xaxis, values.shape[1]), (axis.yaxis, values.shape[0])):
                step = max(1, side // 12)
                numbers.set_ticks(np.arange(0, side, step), [str(i + 1) for i in range(0, side, step)], fontsize=7)
        figure.colorbar(shown, ax=axis, shrink=0.8)
    figure.suptitle(f"What the refinement in layer {layer + 1} has learned", fontsize=10)
    figure.savefig(path, dpi=110)


def _show_picture(axis: Axes, views: AttentionViews) -> None:
    axis.imshow(views.picture)
    axis.set_axis_off()


def _mark(axis: Axes, views: AttentionViews, query: int) -> None:
    """A frame around the query's patch."""
    if (patch := views.queries[query]) is CLASS_TOKEN:
        return
    height, width = (side / count for side, count in zip(views.picture.shape, views.grid))
    corner = patch[1] * width - 0.5, patch[0] * height - 0.5
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#00e000", linewidth=1.5))


def _overlay(axis: Axes, views: AttentionViews, weights: np.ndarray) -> None:
    """A map's row over the image in grey, patch by patch."""
    height, width, _ = views.picture.shape
    axis.imshow(views.grey, cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(coloured(weights), extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _mosaic(kernels: np.ndarray) -> np.ndarray:
    """(rows, columns, k, k) -> one plane, with a gap between kernels."""
    rows, columns, side, _ = kernels.shape
    plane = np.full((rows, side + 1, columns, side + 1), np.nan)
    plane[:, :side, :, :side] = kernels.transpose(0, 2, 1, 3)
    return plane.reshape(rows * (side + 1), columns * (side + 1))[:-1, :-1]
