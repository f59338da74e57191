"""The figures of an analysis: curves over the layers, and similarities between layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..utils.plotting import literal_text


Analysis = dict[str, Any]

# For each panel its title and unit. In the lower row each map row's mean is subtracted first, where this makes sense.
_PANELS = {
    "head_similarity": ("similarity between heads", "cosine"),
    "cosine": ("maps of a layer and the one before", "cosine"),
    "effective_rank": ("directions in a map", "effective rank"),
    "entropy": ("how widely a query looks", "entropy / that of an even row"),
    "tokens": ("similarity between tokens", "cosine"),
    "head_correlation": ("heads, each row's mean taken off", "correlation"),
    "correlation": ("layers, each row's mean taken off", "correlation"),
    "effective_rank_centred": ("directions, each row's mean taken off", "effective rank"),
    "distance": ("how far a patch looks", "distance, patches"),
    "cka": ("features of a layer and of the last", "CKA (band: standard error)"),
}


@literal_text
def plot_curves(analyses: list[Analysis], path: Path) -> None:
    """
    Properties of each layer's maps and tokens, a line for each network. Bands are the standard deviation over the
    examples; for CKA, the standard error. Where a layer refines its map, a hollow dot shows the map before refinement.

    Args:
        analyses: from [`~refiner_hf.inspection.analysis.analyze`].
        path: where to write; its ending says in which format.
    """
    figure = Figure(figsize=(18, 6.4), layout="constrained")
    panels = dict(zip(_PANELS, figure.subplots(2, 5).flat))
    handles = []
    for number, analysis in enumerate(analyses):
        colour = colormaps["tab10"](number % 10)
        for metric, values in analysis["applied"].items():
            _line(panels[metric], 1, values, colour)
        for metric, values in analysis.get("before", {}).items():
            _dots(panels[metric], 1, values, colour)
        for kind, square in analysis["layers"].items():
            _line(
                panels[kind], 2, _of(square, "std", lambda rows: [rows[i][i - 1] for i in range(1, len(rows))]), colour
            )
        _line(panels["tokens"], 0, analysis["tokens"]["similarity"], colour)
        if analysis["cka"]:
            _line(panels["cka"], 0, _of(analysis["cka"], "error", lambda rows: rows[-1]), colour, "error")
        label = f"{analysis['name']} ({analysis['num_tokens']} tokens)"
        handles.append(Line2D([], [], color=colour, marker=".", label=label))
    if any("before" in analysis for analysis in analyses):
        handles.append(Line2D([], [], color="grey", marker="o", ls="", mfc="none", label="before refinement"))
    for panel, (title, unit) in zip(panels.values(), _PANELS.values()):
        if not panel.lines:  # texts have no distance between patches
            panel.set_axis_off()
            continue
        panel.set_title(title, fontsize=10)
        panel.set_ylabel(unit, fontsize=9)
        panel.set_xlabel("layer", fontsize=9)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    figure.savefig(path, dpi=110)


@literal_text
def plot_layers(analyses: list[Analysis], path: Path) -> None:
    """
    Similarity of maps (cosine and correlation) and of features (CKA) for all pairs of layers, a row for each network.

    Args:
        analyses: from [`~refiner_hf.inspection.analysis.analyze`].
        path: where to write; its ending says in which format.
    """
    figure = Figure(figsize=(12, 3.3 * len(analyses) + 0.3), layout="constrained")
    for axes, analysis in zip(figure.subplots(len(analyses), 3, squeeze=False), analyses):
        squares = {
            "maps: cosine": (analysis["layers"]["cosine"], 1, "RdBu_r", -1),
            "maps: correlation": (analysis["layers"]["correlation"], 1, "RdBu_r", -1),
            "features: CKA": (analysis["cka"], 0, "magma", 0),
        }
        for axis, (title, (values, first, colours, low)) in zip(axes, squares.items()):
            axis.set_title(title, fontsize=10)
            if values is None:
                axis.text(0.5, 0.5, "too few examples", ha="center", transform=axis.transAxes)
                axis.set_axis_off()
                continue
            mean = np.array(values["mean"], dtype=float)
            last = first + len(mean) - 1
            extent = (first - 0.5, last + 0.5, first - 0.5, last + 0.5)
            shown = axis.imshow(mean, origin="lower", extent=extent, cmap=colours, vmin=low, vmax=1)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.yaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(shown, ax=axis, shrink=0.85)
        axes[0].set_ylabel(f"{analysis['name']}\nlayer")
    figure.savefig(path, dpi=110)


def _line(axis: Axes, first: int, values: dict[str, list], colour, spread: str = "std") -> None:
    mean, around = np.array(values["mean"], dtype=float), np.array(values[spread], dtype=float)
    places = np.arange(first, first + len(mean))
    axis.plot(places, mean, color=colour, marker=".")
    axis.fill_between(places, mean - around, mean + around, color=colour, alpha=0.15, lw=0)


def _dots(axis: Axes, first: int, values: dict[str, list], colour) -> None:
    mean = np.array(values["mean"], dtype=float)
    axis.plot(np.arange(first, first + len(mean)), mean, color=colour, marker="o", ls="", mfc="none", ms=7)


def _of(square: dict[str, list], spread: str, pick: Callable[[list], list]) -> dict[str, list]:
    return {name: pick(square[name]) for name in ("mean", spread)}
