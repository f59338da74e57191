"""The attention views of a picture as one self-contained HTML page, with sliders for layer and head."""

import json
import math
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from .attention_views import APPLIED, BEFORE, AttentionViews, name_of


TEMPLATE = Path(__file__).with_name("page.html")


def write_page(views: AttentionViews, title: str, layer: int, path: Path) -> None:
    """
    Args:
        views ([`~refiner_hf.inspection.attention_views.AttentionViews`]): what to show.
        title (`str`): the page's heading.
        layer (`int`): the layer to show first, from 0.
        path: the file to write.
    """
    layers = []
    for seen in views.layers:
        stages = {}
        for name, maps in seen.stages.items():
            with_mean = np.concatenate((maps.mean(1, keepdims=True), maps), axis=1)
            stages[name] = {"heads": maps.shape[1], "maps": _packed(with_mean)}
        layers.append(stages | {"rollout": {"maps": _packed(seen.rollout)}})
    content = {
        "title": title,
        "picture": _as_url(views.grey),
        "grid": views.grid,
        "queries": [{"name": name_of(query), "patch": query} for query in views.queries],
        "stages": views.stages,
        "expanded": [name for name in views.stages if name not in (BEFORE, APPLIED)],
        "layer": layer + 1,
        "layers": layers,
    }
    # A title that holds "</script>" must not end the script.
    text = json.dumps(content).replace("<", "\\u003c")
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text), encoding="utf-8")


def query_bytes(views: AttentionViews) -> int:
    """Bytes that one query adds to the page."""
    maps = sum(1 + sum(1 + stage.shape[1] for stage in seen.stages.values()) for seen in views.layers)
    return maps * math.prod(views.grid) * 4 // 3  # base64


def _packed(maps: np.ndarray) -> str:
    """(..., rows, columns) as base64 of int8, each map's largest weight being 127."""
    largest = np.abs(maps).max(axis=(-2, -1), keepdims=True)
    return b64encode(np.round(127 * maps / np.where(largest == 0, 1, largest)).astype(np.int8).tobytes()).decode()


def _as_url(grey: np.ndarray) -> str:
    """A picture (height, width) in 0..1 as a data URL."""
    image = Image.fromarray((255 * grey).astype(np.uint8))
    file = BytesIO()
    # Small pictures are enlarged: the canvas is as large as the picture.
    factor = max(1, 320 // max(image.size))
    image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST).save(file, format="PNG")
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
