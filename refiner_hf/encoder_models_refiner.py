# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Classes of refined models: each is made of one of transformers' own when it is first needed, `RefinedViTConfig` of
`ViTConfig` and `RefinedViTForImageClassification` of `ViTForImageClassification`.

A refined model's configuration says `"model_type": "refined"`, which model it is made of, and which of its attention
modules are refined. A process that doesn't know this package so can't load it without its refinements.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention_refiner import RefinerMapRefinement, set_refine_implementation
from .code_refiner import named_code_beside
from .configuration_refiner import RefinerConfig
from .encoder_attention_refiner import REFINED_ATTENTION, attach_refinement

# Importing it makes a classifier of DINOv3 known.
from .encoder_classifier_refiner import DINOv3ViTForImageClassification  # noqa: F401


class RefinedConfigMixin:
    """What a refined model's configuration has beside the fields of its base."""

    model_type = "refined"
    base_model_type: str
    refinement_config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.PreTrainedConfig.to_dict`], with the attention function that the model needs."""
        own = {"base_model_type": self.base_model_type, "attn_implementation": REFINED_ATTENTION}
        return {**super().to_dict(), **own}  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:  # type: ignore[override]
        """As [`~transformers.PreTrainedConfig.save_pretrained`]; `auto_map` names the code that lies beside it."""
        with named_code_beside(self, save_directory):
            super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    # The library's own refuses `True` with any attention function but its eager one. Here there are always maps.
    @property
    def output_attentions(self) -> bool:
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        pass

    def refinement_of(self, sizes: "Sizes") -> RefinerConfig:
        """The configuration of the refinement of an attention module of such sizes."""
        return refinement_config_of(self.refinement_config, sizes)


class RefinedModelMixin:
    """What a refined model does beside its base."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for refinement in attach_refinements(self):
            refinement.start_as_identity()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """
        Raises:
            `ValueError`: another attention function, which would leave the refinements out.
        """
        if requested_attention not in (None, REFINED_ATTENTION):
            raise ValueError(
                f"attn_implementation is {requested_attention!r}, but a refined model has an attention function of "
                "its own, which refines the maps. Leave the argument out."
            )
        return REFINED_ATTENTION

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_refine_implementation(self, refine_implementation: str) -> None:
        """As [`RefinerPreTrainedModel.set_refine_implementation`]. It isn't saved."""
        set_refine_implementation(self, refine_implementation)  # type: ignore[arg-type]


Sizes = dict[str, int]  # of an attention module: `num_attention_heads` and `hidden_size`


def refinement_config_of(settings: dict[str, Any], sizes: Sizes) -> RefinerConfig:
    """
    The configuration of the refinement of one attention module; `settings` as a refined model's `refinement_config`.
    """
    fields = {name: value for name, value in settings.items() if name != "modules"} | sizes
    return RefinerConfig(num_hidden_layers=1, attention_types=["refined"], accumulate_attention=False, **fields)


def become_refined(model: PreTrainedModel, settings: dict[str, Any]) -> list[RefinerMapRefinement]:
    """
    Makes a model one of the refined class of its own.

    Args:
        model: one of transformers' own.
        settings: the `refinement_config` of its configuration.

    Returns:
        its refinements, freshly initialised.
    """
    config = refined_config_class(type(model.config))
    model.config.__class__ = config
    model.config.refinement_config = settings
    model.__class__ = refined_model_class(type(model), config)
    # What a constructor notes for a class: which modules' outputs are hidden states and maps. Some versions of
    # transformers take a model for a key, and all keep a class's name.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)
    # The library saves a model under the names of the files that it was loaded from, which may be an older version's.
    # When it loads ours again, it wouldn't translate them.
    model.__dict__["_weight_conversions"] = []
    model.set_attn_implementation(REFINED_ATTENTION)
    return attach_refinements(model)


def attach_refinements(model: Any) -> list[RefinerMapRefinement]:
    """Gives the attention modules of a model the refinements that its configuration names; returns these."""
    found = []
    for name, sizes in model.config.refinement_config["modules"].items():
        module = _submodule(model, name)
        if sizes is None:
            module.refinement = None  # it weights its values with its own map
        else:
            found.append(attach_refinement(module, model.config.refinement_of(sizes)))
    return found


def _submodule(model: PreTrainedModel, name: str) -> Any:
    """By its name in the model that was refined, of which one may have had a head and this one not, or otherwise."""
    prefix = f"{model.base_model_prefix}."
    for each in (name, prefix + name, name.removeprefix(prefix)):
        try:
            return model.get_submodule(each)
        except AttributeError:
            continue
    raise ValueError(f"A {type(model).__name__} has no module {name}, which the configuration says is refined.")


_CLASSES: dict[Any, Any] = {}  # those of transformers with the refined ones that were made of them


def refined_config_class(base: type[PreTrainedConfig]) -> Any:
    """The class of a refined model's configuration, known to the Auto classes with those of its models."""
    if base not in _CLASSES:
        fields = {"base_model_type": base.model_type, "__module__": __name__}
        made = _CLASSES[base] = type(f"Refined{base.__name__}", (RefinedConfigMixin, base), fields)
        for mapping in _auto_mappings():
            if base in mapping:
                several = tuple(refined_model_class(each, made) for each in _tuple(mapping[base]))
                # The Auto classes take several for one configuration, and pick by `architectures`; only the library's
                # own way to register wants one.
                mapping.register(made, several if len(several) > 1 else several[0], exist_ok=True)
    return _CLASSES[base]


def is_loadable(model: PreTrainedModel) -> bool:
    """Whether some Auto class loads a refined model of this one's class, whether it is refined already or not."""
    config = type(model.config)
    return any(type(model) in _tuple(mapping[config]) for mapping in _auto_mappings() if config in mapping)


def class_as_saved(config: PreTrainedConfig, name: str | None = None) -> Any:
    """
    The class of the model that was saved with a configuration, or another of that `name` for the same configuration;
    `None` where no Auto class loads it.
    """
    kind, names = type(config), config.architectures or [] if name is None else [name]
    models = (model for mapping in _auto_mappings() if kind in mapping for model in _tuple(mapping[kind]))
    return next((model for model in models if model.__name__ in names), None)


def _auto_mappings() -> list[Any]:
    """Of each Auto class, the models by configuration."""
    autos: list[Any] = [each for each in vars(modeling_auto).values() if isinstance(each, type)]
    return [auto._model_mapping for auto in autos if getattr(auto, "_model_mapping", None) is not None]


def _tuple(models: Any) -> tuple[Any, ...]:
    return models if isinstance(models, tuple) else (models,)


def refined_model_class(base: type[PreTrainedModel], config: type[PreTrainedConfig]) -> Any:
    """The class of a refined model."""
    if base not in _CLASSES:
        fields = {"config_class": config, "__module__": __name__, "__doc__": f"A refined {base.__name__}."}
        _CLASSES[base] = type(f"Refined{base.__name__}", (RefinedModelMixin, base), fields)
    return _CLASSES[base]
