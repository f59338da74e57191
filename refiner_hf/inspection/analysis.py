"""Measures a network's attention maps and features on images or texts."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..attention_refiner import RefinerMapRefinement
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

Example = Image.Image | str | dict[str, str]


def analyze(network: Network, examples: Iterable[Example], count: int | None = None, batch_size: int = 16) -> dict:
    """
    Measures a network on images or texts: properties of the maps in each layer, the similarity of maps between layers,
    and the similarity of tokens and of features. (`docs/look_inside.md` says what each number means.)

    Each layer is measured while the network runs. Meanwhile all layers' maps are kept in memory (at most 2 GB, or
    one image's), and the tokens of all layers for `batch_size` images. Texts run one by one, so that none is padded.

    Args:
        network ([`~refiner_hf.inspection.networks.Network`]): the network.
        examples: upright RGB images; for a network that reads texts, these, or pairs as `text` and `text_pair`.
        count (`int`, *optional*): how many there are, for the progress bar.
        batch_size (`int`, *optional*, defaults to 16): examples whose features are compared with each other, at least
            4. Of a text it is the mean of its tokens.

    Returns:
        `dict`: lists by layer, each as "mean" and "std" over the examples, ready for JSON: "applied" and "before" hold
        the maps' numbers as they weight the values and before refinement (`None` in layers that don't refine; the
        "distance" is one between patches, so texts have none),
        "tokens" the tokens', embeddings first; "layers" compares maps, "cka" features (embeddings first; with the
        standard error as "error" in place of "std").

    Raises:
        `ValueError`: there are no examples, the model gives no maps, or `batch_size` is too small.
    """
    unit = "text" if network.reads_texts else "image"
    if batch_size < SMALLEST:
        raise ValueError(f"CKA needs a batch_size of at least {SMALLEST} {unit}s, got {batch_size}.")
    measurements, cka, measured = _Measurements(), MinibatchCKA(), 0
    examples, progress = iter(examples), tqdm(desc=network.name, total=count, unit=unit)
    while batch := list(islice(examples, batch_size)):
        measurements.tokens = []
        for inputs in _parts(network, batch):
            measurements.grid = None if network.reads_texts else network.grid(inputs["pixel_values"])
            watch_layers(network.model, inputs, measurements.measure_layer)
            measurements.compare_layers()
            progress.update(len(next(iter(inputs.values()))))
        # An incomplete last batch is used for CKA only if there is no other: an estimate of few images is noisy.
        if len(batch) == batch_size or (measured == 0 and len(batch) >= SMALLEST):
            cka.add(torch.stack([gram_matrix(torch.cat(tokens)) for tokens in measurements.tokens]))
        measured += len(batch)
    progress.close()
    if not measured:
        raise ValueError(f"There are no {unit}s to measure on.")
    facts = {"name": network.name, "model_type": network.model.config.model_type, f"{unit}s": measured}
    facts |= {"attention_types": getattr(network.model.config, "attention_types", None), **measurements.sizes()}
    return facts | measurements.summary() | {"cka": _with_error(cka)}


def _parts(network: Network, batch: list[Any]) -> Iterator[dict[str, torch.Tensor]]:
    """A batch as the model takes it, as much at a time as memory allows."""
    if network.reads_texts:
        yield from map(network.tokens_of, batch)
        return
    pixel_values = network.processor(batch, return_tensors="pt").pixel_values.to(network.device)
    for some in pixel_values.split(_images_at_a_time(network, pixel_values)):
        yield {"pixel_values": some}


class _Measurements:
    """The measurements so far, example by example."""

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None  # of the images that run now; texts have none
        self.heads = 0
        self.lengths: list[int] = []
        self.values: dict[tuple[str, str], dict[int, list[torch.Tensor]]] = {}
        self.pairs: dict[str, list[torch.Tensor]] = {"cosine": [], "correlation": []}
        self.maps: list[torch.Tensor] = []
        self.last: dict[str, torch.Tensor] = {}  # the measurements of the last of these maps
        self.tokens: list[list[torch.Tensor]] = []  # by layer, embeddings first

    def sizes(self) -> dict[str, Any]:
        """Heads and tokens (of texts the mean), and the patches of an image."""
        tokens = round(sum(self.lengths) / len(self.lengths), 1)
        return {
            "num_heads": self.heads,
            "num_tokens": int(tokens) if tokens == int(tokens) else tokens,
            "grid": self.grid and list(self.grid),
        }

    def measure_layer(self, view: LayerView) -> None:
        if view.index == 0:
            self.heads = view.applied.shape[1]
            self.lengths.append(view.applied.shape[2])
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
        measured = {
            "head_similarity": head_similarity(attention_map),
            "head_correlation": head_similarity(attention_map, centred=True),
            "entropy": map_entropy(attention_map),
            "effective_rank": effective_rank(attention_map),
            "effective_rank_centred": effective_rank(attention_map, centred=True),
        }
        return measured if self.grid is None else measured | {"distance": attention_distance(attention_map, self.grid)}

    def _measure_tokens(self, place: int, hidden_states: torch.Tensor) -> None:
        grid = (1, hidden_states.shape[1]) if self.grid is None else self.grid
        self._record("tokens", place, {"similarity": token_similarity(hidden_states, grid)})
        if place == len(self.tokens):
            self.tokens.append([])
        # Features are compared over all tokens; those of texts, which have different numbers of them, over their mean.
        self.tokens[place].append(hidden_states.mean(1) if self.grid is None else hidden_states)

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
    heads = network.model.config.num_attention_heads
    kinds = (module for module in network.model.modules() if isinstance(module, RefinerMapRefinement))
    heads = max([heads, *(kind.refined_heads(kind.config) for kind in kinds)])
    an_image = layers * heads * tokens**2 * 4
    return max(1, _KEPT // an_image)
