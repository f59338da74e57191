"""A network's architecture as a table."""

from transformers import PreTrainedModel

from ..encoder_models_refiner import RefinedConfigMixin
from ..modeling_refiner import RefinerForImageClassification, RefinerPreTrainedModel
from ..refinements_refiner import REFINEMENTS
from ..utils.flops import count_flops
from ..utils.image_config import channels_of, image_size_of, of_images
from ..utils.markdown import markdown_table
from ..utils.text import counted


def describe_network(model: PreTrainedModel) -> str:
    """A table of [`network_facts`]."""
    return markdown_table(["", ""], network_facts(model).items())


def network_facts(model: PreTrainedModel) -> dict[str, str]:
    """A network's architecture, its number of parameters and its cost, by topic."""
    rows = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    if model.main_input_name == "pixel_values":
        rows |= _images(model)
    return rows | (_refiner(model) if isinstance(model, RefinerPreTrainedModel) else _encoder(model))


def _images(model: PreTrainedModel) -> dict[str, str]:
    height, width = image_size_of(model.config)
    patch = getattr(of_images(model.config), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else patch
    patches = f", patches of {' x '.join(map(str, sides))}" if sides else ""
    return {
        "cost of an image": f"{_giga(count_flops(model))} GFLOP (2 per multiply-add)",
        "images": f"{height} x {width} pixels, {counted(channels_of(model.config), 'channel')}{patches}",
    }


def _refiner(model: RefinerPreTrainedModel) -> dict[str, str]:
    config = model.config
    types = {name: config.attention_types.count(name) for name in dict.fromkeys(config.attention_types)}
    rows = {
        "layers": f"{config.num_hidden_layers} ("
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in types.items())
        + ")",
        "width, MLP width": f"{config.hidden_size}, {config.intermediate_size}",
        "attention heads": str(config.num_attention_heads),
        "embedding": "convolutional stem" if config.use_conv_stem else "patch projection",
    }
    if isinstance(model, RefinerForImageClassification):
        rows |= {"dense head": "yes" if config.use_dense_head else "no", "labels": str(config.num_labels)}
    if set(config.attention_types) != {"plain"}:
        rows["refinement"] = REFINEMENTS[config.refinement].describe(config)
    return rows


def _encoder(model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    rows = {"made of": f"transformers' `{type(model).__name__.removeprefix('Refined')}`"}
    if isinstance(config, RefinedConfigMixin):
        modules = config.refinement_config["modules"]
        refined = [sizes for sizes in modules.values() if sizes is not None]
        kind = REFINEMENTS[config.refinement_config["refinement"]]
        rows |= {
            "layers": f"{len(modules)}, of which {len(refined)} refine their map",
            "attention heads": ", ".join(map(str, sorted({sizes["num_attention_heads"] for sizes in refined}))),
            "refinement": kind.describe(config.refinement_of(refined[0])),
        }
    if hasattr(model, "num_labels") and any(name.startswith("classifier") for name, _ in model.named_modules()):
        rows["labels"] = str(config.num_labels)
    return rows


def _giga(number: float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e11 else f"{number / 1e9:.0f}"
