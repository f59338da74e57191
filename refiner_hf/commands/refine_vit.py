"""
Turn a trained ViT or DeiT into a Refiner. In evaluation it gives the same logits; fine-tuning then trains its
refinements.

    refiner refine-vit --model google/vit-base-patch16-224 --images photos --output_dir refined
    refiner refine-vit --model my-vit --images photos --refined_layers 9 10 11 12 --output_dir refined
    refiner train fine_tune --model_name_or_path refined --train_dir photos --output_dir out
"""

from dataclasses import dataclass, field

from ..configuration_refiner import REFINEMENT_NAMES
from ..conversion.vit_folder import refine_to_folder
from ..data.image_sample import decoded, load_images
from .options import revision_option, with_code_option
from .running import command


@dataclass
class RefineViTArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a ViT or DeiT image classifier of transformers."})
    output_dir: str = field(metadata={"help": "Folder to make; must be new or empty."})
    images: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub dataset of pictures like those that you will train on, for the norms' statistics. "
            "Default: noise, from which a training begins further from the source."
        },
    )
    max_images: int = field(default=128, metadata={"help": "At most so many of them, picked at random."})
    revision: str | None = revision_option()
    refined_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers that refine their map, from 1. Default: all."}
    )
    refinement: str = field(
        default="expansion_convolution",
        metadata={
            "help": "The paper's, the same without spatial convolution, or one full convolution.",
            "choices": REFINEMENT_NAMES,
        },
    )
    expansion_ratio: int = field(default=3, metadata={"help": "Expanded heads per head."})
    refinement_kernel_size: int = field(default=3, metadata={"help": "Side of the kernel over the maps, odd."})
    with_code: bool = with_code_option()


@command(RefineViTArguments)
def main(args: RefineViTArguments) -> None:
    """Makes the folder, and says what is new in it."""
    options = dict(vars(args))
    images, count = options.pop("images"), options.pop("max_images")
    pictures = None if images is None else decoded(load_images(images, count)[1])
    model = refine_to_folder(pictures=pictures, **options)
    new = sum(p.numel() for name, p in model.named_parameters() if ".refinement." in name)
    refined = model.config.attention_types.count("refined")
    print(
        f"{refined} of {model.config.num_hidden_layers} layers refine their map, with {new:,} new parameters beside "
        f"{model.num_parameters() - new:,}. The logits are those of {args.model}."
    )
    print(f"The finished folder: {args.output_dir}")
    print(f"To fine-tune it: refiner train fine_tune --model_name_or_path {args.output_dir} --train_dir ... ")
