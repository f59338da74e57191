"""A network's architecture as a table."""

from ..modeling_refiner import RefinerForImageClassification, RefinerPreTrainedModel
from ..refinements_refiner import REFINEMENTS
from ..utils.flops import count_flops
from ..utils.markdown import markdown_table
from ..utils.text import counted


def describe_network(model: RefinerPreTrainedModel) -> str:
    """A table of a network's architecture, its number of parameters and its cost."""
    config = model.config
    types = {name: config.attention_types.count(name) for name in dict.fromkeys(config.attention_types)}
    height, width = config.image_height_width
    patch = " x ".join(map(str, config.patch_height_width))
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "cost of an image": f"{_giga(count_flops(model))} GFLOP (2 per multiply-add)",
        "images": f"{height} x {width} pixels, {counted(config.num_channels, 'channel')}, patches of {patch}",
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
    return markdown_table(["", ""], rows.items())


def _giga(number: float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e11 else f"{number / 1e9:.0f}"
