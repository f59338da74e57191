"""
Refinements as a PEFT adapter: some KB beside a model that stays as it is.

PEFT finds the kind of an adapter in tables, by the name that `adapter_config.json` says. Importing this enters ours.
"""

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..attention_refiner import set_refine_implementation
from ..encoder_attention_refiner import REFINED_ATTENTION
from ..encoder_models_refiner import Sizes, become_refined, refinement_config_of
from ..refinements_refiner import make_refinement
from .identity_start import start_as_identity
from .inputs import batches_of
from .modules import check_loadable, check_refinable, check_settings, choose_modules, detach


class _Name(str):
    """As a member of PEFT's own enumeration of kinds, which others can't extend."""

    @property
    def value(self) -> str:
        return str(self)


PEFT_TYPE = _Name("REFINEMENT")


@dataclass(kw_only=True)
class RefinementAdapterConfig(PeftConfig):
    """
    Configuration of an adapter that refines the attention maps of an encoder: for `get_peft_model`, `add_adapter` of
    transformers' models, `PeftModel.from_pretrained` and all that takes a PEFT adapter. Which encoders, and how the
    adapter starts, as [`refine`]; the encoder's own weights don't change.

    Args:
        inputs (*optional*): as [`refine`]'s: needed for a new adapter, and not saved.
        processing_class (*optional*): as [`refine`]'s.
        layers_to_transform (`list[int]`, *optional*): which layers refine their map, from 0. Default: all.
        refinement, expansion_ratio, refinement_kernel_size (*optional*): as in [`RefinerConfig`].
        modules_to_save (`list[str]`, *optional*): modules that are trained and saved whole beside the adapter, such as
            `["classifier"]`.
        modules (`dict`, *optional*): is found out: every attention module's name, with its sizes where it is refined.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from refiner_hf import RefinementAdapterConfig

    >>> config = RefinementAdapterConfig(
    ...     inputs=dataset["train"], processing_class=tokenizer, modules_to_save=["classifier"]
    ... )
    >>> model = get_peft_model(model, config)
    ```"""

    inputs: Any = field(default=None, repr=False)
    processing_class: Any = field(default=None, repr=False)
    layers_to_transform: list[int] | None = None
    refinement: str = "expansion_convolution"
    expansion_ratio: int = 3
    refinement_kernel_size: int = 3
    modules_to_save: list[str] | None = None
    modules: dict[str, Sizes | None] | None = None
    target_modules: list[str] | None = field(default=None, init=False)  # PEFT wants it; these are `modules`

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        light = copy(self)
        light.inputs = light.processing_class = None  # they would be copied
        content = super(RefinementAdapterConfig, light).to_dict()
        return {
            name: content[name] for name in content if name not in ("inputs", "processing_class", "target_modules")
        }

    def settings(self) -> dict[str, Any]:
        """As the `refinement_config` of a whole refined model's configuration."""
        names = ("refinement", "expansion_ratio", "refinement_kernel_size", "modules")
        return {name: getattr(self, name) for name in names}


class RefinementLayer(nn.Module, BaseTunerLayer):
    """The refinement of an attention module by its adapters: those that are active, one after the other."""

    adapter_layer_names = ("adapters",)

    def __init__(self, attention: nn.Module):
        nn.Module.__init__(self)
        self.adapters = nn.ModuleDict()
        self._like = [next(attention.parameters())]  # in a list, so that it isn't a parameter of this module

    def forward(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes as [`RefinerMapRefinement.forward`]'s."""
        refined = attention_map
        for refinement in self._active():
            if refined.shape[1] != attention_map.shape[1]:
                raise ValueError(
                    "The maps of refinement='no_reduction' are more than there are heads: no other adapter can refine "
                    "them. Make it the last of the active adapters, or the only one."
                )
            refined = refinement(refined.to(next(refinement.parameters()).dtype), mask=mask)
        return refined.to(attention_map.dtype)

    def refine_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """As [`RefinerMapRefinement.refine_scores`]."""
        for refinement in self._active():
            scores = refinement.refine_scores(scores)
        return scores

    def refine_values(self, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """As [`RefinerMapRefinement.refine_values`]."""
        for refinement in self._active():
            value = refinement.refine_values(value, mask)
        return value

    def _active(self) -> list[Any]:
        names = () if self.disable_adapters else self.active_adapters
        return [self.adapters[name] for name in names if name in self.adapters]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # Half precision is too coarse for the norms' statistics.
        return self._like[0].device, torch.promote_types(self._like[0].dtype, torch.float32)


class RefinementTuner(BaseTuner):
    """
    Gives attention modules their [`RefinementLayer`], and the model the attention function that calls it.

    Raises:
        `ValueError`: a new adapter without `inputs`, a model that can't be refined (as [`refine`]), or one that lacks
            a module that a saved adapter refines.
    """

    prefix = "refinement."  # parameters of an adapter have it in their names
    tuner_layer_cls = RefinementLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_refinable(model)
        config: Any = self.peft_config[adapter_name]
        batches = None if config.inputs is None else batches_of(model, config.inputs, config.processing_class)
        if config.modules is None:
            if batches is None:
                raise ValueError(
                    "A new refinement starts as the identity on examples: give RefinementAdapterConfig some as inputs."
                )
            config.modules = choose_modules(model, batches[0], config.layers_to_transform)
        check_settings(config.settings())
        _check_modules(model, config.modules)
        before = model.config._attn_implementation
        try:
            for name in config.modules:
                module = model.get_submodule(name)
                if not hasattr(module, "refinement"):
                    module.refinement = None
            model.set_attn_implementation(REFINED_ATTENTION)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if batches is not None:
                self._start(model, adapter_name, batches)
        except BaseException:
            for layer in _layers(model, adapter_name).values():
                del layer.adapters[adapter_name]
            if before != REFINED_ATTENTION:
                detach(model, config.modules)
                model.set_attn_implementation(before)
            raise
        if before != REFINED_ATTENTION:
            self.attention_before = before

    def _start(self, model: Any, adapter_name: str, batches: list[dict[str, Any]]) -> None:
        """The new adapter, which needn't be active, as the identity on these inputs."""
        layers: list[Any] = list(_layers(model, adapter_name).values())
        active = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = [*(name for name in layer.active_adapters if name != adapter_name), adapter_name]
        try:
            start_as_identity(model, [layer.adapters[adapter_name] for layer in layers], batches)
        finally:
            for layer, names in zip(layers, active):
                layer._active_adapter = names

    def set_refine_implementation(self, refine_implementation: str) -> None:
        """As [`RefinerPreTrainedModel.set_refine_implementation`]."""
        set_refine_implementation(self.model, refine_implementation)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """
        One refined model of base and adapter, as [`refine`] makes it, that doesn't need PEFT.

        Args:
            adapter_names (`list[str]`, *optional*): the one to take, by default the one that is active.

        Raises:
            `ValueError`: not one but several, or none; or no Auto class loads the base model.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if len(names) != 1:
            raise ValueError(f"A refined model has one refinement, not {len(names)}: choose one by adapter_names.")
        check_loadable(self.model)
        config: Any = self.peft_config[names[0]]
        trained = {name: layer.adapters[names[0]].state_dict() for name, layer in _layers(self.model, *names).items()}
        model: Any = self.unload()
        become_refined(model, config.settings())
        for module, weights in trained.items():
            model.get_submodule(module).refinement.load_state_dict(weights)
        return model

    def unload(self) -> nn.Module:
        """The model as it was before."""
        ours = [config for config in self.peft_config.values() if isinstance(config, RefinementAdapterConfig)]
        names = {name for config in ours for name in config.modules or ()}
        model: Any = super().unload()
        detach(model, names)
        model.set_attn_implementation(self.attention_before)
        return model

    # What PEFT asks of a tuner.

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return (peft_config.modules or {}).get(key) is not None

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target: Any, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if target.refinement is None:
            target.refinement = RefinementLayer(target)
        refinement = make_refinement(refinement_config_of(peft_config.settings(), peft_config.modules[current_key]))
        refinement.start_as_identity()
        target.refinement.adapters[adapter_name] = refinement.train(target.training)
        target.refinement._move_adapter_to_device_of_base_layer(adapter_name)
        target.refinement.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own asks for a `weight`, which not every classifier has

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A refinement works on attention maps, so it can't be merged into weights. merge_and_unload() gives one "
            "refined model of both."
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".refinement.adapters.{adapter_name}.", ".refinement.adapters.", 1)


def _check_modules(model: nn.Module, modules: dict[str, Sizes | None]) -> None:
    there = {name for name, _ in model.named_modules()}
    if missing := [name for name in modules if name not in there]:
        raise ValueError(
            f"The adapter refines {missing[0]}, which a {type(model).__name__} doesn't have. Load the base model as "
            "the class for which the adapter was made: adapter_config.json says it in auto_mapping."
        )


def _layers(model: nn.Module, adapter_name: str) -> dict[str, RefinementLayer]:
    """By the name of the attention module, those that an adapter refines."""
    layers = {
        name.removesuffix(".refinement"): m for name, m in model.named_modules() if isinstance(m, RefinementLayer)
    }
    return {name: layer for name, layer in layers.items() if adapter_name in layer.adapters}


# (PEFT's own function for this takes only names that PEFT itself lists.)
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = RefinementAdapterConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = RefinementTuner  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = RefinementTuner.prefix  # type: ignore[index]
