"""
Put refinements into a trained encoder, for images or for texts. In evaluation it gives the same answers; training then
teaches the refinements.

    refiner refine --model google/vit-base-patch16-224 --data photos --output_dir refined
    refiner refine --model facebook/dinov2-small --data photos --layers 9 10 11 12 --output_dir refined
    refiner refine --model distilbert-base-uncased --data sentences.txt --output_dir refined
    refiner train fine_tune --model_name_or_path refined --train_dir photos --output_dir out
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..choices_refiner import REFINEMENT_NAMES
from ..utils.new_folder import check_new
from ..utils.text import counted
from .options import revision_option, with_code_option
from .running import command


@dataclass
class RefineArguments:
    model: str = field(metadata={"help": "Folder or Hub name of an encoder of transformers, with any head or none."})
    data: str = field(
        metadata={
            "help": "Examples like those that you will train on, for the norms' statistics: a folder of pictures, a "
            "text file with an example in each line, or the Hub name of a dataset of either."
        }
    )
    output_dir: str = field(metadata={"help": "Folder to make; must be new or empty."})
    revision: str | None = revision_option()
    layers: list[int] | None = field(
        default=None, metadata={"help": "Layers that refine their map, from 1. Default: all."}
    )
    refinement: str = field(
        default="expansion_convolution",
        metadata={
            "help": "The paper's, one full convolution, the paper's without its convolution or its reduction, or a "
            "relative to compare it with.",
            "choices": REFINEMENT_NAMES,
        },
    )
    expansion_ratio: int = field(default=3, metadata={"help": "Expanded heads per head."})
    refinement_kernel_size: int = field(
        default=3, metadata={"help": "Side of the kernel over the maps, or its length over tokens; odd."}
    )
    with_code: bool = with_code_option()


@command(RefineArguments)
def main(args: RefineArguments) -> None:
    """Makes the folder, and says what is new in it."""
    check_new(Path(args.output_dir))
    from ..data.samples import load_sample
    from ..encoders.folder import refine_to_folder

    options = dict(vars(args))
    if options["layers"] is not None:
        if min(options["layers"]) < 1:
            raise ValueError(f"--layers count from 1; there is no layer {min(options['layers'])}.")
        options["layers"] = [layer - 1 for layer in options["layers"]]
    options["data"] = load_sample(args.data)
    model = refine_to_folder(**options)
    modules = model.config.refinement_config["modules"]
    refined = [name for name, sizes in modules.items() if sizes is not None]
    new = sum(p.numel() for name, p in model.named_parameters() if ".refinement." in name)
    print(
        f"{len(refined)} of {counted(len(modules), 'layer')} refine their map, with {new:,} new parameters beside "
        f"{model.num_parameters() - new:,}. The answers are those of {args.model}."
    )
    print(f"The finished folder: {args.output_dir}")
    if "ForImageClassification" in type(model).__name__:
        print(f"To fine-tune it: refiner train fine_tune --model_name_or_path {args.output_dir} --train_dir ... ")
