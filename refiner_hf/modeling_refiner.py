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
"""
PyTorch Refiner model.

Shapes: B batch, C channels, P = grid height * grid width patches, T = 1 class token or 2 with a distillation token,
N = T + P tokens (the patches last), D width, H heads, K labels. Attention maps are (B, H, N, N).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_refiner import RefinerMapRefinement, check_refine_implementation
from .configuration_refiner import RefinerConfig
from .embeddings_refiner import RefinerEmbeddings, RefinerPatchEmbeddings, patches_to_pixels
from .folding_refiner import has_hooks, is_transformed
from .inference_refiner import call_linear, call_linear_and_activation
from .loss_refiner import image_classification_loss
from .native_refiner import attends, native_attend
from .normalization_refiner import RefinerBatchNorm2d
from .operations_refiner import side_by_side
from .prepacking_refiner import prepack
from .refinements_refiner import make_refinement
from .token_mixing_refiner import mix_tokens, sample_mixing_mask
from .triton_attention_refiner import make_map, makes_map


logger = logging.get_logger(__name__)


@dataclass
class RefinerModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`RefinerModel`]: `last_hidden_state` (B, N, D) after the last norm, `pooler_output` (B, D) its class
    token, and when asked for

    - `hidden_states`: the embeddings and each layer's output, `num_hidden_layers + 1` of (B, N, D);
    - `attentions`: `attentions[i]` is the map that weighted layer i's values, (B, H, N, N), or with more than H heads
      where the refinement leaves them expanded;
    - `map_similarity`: mean cosine similarity between consecutive layers' maps across heads, a scalar; only in
      training with `cosine_regularizer_weight`.
    """

    map_similarity: torch.FloatTensor | None = None


@dataclass
class RefinerImageClassifierOutput(ImageClassifierOutput):
    """
    Output of [`RefinerForImageClassification`]: `loss` (with labels), `logits` (B, K), `hidden_states` and
    `attentions` as in [`RefinerModelOutput`], and in training with a dense head its `patch_logits` (B, P, K); `logits`
    are then the class token's alone, while in evaluation the two come joined.
    """

    patch_logits: torch.FloatTensor | None = None


class RefinerAttention(nn.Module):
    """
    Self-attention whose map may be refined. `attention_type` says what a layer does with its map, see
    [`RefinerConfig`].
    """

    def __init__(self, config: RefinerConfig, attention_type: str):
        super().__init__()
        self.config = config
        self.attention_type = attention_type
        self.accumulate_attention = config.accumulate_attention
        self.num_attention_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5

        if attention_type != "shared_refined":
            self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
            self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if attention_type != "plain":
            self.refinement = make_refinement(config)

    def forward(
        self, hidden_states: torch.Tensor, previous_map: torch.Tensor | None, map_needed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, N, D).
            previous_map: the map that the layer before passed on, (B, H, N, N).
            map_needed: whether anybody looks at the map that weights the values.

        Returns:
            the output (B, N, D), the map that weighted the values, and the map passed on to the next layer; no maps
            where they aren't needed and the values could be weighted without ever making one.
        """
        value = self._heads(call_linear(self.v_proj, hidden_states))
        if self.attention_type != "plain":
            value = self.refinement.refine_values(value)
        if self.attention_type == "shared_refined":
            output, attention_map = self.refinement.weigh(previous_map, value, self.scaling, map_needed)
            return call_linear(self.o_proj, output), attention_map, previous_map
        query, key = (self._heads(call_linear(each, hidden_states)) for each in (self.q_proj, self.k_proj))
        output, attention_map = self._attend(query, key, value, previous_map, map_needed)
        return call_linear(self.o_proj, output), attention_map, attention_map

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        previous_map: torch.Tensor | None,
        map_needed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Three times (B, H, N, D / H), (B, H, N, N) -> the weighted values (B, N, D), and this layer's map."""
        if not map_needed and self._is_plain(previous_map):
            output = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scaling)
            return side_by_side(output), None
        added = previous_map if self._accumulates(previous_map) else None
        weighted = value if self.attention_type == "plain" else None
        # In training a checkpointed layer must do the same with and without gradients.
        if not self._drops and makes_map(self.config, query, key, value, added):
            kernel_size = None if self.training else self.config.refinement_kernel_size
            attention_map, output = make_map(query, key, weighted, added, self.scaling, kernel_size)
        elif weighted is not None and not self.training and attends(query, key, value, added):
            attention_map, output = native_attend(query, key, value, added, self.scaling)
        else:
            attention_map, output = self._own_map(query, key, previous_map), None
        if self.attention_type == "refined":
            return self.refinement.weigh(attention_map, value, map_needed=map_needed)
        if output is None:
            output = side_by_side(attention_map @ value)
        return output, attention_map

    def _own_map(self, query: torch.Tensor, key: torch.Tensor, previous_map: torch.Tensor | None) -> torch.Tensor:
        """(B, H, N, D / H), the same, (B, H, N, N) -> the map before any refinement, (B, H, N, N)."""
        scores = (query * self.scaling) @ key.transpose(-2, -1)
        if self.attention_type == "refined":
            scores = self.refinement.refine_scores(scores)
        attention_map = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        if self._accumulates(previous_map):
            # Nobody else has this map yet; but softmax's backward pass needs its own result, and a record is the same
            # with and without gradients.
            keeps = attention_map.requires_grad or is_transformed(attention_map)
            add = torch.add if keeps else torch.Tensor.add_
            attention_map = add(attention_map, previous_map, alpha=self.scaling)
        return self.dropout(attention_map)

    def _accumulates(self, previous_map: torch.Tensor | None) -> bool:
        return self.accumulate_attention and previous_map is not None

    def _is_plain(self, previous_map: torch.Tensor | None) -> bool:
        """Whether nothing is done with the map but to weight the values."""
        return self.attention_type == "plain" and not self._accumulates(previous_map) and not self._drops

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class RefinerMLP(nn.Module):
    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return call_linear(self.fc2, call_linear_and_activation(self.fc1, self.activation_fn, hidden_states))


class RefinerLayerScale(nn.Module):
    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(config.layerscale_value * torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class RefinerLayer(GradientCheckpointingLayer):
    """`x + branch(norm(s * x)) / s` for attention and MLP, with the residual scale s."""

    def __init__(self, config: RefinerConfig, attention_type: str, drop_path_rate: float):
        super().__init__()
        self.residual_scale = config.residual_scale
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = RefinerAttention(config, attention_type)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RefinerMLP(config)
        self.layer_scale = RefinerLayerScale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = StochasticDepth(drop_path_rate, "row") if drop_path_rate > 0 else nn.Identity()

    # The map comes and goes positionally: activation checkpointing follows gradients through nothing else.
    def forward(
        self, hidden_states: torch.Tensor, previous_map: torch.Tensor | None, map_needed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """((B, N, D), the map passed on by the layer before, whether this one's is needed) -> ((B, N, D), the map)."""
        normalised = self._normalise(self.layernorm_before, hidden_states)
        branch, _, passed_on = self.attention(normalised, previous_map, map_needed)
        hidden_states = self._add(hidden_states, branch)
        branch = self.layer_scale(self.mlp(self._normalise(self.layernorm_after, hidden_states)))
        return self._add(hidden_states, branch), passed_on

    def _normalise(self, norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """norm(s * x); without making s * x, as dividing eps does the same."""
        scale = self.residual_scale
        if type(norm) is not nn.LayerNorm or has_hooks(norm):
            return norm(hidden_states * scale)
        return nn.functional.layer_norm(
            hidden_states, norm.normalized_shape, norm.weight, norm.bias, norm.eps / scale**2
        )

    def _add(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """x + branch / s"""
        return torch.add(hidden_states, self.drop_path(self.dropout(branch)), alpha=1 / self.residual_scale)


class RefinerPreTrainedModel(PreTrainedModel):
    """Initialisation, loading at other image sizes and the choice of the refinement's implementation."""

    config: RefinerConfig
    base_model_prefix = "refiner"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RefinerEmbeddings", "RefinerLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RefinerLayer, "attentions": RefinerAttention}
    _input_embed_layer = "patch_embeddings"
    # The loss is a mean over images; without this the Trainer takes it for a sum under gradient accumulation.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d):
            # PyTorch's own default, see `initializer_range` in RefinerConfig.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, RefinerEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.distillation_token is not None:
                init.trunc_normal_(module.distillation_token, std=self.config.initializer_range)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
        elif isinstance(module, RefinerMapRefinement) and not module.has_output_norm:
            module.start_as_identity()  # without a norm nothing corrects the scale of random weights
        elif isinstance(module, RefinerLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`]. With another `image_size` than the checkpoint's (as a
        keyword or in `config`) the position embeddings are resized (bicubic) and a warning says so.
        `refine_implementation` chooses how attention maps are refined (`"auto"` by default).
        """
        if isinstance(config, str | Path):
            config = cls.config_class.from_pretrained(config)
        # Any config object: code from the Hub has a RefinerConfig of its own for each file that imports it.
        given = isinstance(config, PreTrainedConfig)
        if given:
            config = _with_refine_implementation(config, kwargs)
        wanted = config.image_size if given else kwargs.get("image_size")
        saved = _saved_image_size(pretrained_model_name_or_path, kwargs) if wanted is not None else None
        if saved is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        # Load at the checkpoint's size, then resize.
        if given:
            config = copy.deepcopy(config)
            config.image_size = saved
        else:
            kwargs["image_size"] = saved
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_image_size(wanted)
        return loaded

    @classmethod
    def _from_config(cls, config, **kwargs):
        # What `from_config` of the Auto classes calls.
        return super()._from_config(_with_refine_implementation(config, kwargs), **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """
        `"eager"` (the default) and `"sdpa"` do the same here: a plain layer whose map nobody needs weights its values
        by [`torch.nn.functional.scaled_dot_product_attention`], and every other layer makes its map. With `"sdpa"`,
        transformers' configurations refuse `output_attentions=True`.

        Raises:
            `ValueError`: anything else, which would make no map to refine.
        """
        if requested_attention not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation is {requested_attention!r}, but a Refiner needs its attention maps, to refine "
                "them: take 'eager' or 'sdpa', which are the same here."
            )
        if requested_attention == "sdpa":
            logger.warning_once(
                "attn_implementation='sdpa' is the same as 'eager' in a Refiner: plain layers use SDPA where nobody "
                "needs their map, and all other layers make their map."
            )
        return requested_attention or "eager"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # both choices are the same, so there is nothing to exchange

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """
        Makes the model take images of another size: resizes the position embeddings (bicubic, as the reference does
        when it loads a checkpoint) and sets `config.image_size`. A warning says so where the patch grid changes.

        Args:
            image_size (`int` or `tuple[int, int]`): height and width in pixels, multiples of the patch's.

        Raises:
            `StrictDataclassError` (of `huggingface_hub.errors`): `image_size` isn't a multiple of the patch size;
            nothing is changed.
            `ValueError`: the position embeddings are offloaded, so that they can't be changed.
        """
        resized = type(self.config)(
            image_size=image_size, patch_size=self.config.patch_size, use_conv_stem=self.config.use_conv_stem
        )
        old, new = self.config.patch_grid, resized.patch_grid
        embeddings = self.base_model.embeddings
        if embeddings.position_embeddings.is_meta:
            raise ValueError(
                "The position embeddings are offloaded, so they can't be resized. Load the model whole, call "
                "set_image_size, save it, and load that folder with the device_map."
            )
        with torch.no_grad():
            positions = embeddings.position_embeddings.clone()
            if old != new:
                positions = embeddings.resized_positions(new, mode="bicubic", align_corners=False)
        embeddings.position_embeddings = nn.Parameter(
            positions, requires_grad=embeddings.position_embeddings.requires_grad
        )
        self.config.image_size = embeddings.config.image_size = image_size
        if old != new:
            logger.warning(
                f"Position embeddings were resized (bicubic) from {old[0]}x{old[1]} to {new[0]}x{new[1]} patches for "
                f"image_size={image_size}."
            )

    def set_refine_implementation(self, refine_implementation: str) -> None:
        """
        Chooses how attention maps are refined, from now on, in every layer.

        Args:
            refine_implementation (`str`): `"auto"` or a key of `refiner_hf.REFINE_IMPLEMENTATIONS`. It isn't saved.

        Raises:
            `ValueError`: an unknown name.
        """
        self.config.refine_implementation = check_refine_implementation(refine_implementation)

    def freeze_norms(self, frozen: bool = True) -> None:
        """
        Keeps every batch norm in evaluation mode from now on, also under `train()`: batches are normalised with the
        running statistics, which don't move. `freeze_norms(False)` undoes it. It isn't saved.
        """
        for module in self.modules():
            if isinstance(module, RefinerBatchNorm2d):
                module.frozen = frozen
                module.train(self.training)

    def synchronize_norms(self, synchronized: bool = True) -> None:
        """
        Makes every batch norm, from now on, normalise a training batch with the statistics of all processes' batches
        together (`torch.distributed`, any device). Processes under data parallelism then compute what one process
        would compute on the joined batch. `synchronize_norms(False)` undoes it. It isn't saved.
        """
        for module in self.modules():
            if isinstance(module, RefinerBatchNorm2d):
                module.synchronized = synchronized

    def prepack_weights(self) -> None:
        """
        Keeps, for inference in float32 on a CPU, a second copy of the weights of linear layers and of the patch
        projection, in the order in which the processor multiplies with them. With one image or a few, a forward
        without gradients is faster then, also compiled. The copies go with the model and aren't saved. A copy of the
        model, a model that was moved to another device or type, and layers whose weight was replaced answer without
        them: call this again.

        A weight that is changed in place, by an optimizer, `load_state_dict` or under `torch.no_grad()`, is packed
        again when it is next used. A change that torch doesn't count, through `weight.data` or another tensor in the
        same memory, is noticed if one of a few numbers spread over the weight has changed; so after an edit of a part
        of `weight.data`, call this again.

        Raises:
            `ValueError`: the weights aren't float32 on a CPU, two lie in the same memory, or there is no C++ compiler.
        """
        layers = [module for module in self.modules() if type(module) is nn.Linear]
        projections = [module.projection for module in self.modules() if isinstance(module, RefinerPatchEmbeddings)]
        self._prepacked_weights = prepack([layer.weight for layer in layers + projections])

    def _grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Number of patches of these images, down and across."""
        patch_height, patch_width = self.config.patch_height_width
        return pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width


def _with_refine_implementation(config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedConfig:
    """The configuration with `refine_implementation`, if it is among `kwargs`, of which it is taken out."""
    if "refine_implementation" in kwargs:
        config = copy.deepcopy(config)
        config.refine_implementation = kwargs.pop("refine_implementation")
    return config


class RefinerModel(RefinerPreTrainedModel):
    """
    The bare Refiner: images to tokens.

    Args:
        config ([`RefinerConfig`]): the architecture.
        use_mask_token (`bool`, *optional*, defaults to `False`): a learned embedding for masked patches.
    """

    def __init__(self, config: RefinerConfig, use_mask_token: bool = False):
        # Fields may have been changed since it was made, by from_pretrained's keywords for one.
        config.complete()
        config.validate()
        check_refine_implementation(config.refine_implementation)
        super().__init__(config)
        drop_path = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.embeddings = RefinerEmbeddings(config, use_mask_token)
        self.layers = nn.ModuleList(
            RefinerLayer(config, attention_type, rate)
            for attention_type, rate in zip(config.attention_types, drop_path)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        mixing_mask: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefinerModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape (B, C, height, width)): images, as the image processor gives them.
            bool_masked_pos (`torch.BoolTensor` of shape (B, P), *optional*): true for the patches to hide behind the
                mask token, see [`RefinerForMaskedImageModeling`].
            interpolate_pos_encoding (`bool`, *optional*): take images of another size than `config.image_size`, with
                positions interpolated on the fly (bilinear, corners aligned, as in the reference's forward).
            mixing_mask (`torch.BoolTensor` of shape (grid height, grid width), *optional*): box of patches to swap
                between the images of the batch (token mixing).
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*): as everywhere in transformers.

        Returns:
            [`RefinerModelOutput`].

        Raises:
            `ValueError`: missing images, or images of the wrong rank, number of channels or size.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(f"pixel_values must be a floating point tensor, got {kind}: use the image processor.")
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding, mixing_mask, bool_masked_pos)

        maps_asked_for = kwargs.get("output_attentions", self.config.output_attentions)
        attention_map, similarities = None, []
        for i, layer in enumerate(self.layers):
            previous_map = attention_map
            hidden_states, attention_map = layer(hidden_states, previous_map, maps_asked_for or self._map_is_needed(i))
            if i > 0 and self._regularizes_pair(i):
                similarities.append(nn.functional.cosine_similarity(previous_map, attention_map, dim=1).mean())

        hidden_states = self.norm(hidden_states)
        return RefinerModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            map_similarity=torch.stack(similarities).mean() if similarities else None,
        )

    def _map_is_needed(self, layer: int) -> bool:
        """Whether the next layer takes the map that weights the values of `layer`, or the cosine regulariser."""
        types = self.config.attention_types
        if types[layer] == "shared_refined":
            return False  # it passes on the one that it got
        if self._regularizes_pair(layer):
            return True
        if layer + 1 == len(types):
            return False
        return (
            types[layer + 1] == "shared_refined"
            or self.config.accumulate_attention
            or self._regularizes_pair(layer + 1)
        )

    def _regularizes_pair(self, layer: int) -> bool:
        """Whether the cosine regulariser counts the maps passed on by `layer` and the one before it."""
        repeated = self.config.attention_types[layer] == "shared_refined"
        return (
            self.training
            and self.config.cosine_regularizer_weight > 0
            and (not repeated or self.config.cosine_regularizer_repeated_pairs)
        )


class RefinerForImageClassification(RefinerPreTrainedModel):
    """
    A Refiner with a classifier on the class token; with `config.use_dense_head` also one on the patch tokens, with
    `config.use_distillation_head` one on the distillation token.

    Args:
        config ([`RefinerConfig`]): the architecture.
    """

    def __init__(self, config: RefinerConfig):
        super().__init__(config)
        if config.num_labels < 1:
            raise ValueError("A classifier needs at least one label. For features take RefinerModel.")
        self.num_labels = config.num_labels
        self.refiner = RefinerModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.distillation_classifier = self.dense_classifier = None
        if config.use_distillation_head:
            self.distillation_classifier = nn.Linear(config.hidden_size, config.num_labels)
        if config.use_dense_head:
            self.dense_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.loss_function = image_classification_loss
        self.post_init()

    def reset_classifier(self, labels: list[str]) -> None:
        """
        New, freshly initialised classifiers for other labels; the rest of the network stays.

        Args:
            labels (`list[str]`): the labels' names, in order. They become `config.id2label`.

        Raises:
            `ValueError`: no labels, or one name twice.
        """
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"The labels must be one or more different names, got {labels}.")
        self.config.id2label = dict(enumerate(labels))
        self.config.label2id = {label: i for i, label in enumerate(labels)}
        self.num_labels = len(labels)
        for name in ("classifier", "distillation_classifier", "dense_classifier"):
            if (old := getattr(self, name)) is not None:
                new = nn.Linear(old.in_features, len(labels)).to(old.weight)
                self._init_weights(new)
                setattr(self, name, new)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RefinerImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape (B, C, height, width)): images, as the image processor gives them.
            labels (`torch.Tensor`, *optional*): integers (B,), soft labels (B, K) or dense targets (B, K, 2 + P); see
                [`~loss_refiner.image_classification_loss`].
            interpolate_pos_encoding (`bool`, *optional*): take images of another size, see [`RefinerModel.forward`].
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*): as everywhere in transformers.

        Returns:
            [`RefinerImageClassifierOutput`].

        Raises:
            `ValueError`: images or labels that don't fit the model.
        """
        mixing_mask = None
        if self.training and self.config.token_mixing and pixel_values is not None:
            mixing_mask = sample_mixing_mask(self._grid_of(pixel_values), pixel_values.device)

        outputs: RefinerModelOutput = self.refiner(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            mixing_mask=mixing_mask,
            return_dict=True,  # whatever the configuration says: the tuple is made outside
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        if self.distillation_classifier is not None:
            logits = (logits + self.distillation_classifier(outputs.last_hidden_state[:, 1])) / 2
        patch_logits = None
        if self.dense_classifier is not None:
            patch_logits = self.dense_classifier(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])
            if not self.training:
                logits = logits + self.config.dense_logits_weight * patch_logits.amax(dim=1)
                patch_logits = None
            elif mixing_mask is not None:
                patch_logits = mix_tokens(patch_logits, mixing_mask)  # back to the images that the patches came from

        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, patch_logits=patch_logits, mixing_mask=mixing_mask)
            if outputs.map_similarity is not None:
                loss = loss + self.config.cosine_regularizer_weight * outputs.map_similarity

        return RefinerImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_logits=patch_logits,
        )


class RefinerForMaskedImageModeling(RefinerPreTrainedModel):
    """
    A Refiner that learns to paint masked patches from the others, for pretraining without labels (as in SimMIM,
    [arXiv 2111.09886](https://huggingface.co/papers/2111.09886)): masked patches are replaced by a learned token, and
    a linear layer predicts their pixels.

    What is under the mask reaches nothing but the loss, also with the convolutional stem, which looks across patches.

    Args:
        config ([`RefinerConfig`]): the architecture.
    """

    def __init__(self, config: RefinerConfig):
        super().__init__(config)
        self.refiner = RefinerModel(config, use_mask_token=True)
        self.decoder = nn.Linear(config.hidden_size, config.num_channels * math.prod(config.patch_height_width))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape (B, C, height, width)): images, as the image processor gives them.
            bool_masked_pos (`torch.BoolTensor` of shape (B, P), *optional*): true for the patches to hide.
            interpolate_pos_encoding (`bool`, *optional*): take images of another size, see [`RefinerModel.forward`].
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*): as everywhere in transformers.

        Returns:
            [`~transformers.modeling_outputs.MaskedImageModelingOutput`]: `reconstruction` (B, C, height, width) in
            the scale of `pixel_values`, and with `bool_masked_pos` the `loss`: mean absolute difference over the
            masked pixels, 0 where nothing is masked.

        Raises:
            `ValueError`: images or masks that don't fit the model.
        """
        outputs: RefinerModelOutput = self.refiner(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            bool_masked_pos=bool_masked_pos,
            return_dict=True,
            **kwargs,
        )
        height, width = pixel_values.shape[-2:]
        patch_height, patch_width = self.config.patch_height_width
        rows, columns = self._grid_of(pixel_values)
        reconstruction = (
            self.decoder(outputs.last_hidden_state[:, self.config.num_prefix_tokens :])
            .view(-1, rows, columns, self.config.num_channels, patch_height, patch_width)
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(-1, self.config.num_channels, height, width)
        )

        loss = None
        if bool_masked_pos is not None:
            masked = patches_to_pixels(bool_masked_pos.bool().view(-1, rows, columns), (patch_height, patch_width))
            difference = (reconstruction - pixel_values).abs() * masked
            # In float32: a sum over a batch's pixels is soon too large for half precision.
            loss = difference.sum(dtype=torch.float32) / (self.config.num_channels * masked.sum()).clamp(min=1)
            if outputs.map_similarity is not None:
                loss = loss + self.config.cosine_regularizer_weight * outputs.map_similarity

        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RefinerBackbone(BackboneMixin, RefinerModel):
    """
    A Refiner that gives the feature maps of chosen layers to a detection or segmentation head: `"stem"` is the
    embeddings, `"stage1"`, `"stage2"`, ... are the layers' outputs. `config.out_features` or `config.out_indices`
    chooses; by default the last.

    Args:
        config ([`RefinerConfig`]): the architecture.

    Example:

    ```python
    >>> from refiner_hf import RefinerBackbone

    >>> backbone = RefinerBackbone.from_pretrained("USER/my-refiner", out_features=["stage4", "stage8", "stage16"])
    ```"""

    def __init__(self, config: RefinerConfig):
        config = copy.deepcopy(config)  # the default is this backbone's own: another may have fewer layers
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape (B, C, height, width)): images; height and width may be any
                multiples of the patch's.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`): take images of another size than
                `config.image_size`, see [`RefinerModel.forward`].
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*): as everywhere in transformers.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`]: `feature_maps`, for each chosen stage
            (B, D, grid height, grid width), or (B, N, D) without `config.reshape_hidden_states`; normed by the last
            layer norm unless `config.apply_layernorm` is off.

        Raises:
            `ValueError`: missing images, or images of the wrong rank, number of channels or size.
        """
        # Not super(): the mixin, which must come first, has a forward of its own that only raises.
        outputs: RefinerModelOutput = RefinerModel.forward(
            self, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        grid = self._grid_of(pixel_values)
        feature_maps = []
        for stage, features in zip(self.stage_names, outputs.hidden_states):
            if stage not in self.out_features:
                continue
            if self.config.apply_layernorm:
                features = self.norm(features)
            if self.config.reshape_hidden_states:
                features = features[:, self.config.num_prefix_tokens :].transpose(1, 2)
                features = features.unflatten(2, grid).contiguous()  # (B, D, rows, columns)
            feature_maps.append(features)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _saved_image_size(pretrained_model_name_or_path, kwargs: dict[str, Any]) -> int | list[int] | None:
    """The `image_size` in a checkpoint's own config.json, `None` where there is no such file to ask."""
    if pretrained_model_name_or_path is None:
        return None
    config, _ = RefinerConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
    return config.get("image_size", RefinerConfig.image_size)


__all__ = [
    "RefinerBackbone",
    "RefinerForImageClassification",
    "RefinerForMaskedImageModeling",
    "RefinerModel",
    "RefinerPreTrainedModel",
]
