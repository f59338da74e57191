# Copyright 2026 The refiner_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Refiner model configuration."""

import math
import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .choices_refiner import ATTENTION_TYPES, REFINEMENT_NAMES
from .code_refiner import named_code_beside


_MOST_LAYERS = 10_000  # far above any network; below it a mistake is found before anything long begins


@strict
class RefinerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a Refiner: a vision transformer whose attention maps are refined before they weight the values
    (Zhou et al., 2021, [arXiv 2106.03714](https://huggingface.co/papers/2106.03714)).

    The defaults are the Small architecture in the released layout. [`RefinerConfig.small`], [`RefinerConfig.medium`]
    and [`RefinerConfig.large`] give the published networks whole, with 1000 labels and the dense head.

    Args:
        hidden_size (`int`, *optional*, defaults to 384):
            Width of the tokens. A multiple of `num_attention_heads`.
        num_hidden_layers (`int`, *optional*, defaults to 16):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads, H: each layer's map has shape (batch, H, tokens, tokens).
        intermediate_size (`int`, *optional*, defaults to three times `hidden_size`):
            Width of the MLP's hidden layer.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the embeddings and on each branch's output.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the attention maps of `plain` and `refined` layers (before a layer's own refinement).
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last layer; it grows linearly from 0 at the first.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that initialises linear layers, class token and positions.
            Convolutions keep PyTorch's own initialisation, as in the reference: the maps' variance is tiny, and
            0.02 would drown it in the batch norms' eps.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            eps of the layer norms.
        batch_norm_eps (`float`, *optional*, defaults to 1e-5):
            eps of the batch norms of the refinement and of the convolutional stem.
        batch_norm_momentum (`float`, *optional*, defaults to 0.1):
            Weight of a new batch in the running statistics of those batch norms.
        image_size (`int` or pair of `int`, *optional*, defaults to 224):
            Height and width of the images, in pixels.
        patch_size (`int` or pair of `int`, *optional*, defaults to 16):
            Height and width of a patch, in pixels. Must divide `image_size`; must be even with `use_conv_stem`.
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of the images.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether queries, keys and values have a bias.
        layerscale_value (`float`, *optional*, defaults to 1e-5):
            Initial value of the per-channel scale on the MLP branch.
        residual_scale (`float`, *optional*, defaults to 0.5):
            s in `x + branch(norm(s * x)) / s`, for both branches of a layer.
        use_conv_stem (`bool`, *optional*, defaults to `True`):
            Three convolutions (7x7 stride 2, 3x3, 3x3) before the patch projection. Without, one projection.
        attention_types (`list[str]`, *optional*):
            What each layer does with its map. `"plain"`: weights the values with it. `"refined"`: refines it first
            (the paper's figure). `"shared_refined"`: has no queries and keys, and refines the map of the layer
            before (the released networks alternate `plain` and `shared_refined`, which is the default).
        accumulate_attention (`bool`, *optional*, defaults to `True`):
            Whether a layer adds the map passed on by the layer before, times 1/sqrt(head width), to its own softmax.
        refinement (`str`, *optional*, defaults to `"expansion_convolution"`):
            `"expansion_convolution"`: attention expansion, distributed local attention, attention reduction.
            `"expansion"`: the same without the spatial convolution. `"convolution"`: one full convolution over the
            maps, from all heads to all heads. To compare with: `"no_reduction"`, the paper's without attention
            reduction (needs `accumulate_attention=False`, and an `expansion_ratio` that divides a head's width),
            `"talking_heads"` (needs layers that make their own scores), which mixes the heads before and after the
            softmax, and `"feature_convolution"`, over the values in place of the maps.
        expansion_ratio (`int`, *optional*, defaults to 3):
            Expanded heads per head. With 1 nothing is expanded. `"convolution"`, `"talking_heads"` and
            `"feature_convolution"` ignore it.
        refinement_kernel_size (`int`, *optional*, defaults to 3):
            Side of the kernel over the maps, or length of a kernel over tokens (odd). `"expansion"` and
            `"talking_heads"` ignore it.
        use_dense_head (`bool`, *optional*, defaults to `False`):
            A second classifier on the patch tokens.
        dense_loss_weight (`float`, *optional*, defaults to 0.5):
            Weight of the patches' loss beside the class token's.
        dense_logits_weight (`float`, *optional*, defaults to 0.5):
            In evaluation, `logits = class logits + dense_logits_weight * max over patches of the patch logits`.
        use_distillation_token (`bool`, *optional*, defaults to `False`):
            A second token behind the class token, as in DeiT.
        use_distillation_head (`bool`, *optional*, defaults to `False`):
            A classifier on that token; the logits are then the mean of both tokens'.
        token_mixing (`bool`, *optional*, defaults to `False`):
            In training, swap a random box of patches between the images of a batch (MixToken).
        cosine_regularizer_weight (`float`, *optional*, defaults to 0.0):
            Weight, in the training loss, of the mean cosine similarity between consecutive layers' maps.
        cosine_regularizer_repeated_pairs (`bool`, *optional*, defaults to `False`):
            Whether to count pairs in which a `shared_refined` layer passes on the very map that it got (similarity
            1, no gradient), as the reference does.
        apply_layernorm (`bool`, *optional*, defaults to `True`):
            Whether [`RefinerBackbone`] puts its feature maps through the last layer norm.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`):
            Whether [`RefinerBackbone`] gives feature maps (batch, width, rows, columns), or the tokens as they are.
        out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
            Which of `stage_names` ("stem", "stage1", ...) [`RefinerBackbone`] gives, by name or number. By default
            the last. `ValueError` where there is no such stage.
        refine_implementation (`str`, *optional*, defaults to `"auto"`):
            How attention maps are refined: `"auto"` or a key of `refiner_hf.REFINE_IMPLEMENTATIONS`. Every choice
            gives the same numbers. Like `attn_implementation`, it isn't saved.

    Raises:
        `StrictDataclassError` (of `huggingface_hub.errors`): sizes that don't fit each other, an unknown attention
        type or refinement, a `shared_refined` layer with no map before it, a refinement that doesn't fit the layers,
        a value of the wrong type.

    Example:

    ```python
    >>> from refiner_hf import RefinerConfig, RefinerModel

    >>> config = RefinerConfig.small(image_size=384, num_labels=10)
    >>> model = RefinerModel(config)
    ```"""

    model_type = "refiner"

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float | int = 0.1
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float | int = 1e-5
    residual_scale: float | int = 0.5
    use_conv_stem: bool = True
    attention_types: list[str] | tuple[str, ...] | None = None
    accumulate_attention: bool = True
    refinement: str = "expansion_convolution"
    expansion_ratio: int = 3
    refinement_kernel_size: int = 3
    use_dense_head: bool = False
    dense_loss_weight: float | int = 0.5
    dense_logits_weight: float | int = 0.5
    use_distillation_token: bool = False
    use_distillation_head: bool = False
    token_mixing: bool = False
    cosine_regularizer_weight: float | int = 0.0
    cosine_regularizer_repeated_pairs: bool = False
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # However they come: JSON, and transformers' own examples, have numbers as text.
        if name == "id2label" and value is not None:
            value = _numbered(value)
        elif name == "label2id" and value is not None:
            value = {label: int(number) for label, number in _dict(name, value).items()}
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        self.complete()
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if features is not None or indices is not None:  # else the backbone takes the last, whichever it is then
            self.set_output_features_output_indices(features, indices)
        super().__post_init__(**kwargs)

    def complete(self) -> None:
        """Fills in what follows from other fields, where it is `None`."""
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.hidden_size
        if self.attention_types is None and self.num_hidden_layers <= _MOST_LAYERS:  # else it is refused
            self.attention_types = [("plain", "shared_refined")[i % 2] for i in range(self.num_hidden_layers)]
        self.attention_types = list(self.attention_types or ())

    # The published networks. Drop path is that of training without token labels.

    @classmethod
    def small(cls, **overrides: Any) -> "RefinerConfig":
        """Refiner-S: 25,408,656 parameters. Keyword arguments override any field."""
        return cls._published(dict(num_hidden_layers=16, hidden_size=384, drop_path_rate=0.1), overrides)

    @classmethod
    def medium(cls, **overrides: Any) -> "RefinerConfig":
        """Refiner-M: 55,450,932 parameters. Keyword arguments override any field."""
        return cls._published(dict(num_hidden_layers=32, hidden_size=420, drop_path_rate=0.2), overrides)

    @classmethod
    def large(cls, **overrides: Any) -> "RefinerConfig":
        """Refiner-L: 81,150,192 parameters. Keyword arguments override any field."""
        size = dict(num_hidden_layers=32, hidden_size=512, num_attention_heads=16, drop_path_rate=0.2)
        return cls._published(size, overrides)

    @classmethod
    def _published(cls, size: dict[str, Any], overrides: dict[str, Any]) -> "RefinerConfig":
        fields = {"use_dense_head": True, **size, **overrides}
        if not {"num_labels", "id2label"} & fields.keys():
            fields["num_labels"] = 1000
        return cls(**fields)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        As [`~transformers.PreTrainedConfig.save_pretrained`]. Code that the configuration names (`auto_map`) is saved
        beside it, or isn't named.
        """
        with named_code_beside(self, save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)

    # What isn't saved. Modules read it at each call, as transformers' own read `_attn_implementation`.

    @property
    def refine_implementation(self) -> str:
        """How attention maps are refined."""
        return getattr(self, "_refine_implementation", "auto")

    @refine_implementation.setter
    def refine_implementation(self, name: str) -> None:
        self._refine_implementation = name

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.PreTrainedConfig.to_dict`], without `refine_implementation`."""
        content = super().to_dict()
        content.pop("_refine_implementation", None)
        return content

    # What follows from the fields.

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Number of patches, down and across."""
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: the class token, and perhaps a distillation token."""
        return 2 if self.use_distillation_token else 1

    @property
    def stage_names(self) -> list[str]:
        """What a backbone can give: the embeddings and each layer's output."""
        return ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]

    # By default the last stage, of however many there are then: a configuration may get other layers.
    @BackboneConfigMixin.out_features.getter
    def out_features(self) -> list[str]:
        """The stages that [`RefinerBackbone`] gives."""
        return [self.stage_names[-1]] if self._out_features is None else self._out_features

    @BackboneConfigMixin.out_indices.getter
    def out_indices(self) -> list[int]:
        """Their numbers in `stage_names`."""
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @property
    def label_names(self) -> list[str]:
        """The labels' names in the order of the logits."""
        return [self.id2label[i] for i in range(self.num_labels)]

    # Checks between fields; `strict` calls each `validate_*` at construction.

    def validate_image_and_patch_size(self):
        for name, size in (("image_size", self.image_size), ("patch_size", self.patch_size)):
            if len(_pair(size)) != 2 or min(_pair(size)) < 1:
                raise ValueError(f"{name} must be a positive integer or a pair (height, width) of them, got {size!r}.")
        for side, image, patch in zip(("height", "width"), self.image_height_width, self.patch_height_width):
            if image % patch:
                raise ValueError(f"The image's {side} ({image}) must be a multiple of the patch's ({patch}).")
        if self.use_conv_stem and any(patch % 2 for patch in self.patch_height_width):
            raise ValueError(
                f"The convolutional stem halves the image, so patch_size must be even, got {self.patch_size!r}. "
                "Use an even patch_size or use_conv_stem=False."
            )
        if self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}.")

    def validate_widths(self):
        for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )

    def validate_attention_types(self):
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, got {self.num_hidden_layers}.")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {_MOST_LAYERS:,}, got {self.num_hidden_layers}.")
        types = self.attention_types
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"attention_types has {len(types)} entries for num_hidden_layers={self.num_hidden_layers}; give one "
                "for each layer, or None to alternate 'plain' and 'shared_refined'."
            )
        for i, attention_type in enumerate(types):
            if attention_type not in ATTENTION_TYPES:
                raise ValueError(f"attention_types[{i}] is {attention_type!r}; choose among {ATTENTION_TYPES}.")
        if types[:1] == ["shared_refined"]:
            raise ValueError(
                "attention_types[0] is 'shared_refined', which refines the map of the layer before it, but there is "
                "none. Begin with 'plain' or 'refined'."
            )

    def validate_distillation(self):
        if self.use_distillation_head and not self.use_distillation_token:
            raise ValueError("use_distillation_head needs use_distillation_token=True: the head looks at that token.")

    def validate_refinement(self):
        if self.refinement not in REFINEMENT_NAMES:
            raise ValueError(f"refinement is {self.refinement!r}; choose among {', '.join(REFINEMENT_NAMES)}.")
        if self.expansion_ratio < 1:
            raise ValueError(f"expansion_ratio must be at least 1, got {self.expansion_ratio}.")
        if self.refinement_kernel_size < 1 or self.refinement_kernel_size % 2 == 0:
            raise ValueError(
                f"refinement_kernel_size must be odd (the refined map has the map's size), "
                f"got {self.refinement_kernel_size}."
            )
        if self.refinement == "talking_heads" and "shared_refined" in self.attention_types:
            raise ValueError(
                "refinement='talking_heads' mixes scores, and 'shared_refined' layers have none: they refine the map "
                "of another layer. Give attention_types of 'plain' and 'refined' only."
            )
        if self.refinement == "no_reduction":
            self._validate_no_reduction()

    def _validate_no_reduction(self):
        handed_on = self.accumulate_attention or "shared_refined" in self.attention_types
        if handed_on or self.cosine_regularizer_weight:
            raise ValueError(
                "refinement='no_reduction' makes more maps than there are heads, so the next layer can't go on with "
                "them. Set accumulate_attention=False and cosine_regularizer_weight=0, with attention_types of "
                "'plain' and 'refined' only."
            )
        width = self.hidden_size // self.num_attention_heads
        if width % self.expansion_ratio:
            raise ValueError(
                f"refinement='no_reduction' divides a head's width ({width}) among its expanded maps, so "
                f"expansion_ratio must divide it, got {self.expansion_ratio}."
            )

    def validate_numbers(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}.")
        for name in ("layer_norm_eps", "batch_norm_eps", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")

    def validate_rates(self):
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, which transformers doesn't know.")
        if self.residual_scale <= 0:
            raise ValueError(f"residual_scale must be positive, got {self.residual_scale}.")
        if not 0 < self.batch_norm_momentum <= 1:
            raise ValueError(f"batch_norm_momentum must be in (0, 1], got {self.batch_norm_momentum}.")


def _numbered(id2label: Any) -> dict[int, str]:
    """Labels by number."""
    try:
        numbered = {int(number): label for number, label in _dict("id2label", id2label).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"id2label must map each label's number to its name, such as {{0: 'cat'}}: {error}"
        ) from error
    if numbered and (min(numbered) != 0 or max(numbered) != len(numbered) - 1 or len(numbered) != len(id2label)):
        raise ValueError(
            f"id2label must number its {len(id2label):,} labels from 0 to {len(id2label) - 1:,}, each once; its "
            f"numbers go from {min(numbered)} to {max(numbered)}."
        )
    return numbered


def _dict(name: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict, got a {type(value).__name__}.")
    return value


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


__all__ = ["RefinerConfig"]
