"""The maps of a trained network, measured and drawn for its card."""

from pathlib import Path

from ..cards import captions
from ..data.image_sample import decoded
from ..data.sources import ImageData
from ..inspection.analysis import analyze
from ..inspection.attention_views import view_attention
from ..inspection.networks import open_network
from ..inspection.pictures import plot_heads, plot_overview
from ..inspection.report import CURVES, LAYERS, facts_of, write_analyses


ANALYSIS = "analysis"
_SEED, _BATCH = 0, 16


def analyze_folder(folder: Path, data: ImageData, count: int, device: str, picture: bool) -> list[tuple[str, str]]:
    """
    Measures the network saved in `folder` on `count` evaluation images, and draws where it looks in one of them.

    Args:
        folder: of the finished model; gets a folder `analysis`.
        data: with evaluation images.
        count: how many of them to take.
        device: where to run it.
        picture: whether an evaluation picture may be shown.

    Returns:
        (file in the folder, caption) for the card.
    """
    network = open_network(str(folder), device)
    assert data.evaluation is not None
    rows = data.evaluation.sample(count, _SEED).read()
    found = analyze(network, decoded(rows), len(rows), _BATCH)
    write_analyses([found], facts_of(data.name, _SEED, _BATCH, device), folder / ANALYSIS)
    images, refines = found["images"], "before" in found
    pictures = [
        (f"{ANALYSIS}/{CURVES}.png", captions.curves(images, refines)),
        (f"{ANALYSIS}/{LAYERS}.png", captions.layers(images)),
    ]
    if not picture:
        return pictures
    views = view_attention(network, next(decoded(rows)))
    pictures.append((f"{ANALYSIS}/layers.png", captions.OVERVIEW))
    plot_overview(views, 0, folder / pictures[-1][0])
    if refines:
        layer = views.refining_layers[-1]
        pictures.append((f"{ANALYSIS}/heads.png", captions.heads(layer + 1)))
        plot_heads(views, layer, 0, folder / pictures[-1][0])
    return pictures
