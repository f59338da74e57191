"""
Turn a checkpoint of the reference implementation into a folder for transformers and the Hub.

Architecture, image size, heads, layout, dense head and stem are read from the file.

    refiner convert --checkpoint model_best.pth.tar --output_dir refiner-small
    refiner convert --checkpoint model_best.pth.tar --output_dir refiner-small-ema --use_ema --with_code
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..utils.new_folder import check_new
from ..utils.text import counted
from .options import check_there, with_code_option
from .running import command


@dataclass
class ConversionArguments:
    checkpoint: str = field(metadata={"help": "File of the reference (.pth.tar, .pth, .pt)."})
    output_dir: str = field(metadata={"help": "Folder to make; must be new or empty."})
    use_ema: bool = field(default=False, metadata={"help": "Take the averaged weights."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Only for a network that refines no map, where the file doesn't show it."}
    )
    crop_pct: float | None = field(
        default=None,
        metadata={"help": "Share that the evaluation crop keeps. Default: S 0.9, M 1.0, L 1.13, others 0.9."},
    )
    with_code: bool = with_code_option()


@command(ConversionArguments)
def main(args: ConversionArguments) -> None:
    """Converts the file, and says what it holds."""
    check_there(args.checkpoint)
    check_new(Path(args.output_dir))
    from ..conversion.checkpoint import convert_checkpoint

    model = convert_checkpoint(**vars(args))
    config = model.config
    size = "x".join(map(str, config.image_height_width))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters: "
        f"{counted(config.num_hidden_layers, 'layer')} of width {config.hidden_size}, "
        f"{counted(config.num_attention_heads, 'head')}, {size} pixels, {counted(len(config.label_names), 'label')}, "
        f"dense head: {'yes' if config.use_dense_head else 'no'}."
    )
    print(f"The finished folder: {args.output_dir}")
