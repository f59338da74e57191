"""The plots of a benchmark."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, ScalarFormatter

from .contenders import BASE
from .summary import Results, memory_ratio, ratio


def plot_bars(parts: dict[str, dict[str, Results]], path: Path) -> None:
    """
    Inference throughput, training time and training memory of each contender in relation to the base's, with
    quartiles; a row of bars for each part.

    Args:
        parts: by part, results by setting and kind.
        path: the PNG to write.
    """
    figure = Figure(figsize=(15, 3.8 * len(parts)), layout="constrained")
    colours = _colours(result for found in parts.values() for results in found.values() for result in results.values())
    for axes, (part, found) in zip(figure.subplots(len(parts), 3, squeeze=False), parts.items()):
        step = "training step" if part == "model" else "one refinement, forward and backward"
        titles = {
            "speed": "inference" if part == "model" else "one refinement in inference",
            "time": step,
            "memory": step,
        }
        for axis, (quantity, title) in zip(axes, titles.items()):
            _bars(axis, found, quantity, colours)
            unit = {"speed": "throughput", "time": "time", "memory": "peak memory"}[quantity]
            better = "higher" if quantity == "speed" else "lower"
            axis.set_title(f"{title}: {unit}\n(times {BASE}'s, {better} is better)", fontsize=10)
    # One legend for all: a contender may have failed in one panel and not in another.
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=9)
    figure.savefig(path, dpi=110)


def _bars(axis, found: dict[str, Results], quantity: str, colours: dict[str, Any]) -> None:
    kind = "inference" if quantity == "speed" else "training"
    taking_part = {name for results in found.values() for name in results.get(kind, {}).get("rows", {})}
    if not taking_part:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        axis.set_axis_off()
        return
    colours = {name: colour for name, colour in colours.items() if name in taking_part}
    width = 0.85 / len(colours)
    for index, (name, colour) in enumerate(colours.items()):
        points = []
        for place, results in enumerate(found.values()):
            rows = results.get(kind, {}).get("rows", {})
            if name not in rows or BASE not in rows:
                continue
            if quantity == "memory":
                height = memory_ratio(rows[name], rows[BASE])
                compared = None if height is None else (height, height, height)
            else:
                compared = ratio(rows[name], rows[BASE], inverse=quantity == "speed")
            if compared:
                points.append((place + (index - (len(colours) - 1) / 2) * width, *compared))
        if points:
            x, height, low, high = np.array(points).T
            spread = None if quantity == "memory" else (height - low, high - height)
            axis.bar(x, height, width, yerr=spread, color=colour, error_kw={"elinewidth": 1})
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(found)), [setting.replace(", ", "\n") for setting in found], fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def plot_curves(results: list[dict[str, Any]], path: Path) -> None:
    """
    The time of one refinement against tokens and against batch, for each implementation.

    Args:
        results: of the curves' cases.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    colours = _colours(results)
    for axes, kind in zip(figure.subplots(2, 2), ("inference", "training")):
        of_kind = [result for result in results if result["kind"] == kind]
        for axis, along, fixed, label in (
            (axes[0], "tokens", "batch_size", "tokens N"),
            (axes[1], "batch_size", "tokens", "images in a batch"),
        ):
            # The other quantity stands still at the value that most points share.
            values = [result[fixed] for result in of_kind]
            common = max(values, key=values.count, default=None)
            points = sorted((r for r in of_kind if r[fixed] == common), key=lambda result: result[along])
            for name, colour in colours.items():
                times = [
                    (r[along], *np.percentile(r["rows"][name]["seconds"], (50, 25, 75)) * 1e3)
                    for r in points
                    if "seconds" in r["rows"].get(name, {})
                ]
                if times:
                    x, middle, low, high = np.array(times).T
                    axis.plot(x, middle, marker=".", color=colour, label=name)
                    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
            axis.set_xticks([r[along] for r in points], [str(r[along]) for r in points])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.grid(alpha=0.3)
            where = f"batch {common}" if fixed == "batch_size" else f"{common} tokens"
            what = "forward in inference" if kind == "inference" else "forward and backward"
            axis.set_title(f"one refinement, {what}, {where}", fontsize=10)
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _colours(results: Any) -> dict[str, Any]:
    """A colour for each contender, in the order in which they take part; where they are many, dark and light ones."""
    names = dict.fromkeys(name for result in results for name in result["rows"])
    palette, size = ("tab10", 10) if len(names) <= 10 else ("tab20", 20)
    return {name: colormaps[palette](index % size) for index, name in enumerate(names)}
