"""
Draw what refinement does to a layer's attention, head by head, for one picture.

    refiner-show --model outputs/demo --image photo.png --output refinement.png
    refiner-show --model outputs/demo --image photo.png --output refinement.png --layer 1 --query 7
"""

import sys
from dataclasses import dataclass, field

from transformers import AutoImageProcessor, HfArgumentParser

from ..image_processing_pil_refiner import open_image
from ..inspection.maps import plot_refinement
from ..modeling_refiner import RefinerForImageClassification
from .parsing import HelpFormatter


@dataclass
class ShowArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a Refiner."})
    image: str = field(metadata={"help": "The picture."})
    output: str = field(default="refinement.png", metadata={"help": "The PNG to write."})
    layer: int | None = field(default=None, metadata={"help": "Layer, from 0. Default: the last that refines."})
    query: int = field(default=0, metadata={"help": "The token that looks: 0 is the class token, then the patches."})


def main(argv: list[str] | None = None) -> None:
    """Entry point of `refiner-show` and scripts/show_refinement.py."""
    (args,) = HfArgumentParser(
        ShowArguments, description=__doc__, formatter_class=HelpFormatter
    ).parse_args_into_dataclasses(argv)
    try:
        image = open_image(args.image)
        model = RefinerForImageClassification.from_pretrained(args.model)
        pixels = AutoImageProcessor.from_pretrained(args.model)(image, return_tensors="pt").pixel_values
        plot_refinement(model, image, pixels, args.output, args.layer, args.query)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    main()
