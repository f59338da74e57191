"""Measures a network's attention maps and features on images."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .cka import SMALLEST, MinibatchCKA, gram_matrix
from .layer_views import LayerView, watch_layers
from .map_metrics import (
    attention_distance,
    effective_rank,
    head_similarity,
    layer_similarity,
    map_entropy,
    token_similarity,
)
from .networks import Network, classes_of_layers


_KEPT = 2 * 2**30  # bytes of the maps of all layers that are kept at a time; a larger batch is run in parts


def analyze(network: Network, images: Iterable[Image.Image], count: int | None = None, batch_size: int = 16) -> dict:
    """
    Measures a network on images: properties of the maps in each layer, the similarity of maps between layers, and the
    similarity of tokens and of features. (`docs/look_inside.md` says what each number means.)

    Each layer is measured while the network runs. Meanwhile all layers' maps are kept in memory (at most 2 GB, or
    one image's), and the tokens of all layers for `batch_size` images.

    Args:
        network ([`~refiner_hf.inspection.networks.Network`]): the network.
        images: upright RGB images.
        count (`int`, *optional*): how many there are, for the progress bar.
        batch_size (`int`, *optional*, defaults to 16): images whose features are compared with each other, at least 4.

    Returns:
        `dict`: lists by layer, each as "mean" and "std" over the images, ready for JSON: "applied" and "before" hold
        the maps' numbers as they weight the values and before refinement (`None` in layers that don't refine),
        "tokens" the tokens', embeddings first; "layers" compares maps, "cka" features (embeddings first; with the
        standard error as "error" in place of "std").

    Raises:
        `ValueError`: there are no images, the model gives no maps, or `batch_size` is too small.
    """
    if batch_size < SMALLEST:
        raise ValueError(f"CKA needs a batch_size of at least {SMALLEST} images, got {batch_size}.")
    measurements, cka, measured = _Measurements(), MinibatchCKA(), 0
    images, progress = iter(images), tqdm(desc=network.name, total=count, unit="image")
    while batch := list(islice(images, batch_size)):
        pixel_values = network.processor(batch, return_tensors="pt").pixel_values.to(network.device)
        measurements.start_batch(network.grid(pixel_values))
        for some in pixel_values.split(_images_at_a_time(network, pixel_values)):
            watch_layers(network.model, some, measurements.measure_layer)
            measurements.compare_layers()
            progress.update(len(some))
        # An incomplete last batch is used for CKA only if there is no other: an estimate of few images is noisy.
        if len(batch) == batch_size or (measured == 0 and len(batch) >= SMALLEST):
            cka.add(torch.stack([gram_matrix(torch.cat(tokens)) for tokens in measurements.tokens]))
        measured += len(batch)
    progress.close()
    if not measured:
        raise ValueError("There are no images to measure on.")
    facts = {"name": network.name, "model_type": network.model.config.model_type, "images": measured}
    facts |= {"attention_types": getattr(network.model.config, "attention_types", None), **measurements.sizes}
    return facts | measurements.summary() | {"cka": _with_error(cka)}


class _Measurements:
    """The measurements so far, image by image."""

    def __init__(self) -> None:
        self.sizes: dict[str, Any] = {}
        self.values: dict[tuple[str, str], dict[int, list[torch.Tensor]]] = {}
        self.pairs: dict[str, list[torch.Tensor]] = {"cosine": [], "correlation": []}
        self.maps: list[torch.Tensor] = []
        self.last: dict[str, torch.Tensor] = {}  # the measurements of the last of these maps
        self.tokens: list[list[torch.Tensor]] = []  # by layer, embeddings first

    def start_batch(self, grid: tuple[int, int]) -> None:
        self.grid, self.tokens = grid, []

    def measure_layer(self, view: LayerView) -> None:
        if view.index == 0:
            _, heads, tokens, _ = view.applied.shape
            self.sizes = {"num_heads": heads, "num_tokens": tokens, "grid": list(self.grid)}
            self._measure_tokens(0, view.entering)
        self._measure_tokens(view.index + 1, view.leaving)
        measured = self._measure_map(view.applied)
        self._record("applied", view.index, measured)
        if view.before is not None:
            # In the released layout the map before refinement is the one that the layer before has applied.
            known = bool(self.maps) and view.before is self.maps[-1]
            self._record("before", view.index, self.last if known else self._measure_map(view.before))
        self.maps.append(view.applied)
        self.last = measured

    def compare_layers(self) -> None:
        """Compares the maps of all layers, then drops them."""
        for name, each in zip(self.pairs, layer_similarity(self.maps)):
            self.pairs[name].append(each.cpu())
        self.maps = []

    def _measure_map(self, attention_map: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "head_similarity": head_similarity(attention_map),
            "head_correlation": head_similarity(attention_map, centred=True),
            "entropy": map_entropy(attention_map),
            "effective_rank": effective_rank(attention_map),
            "effective_rank_centred": effective_rank(attention_map, centred=True),
            "distance": attention_distance(attention_map, self.grid),
        }

    def _measure_tokens(self, place: int, hidden_states: torch.Tensor) -> None:
        self._record("tokens", place, {"similarity": token_similarity(hidden_states, self.grid)})
        if place == len(self.tokens):
            self.tokens.append([])
        self.tokens[place].append(hidden_states)

    def _record(self, stage: str, place: int, measured: dict[str, torch.Tensor]) -> None:
        for metric, values in measured.items():
            self.values.setdefault((stage, metric), {}).setdefault(place, []).append(values.cpu())

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for (stage, metric), by_place in self.values.items():
            places = range(len(self.tokens) - (stage != "tokens"))
            spread = [_mean_and_std(torch.cat(by_place[place])) if place in by_place else None for place in places]
            summary.setdefault(stage, {})[metric] = {
                name: [each and each[name] for each in spread] for name in ("mean", "std")
            }
        summary["layers"] = {name: _mean_and_std(torch.cat(pairs)) for name, pairs in self.pairs.items()}
        return summary


def _mean_and_std(values: torch.Tensor) -> dict[str, Any]:
    """Over the first dimension."""
    mean = values.double().mean(0)
    std = values.double().std(0) if len(values) > 1 else torch.full_like(mean, math.nan)
    return {"mean": _plain(mean), "std": _plain(std)}


def _with_error(cka: MinibatchCKA) -> dict[str, Any] | None:
    if not cka.hsics:
        return None
    mean, error = cka.result()
    return {"mean": _plain(mean), "error": _plain(error)}


def _plain(values: torch.Tensor) -> Any:
    """Numbers for JSON, with six digits; `None` for NaN, which JSON doesn't have."""
    if values.ndim:
        return [_plain(each) for each in values]
    return float(f"{values.item():.6g}") if values.isfinite() else None


def _images_at_a_time(network: Network, pixel_values: torch.Tensor) -> int:
    layer_class, _ = classes_of_layers(network.model)
    layers = sum(isinstance(module, layer_class) for module in network.model.modules())
    tokens = math.prod(network.grid(pixel_values)) + 1
    an_image = layers * network.model.config.num_attention_heads * tokens**2 * 4
    return max(1, _KEPT // an_image)
