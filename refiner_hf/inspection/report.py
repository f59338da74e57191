"""An analysis in files: all numbers as JSON, the figures as PNG and PDF, and a table."""

from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import write_json
from ..utils.machine import device_name, versions
from ..utils.markdown import markdown_table
from .figures import Analysis, plot_curves, plot_layers


CURVES, LAYERS = "analysis_curves", "analysis_layers"
_COLUMNS = {
    "heads alike (cosine)": ("applied", "head_similarity"),
    "heads alike (correlation)": ("applied", "head_correlation"),
    "entropy": ("applied", "entropy"),
    "effective rank": ("applied", "effective_rank"),
    "centred": ("applied", "effective_rank_centred"),
    "distance, patches": ("applied", "distance"),
    "tokens alike (cosine)": ("tokens", "similarity"),
}


def write_analyses(analyses: list[Analysis], facts: dict[str, Any], folder: Path) -> None:
    """
    Writes `analysis.json`, `analysis_curves` and `analysis_layers` (.png and .pdf).

    Args:
        analyses: from [`~refiner_hf.inspection.analysis.analyze`].
        facts: about the measurement, see [`facts_of`].
        folder: where to; made if it isn't there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", facts | {"networks": analyses})
    for suffix in (".png", ".pdf"):
        plot_curves(analyses, folder / f"{CURVES}{suffix}")
        plot_layers(analyses, folder / f"{LAYERS}{suffix}")


def facts_of(data: str, seed: int, batch_size: int, device: str) -> dict[str, Any]:
    """About a measurement: the examples, the device and the versions."""
    return {
        "data": data,
        "seed": seed,
        "batch_size": batch_size,
        "device": device_name(device),
        "versions": versions(),
    }


def summary_table(analyses: list[Analysis]) -> str:
    """Markdown: a row for each network, means over layers (maps as they weight the values) and examples."""
    columns = {
        name: (stage, metric) for name, (stage, metric) in _COLUMNS.items() if metric in analyses[0][stage]
    }  # texts have no distance
    rows = []
    for analysis in analyses:
        cells = [_mean(analysis[stage][metric]["mean"]) for stage, metric in columns.values()]
        square = np.array(analysis["layers"]["cosine"]["mean"], dtype=float)
        cells.append(_mean(square[~np.eye(len(square), dtype=bool)].tolist()))
        rows.append([analysis["name"], analysis["num_tokens"], *cells])
    return markdown_table(["", "tokens", *columns, "layers' maps alike (cosine)"], rows)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3g}" if known else ""
