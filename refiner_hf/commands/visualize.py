"""
Draw where a network looks in a picture: maps before refinement, after distributed local attention and as applied,
head by head and averaged, through all layers (attention rollout), and the learned weights of its refinements.

The model is a Refiner, or any ViT of transformers, which has only maps as applied.

    refiner visualize --model outputs/demo --image photo.png
    refiner visualize --model outputs/demo --image photo.png --layer 2 4 --head 1 3 --patch 2,3
    refiner visualize --model outputs/demo --image photo.png --html       # one page with sliders, beside the PNGs
"""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from ..utils.locking import locked_folder
from .options import check_there, device_option, pick_device, revision_option
from .running import command


_LARGEST_PAGE = 40 * 2**20  # bytes up to which a page holds all patches' maps


@dataclass
class VisualizeArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a Refiner, ViT, DeiT, DINOv2 or the like."})
    image: str = field(metadata={"help": "The picture."})
    output_dir: str = field(default="visualized", metadata={"help": "Folder for the PNGs and the page."})
    layer: list[int] | None = field(
        default=None, metadata={"help": "Layers, from 1. Default: the last that refines, or the last."}
    )
    head: list[int] | None = field(
        default=None, metadata={"help": "Heads, from 1; of expanded heads those in the same columns. Default: all."}
    )
    patch: list[str] | None = field(
        default=None,
        metadata={"help": "Patches to draw as queries beside the class token, each as ROW,COLUMN, from 1."},
    )
    html: bool = field(default=False, metadata={"help": "Also write one self-contained page with sliders."})
    revision: str | None = revision_option()
    device: str | None = device_option()


@command(VisualizeArguments)
def main(args: VisualizeArguments) -> None:
    """Draws the pictures."""
    check_there(args.image)
    with locked_folder(args.output_dir):
        for written in visualize(args):
            print(f"Wrote {written}")


def visualize(args: VisualizeArguments) -> list[Path]:
    """Draws what `args` asks for; returns the files."""
    from ..image_processing_pil_refiner import open_image, to_8_bit_rgb
    from ..inspection.attention_views import name_of, view_attention
    from ..inspection.networks import open_network
    from ..inspection.page import query_bytes, write_page
    from ..inspection.pictures import plot_heads, plot_overview, plot_weights

    image = to_8_bit_rgb(open_image(args.image))
    patches = [_parse_patch(text) for text in args.patch or []]
    folder = Path(args.output_dir)
    network = open_network(args.model, pick_device(args.device), args.revision)
    views = view_attention(network, image, patches)
    layers = [layer - 1 for layer in args.layer or []] or [max(views.refining_layers, default=len(views.layers) - 1)]
    heads = [head - 1 for head in args.head] if args.head else None
    for layer in layers:
        views.check(layer, heads)

    written = []

    def new_file(name: str) -> Path:
        written.append(folder / name)
        return written[-1]

    for number, query in enumerate(views.queries):
        who = name_of(query).removeprefix("the ").replace(" ", "_").replace(",", "_")
        plot_overview(views, number, new_file(f"layers_{who}.png"))
        for layer in layers:
            plot_heads(views, layer, number, new_file(f"layer_{layer + 1}_{who}.png"), heads)
    for layer in layers:
        if (refinement := views.layers[layer].refinement) is not None:
            plot_weights(refinement, layer, new_file(f"layer_{layer + 1}_weights.png"))
    if args.html:
        rows, columns = views.grid
        if (size := rows * columns * query_bytes(views)) <= _LARGEST_PAGE:
            views = view_attention(network, image, list(product(range(rows), range(columns))))
        else:
            print(
                f"All patches' maps would take {size >> 20} MB: maps.html holds those of the class token and --patch."
            )
        title = f"Where {network.name} looks in {Path(args.image).name}"
        write_page(views, title, layers[0], new_file("maps.html"))
    return written


def _parse_patch(text: str) -> tuple[int, int]:
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--patch takes ROW,COLUMN such as 3,5, got {text!r}.") from error
    return row - 1, column - 1
