"""
Export a classifier as an ONNX graph, and check that its answers are the model's.

    refiner export --model outputs/demo --output_dir exported
    refiner export --model outputs/demo --output_dir exported --int8 --measure_on digits     # or photos/LABEL/*.jpg
    refiner predict --model exported/model_int8.onnx --images photos --output_file answers.csv
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..utils.files import write_json
from ..utils.new_folder import check_new
from ..utils.text import counted
from .options import revision_option
from .running import command


COMPARISON = "comparison.json"


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a Refiner with a classifier."})
    output_dir: str = field(metadata={"help": "Folder to make; must be new or empty."})
    int8: bool = field(default=False, metadata={"help": "Also write the graph with linear layers in 8 bits."})
    measure_on: str | None = field(
        default=None,
        metadata={
            "help": "Compare accuracy and speed with PyTorch's on labelled images: a folder with one subfolder per "
            "label, the Hub name of a dataset, or 'digits' for scikit-learn's test digits."
        },
    )
    max_images: int | None = field(default=None, metadata={"help": "Compare on at most so many images."})
    revision: str | None = revision_option()


@command(ExportArguments)
def main(args: ExportArguments) -> None:
    """Writes the folder, and compares the graphs with the model."""
    folder = Path(args.output_dir)
    check_new(folder)
    from ..export.exported_folder import export_folder, load_for_export
    from ..export.graph import INPUT, OUTPUT
    from ..utils.image_config import image_shape_of

    model, processor = load_for_export(args.model, args.revision)
    if args.measure_on:
        try:  # comparing needs the packages for training
            from ..export.compare import compare, comparison_table, load_labelled
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--measure_on needs {error.name}. Install it with: pip install 'refiner_hf[train]'"
            ) from error
        images = load_labelled(args.measure_on, args.max_images, model)
    files, difference = export_folder(model, processor, folder, args.int8)
    channels, height, width = image_shape_of(model.config)
    print(
        f"{files[0]}: {INPUT} (batch, {channels}, {height}, {width}) to {OUTPUT} "
        f"(batch, {model.config.num_labels}); the largest difference from PyTorch's is {difference:.1e}."
    )
    if args.int8:
        print(f"{files[1]}: the same with linear layers in 8 bits; its answers differ a little.")
    if args.measure_on:
        compared = compare(model, processor, files, images)
        write_json(folder / COMPARISON, compared)
        seen = counted(compared["images"], "image")
        print(f"\n{seen} of {compared['data']}, {compared['device']}, {compared['versions']}:\n")
        print(comparison_table(compared))
