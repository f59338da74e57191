"""
Open a page in the browser on which to hand a network pictures: what it takes them for, and where it looks, before and
after its maps are refined.

Takes a Refiner, or any of transformers' ViTs, which has maps as applied only. Pictures in the model's folder examples/
are offered to try. The page is for this machine alone, unless it is shared; Ctrl-C ends it.

    refiner-demo --model outputs/demo
    refiner-demo --model outputs/demo --port 7861 --device cpu
    refiner-demo --model outputs/demo --share         # also at a public address, by way of Gradio's servers
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import HfArgumentParser

from ..inspection.networks import open_network
from .parsing import HelpFormatter, pick_device
from .running import command


@dataclass
class DemoArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a Refiner, ViT, DeiT, DINOv2 or the like."})
    port: int = field(default=7860, metadata={"help": "The page's port on this machine."})
    share: bool = field(default=False, metadata={"help": "Ask Gradio's service for a public address as well."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the Hub. Default: main."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda. Default: cuda where there is one."})


@command
def main(argv: list[str] | None = None) -> None:
    """Entry point of `refiner-demo` and scripts/demo.py."""
    (args,) = HfArgumentParser(
        DemoArguments, description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    ).parse_args_into_dataclasses(argv)
    try:
        from ..demo.app import launch
    except ModuleNotFoundError as error:
        sys.exit(f"Error: this command needs {error.name}. Install it with: pip install 'refiner_hf[demo]'")
    network = open_network(args.model, pick_device(args.device), args.revision)
    launch(network, find_examples(args.model), args.port, args.share)


def find_examples(model: str) -> list[Path]:
    """The pictures in a model folder's `examples`."""
    endings = Image.registered_extensions()
    return sorted(path for path in Path(model, "examples").glob("*") if path.suffix.lower() in endings)


if __name__ == "__main__":
    main()
