"""
Open a web page that shows a network's classes for a picture, and where it looks before and after its maps are refined.

The model is a Refiner, or any ViT of transformers, which has only maps as applied. The page offers the pictures in the
model's folder examples/. Only this machine can open the page, unless it is shared or has another host. Ctrl-C ends it.

    refiner demo --model outputs/demo
    refiner demo --model outputs/demo --port 7861 --device cpu
    refiner demo --model outputs/demo --host 0.0.0.0  # in a container: whoever reaches this machine can open it
    refiner demo --model outputs/demo --share         # also at a public address, by way of Gradio's servers
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..demo import THIS_MACHINE
from ..utils.image_files import images_in
from .options import device_option, pick_device, revision_option
from .running import command


@dataclass
class DemoArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a Refiner, ViT, DeiT, DINOv2 or the like."})
    port: int = field(default=7860, metadata={"help": "The page's port on this machine."})
    host: str = field(
        default=THIS_MACHINE,
        metadata={
            "help": "This machine's address for the page. With 0.0.0.0 whoever reaches this machine can open it."
        },
    )
    share: bool = field(default=False, metadata={"help": "Ask Gradio's service for a public address as well."})
    revision: str | None = revision_option()
    device: str | None = device_option()


@command(DemoArguments)
def main(args: DemoArguments) -> None:
    """Shows the page until it is stopped."""
    from ..demo import app
    from ..inspection.networks import open_network

    network = open_network(args.model, pick_device(args.device), args.revision)
    app.launch(network, find_examples(args.model), args.port, args.share, args.host)


def find_examples(model: str) -> list[Path]:
    """The pictures in a model folder's `examples`."""
    folder = Path(model, "examples")
    return sorted(map(Path, images_in(folder))) if folder.is_dir() else []
