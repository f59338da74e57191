"""
An image classifier's scores for each place of an image.

A classifier ends in a head that pools the features of the whole image, and gives it scores. Here the head gets one
place at a time, as if it were the whole image: any transformers or timm classifier becomes a teacher, whatever its
head is made of.

Shapes: B batch, C channels, N tokens, K labels, P = rows * columns places.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image as PILImage
from torch import nn
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from ..utils.loading import load_classifier_and_processor


TIMM_PREFIX = "timm/"
_UNKNOWN = "A {} makes its scores in a way that isn't known here. Take another teacher, such as one of timm's."


class Teacher(ABC):
    """
    Attributes:
        num_labels (`int`): how many labels it knows.
        labels (`list[str]`, *optional*): their names, where it knows them.
        size (`tuple[int, int]`): height and width of the images that it takes.
    """

    num_labels: int
    labels: list[str] | None
    size: tuple[int, int]

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        self.model, self.mean, self.std = model.eval(), mean, std

    def prepare(self, image: PILImage.Image) -> torch.Tensor:
        """An RGB image, whole and squeezed to the teacher's size, as (3, height, width)."""
        height, width = self.size
        pixels = pil_to_tensor(image.resize((width, height), PILImage.Resampling.BICUBIC)).float() / 255
        return normalize(pixels, self.mean, self.std)

    @abstractmethod
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, height, width) to scores at each place, (B, K, rows, columns)."""


class TimmTeacher(Teacher):
    """A timm classifier: its own `forward_head` on one place of its `forward_features` at a time."""

    def __init__(self, name: str, image_size: int | None):
        try:
            model = _create(name, img_size=image_size)
        except TypeError:  # it takes any size
            model = _create(name)
        config = timm.data.resolve_model_data_config(model)
        super().__init__(model, config["mean"], config["std"])
        self.labels = model.pretrained_cfg.get("label_names")
        self.num_labels = model.num_classes
        self.size = tuple(config["input_size"][1:]) if image_size is None else (image_size, image_size)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model.forward_features(pixel_values)
        if features.ndim == 4:
            channels_first = features.shape[1] == self.model.num_features
            places, grid = _places_of_map(features, channels_first)
        else:
            prefix = getattr(self.model, "num_prefix_tokens", None)
            prefix = _prefix(features, None, self.size) if prefix is None else prefix
            places, grid = _places_of_tokens(features, prefix, self.size)
        return _as_map(self.model.forward_head(places), grid)


class TransformersTeacher(Teacher):
    """
    A transformers classifier: its own forward with the base model's output replaced by one place of it at a time.

    Base models pool in different ways. The first images show which of the usual ways this one uses.
    """

    def __init__(self, name: str, image_size: int | None, revision: str | None):
        model, processor = load_classifier_and_processor(name, revision)
        super().__init__(model, processor.image_mean or [0.0] * 3, processor.image_std or [1.0] * 3)
        self.num_labels = model.config.num_labels
        self.labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        if model.base_model is model:
            raise ValueError(_UNKNOWN.format(type(model).__name__))
        size = image_size or getattr(model.config, "image_size", None) or 224
        self.size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        own = getattr(model.config, "image_size", self.size)
        own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
        self.options = {} if self.size == own else {"interpolate_pos_encoding": True}
        self.pool: Callable | None = None

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        base = self.model.base_model
        outputs = base(pixel_values, **self.options)
        features = outputs.last_hidden_state
        if self.pool is None:
            self.pool = self._find_pool(pixel_values, outputs)
        if features.ndim == 4:
            places, grid = _places_of_map(features, channels_first=True)
        else:
            patch = getattr(self.model.config, "patch_size", None)
            places, grid = _places_of_tokens(features, _prefix(features, patch, self.size), self.size)
        return _as_map(self._head(pixel_values, type(outputs), places, self.pool), grid)

    def _head(self, pixel_values: torch.Tensor, kind: type, features: torch.Tensor, pool: Callable) -> torch.Tensor:
        """The classifier's scores where its base model answers with `features`."""
        base = self.model.base_model
        base.forward = lambda *_, **__: kind(last_hidden_state=features, pooler_output=pool(base, features))
        try:
            return self.model(pixel_values).logits
        finally:
            del base.forward

    def _find_pool(self, pixel_values: torch.Tensor, outputs) -> Callable:
        expected = self.model(pixel_values, **self.options).logits
        for pool in _POOLS:
            try:
                logits = self._head(pixel_values, type(outputs), outputs.last_hidden_state, pool)
            except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
                continue  # it pools in another way
            if logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
                return pool
        raise ValueError(_UNKNOWN.format(type(self.model).__name__))


# From a base model's features to what its head takes.
_POOLS = (
    lambda base, features: base.pooler(features),
    lambda base, features: base.pooler(features.transpose(1, 2)).flatten(1),
    lambda base, features: base.layernorm(features.mean((-2, -1))),
    lambda base, features: features[:, 0],
    lambda base, features: None,
)


def load_teacher(name: str, image_size: int | None = None, revision: str | None = None) -> Teacher:
    """
    Args:
        name (`str`): a transformers classifier's folder or Hub name; `timm/NAME` for one of timm's on the Hub; a
            folder that timm saved.
        image_size (`int`, *optional*): side of the images it shall see, in pixels. Default: its own.
        revision (`str`, *optional*): branch, tag or commit of a transformers classifier on the Hub.

    Raises:
        `ValueError`, `OSError`: there is no such classifier.
    """
    is_folder = _is_timm_folder(Path(name))
    if revision is not None and (is_folder or name.startswith(TIMM_PREFIX)):
        raise ValueError(f"{name} is one of timm's: its revision goes behind its name, as NAME@REVISION.")
    if is_folder:
        return TimmTeacher(f"local-dir:{name}", image_size)
    if name.startswith(TIMM_PREFIX):
        return TimmTeacher(f"hf-hub:{name}", image_size)
    return TransformersTeacher(name, image_size, revision)


def _is_timm_folder(folder: Path) -> bool:
    try:
        return "architecture" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):  # none, or a damaged one, of which loading says more
        return False


def _create(name: str, **options: int | None) -> nn.Module:
    try:
        model = timm.create_model(name, pretrained=True, **options)
    except (OSError, TypeError):
        raise
    except Exception as error:  # timm, torch and safetensors each have their own for a damaged file
        raise ValueError(f"timm can't load {name.split(':', 1)[-1]}: {error}") from error
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ValueError(f"The weights of {name.split(':', 1)[-1]} hold NaN or infinity.")
    return model


def _places_of_map(features: torch.Tensor, channels_first: bool) -> tuple[torch.Tensor, tuple[int, int]]:
    """(B, C, rows, columns) or (B, rows, columns, C) to (B P, C, 1, 1) or (B P, 1, 1, C), and the grid."""
    if channels_first:
        features = features.permute(0, 2, 3, 1)
    grid = tuple(features.shape[1:3])
    places = features.reshape(-1, features.shape[3])
    return (places[:, :, None, None] if channels_first else places[:, None, None, :]), grid


def _places_of_tokens(
    features: torch.Tensor, prefix: int, size: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """(B, N, C) to (B P, prefix + 1, C), in which every token is that of the place, and the grid."""
    patches = features[:, prefix:]
    rows = round(math.sqrt(patches.shape[1] * size[0] / size[1]))
    places = patches.reshape(-1, 1, patches.shape[2])
    return places.expand(-1, prefix + 1, -1), (rows, patches.shape[1] // rows)


def _prefix(features: torch.Tensor, patch_size, size: tuple[int, int]) -> int:
    """How many tokens come before those of the patches."""
    if patch_size is not None:
        height, width = patch_size if isinstance(patch_size, (list, tuple)) else (patch_size, patch_size)
        prefix = features.shape[1] - (size[0] // height) * (size[1] // width)
        if 0 <= prefix <= 16:
            return prefix
    return features.shape[1] - math.isqrt(features.shape[1]) ** 2


def _as_map(scores: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B P, K) to (B, K, rows, columns)."""
    return scores.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)
