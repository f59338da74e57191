"""
Export a classifier as an ONNX graph, which ONNX Runtime and OpenVINO compute, and check that their answers are the
model's. In 8 bits, too, with ranges of your own pictures.

    refiner export --model outputs/demo --output_dir exported
    refiner export --model outputs/demo --output_dir exported --int8 digits --measure_on digits
    refiner export --model tuned --output_dir exported --int8 photos/train --measure_on photos/test   # LABEL/*.jpg
    refiner predict --model exported/model_int8.onnx --engine openvino --images photos --output_file answers.csv
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
    int8: str | None = field(
        default=None,
        metadata={
            "help": "Also write the graph in 8 bits, with ranges of up to 200 of these pictures: a folder of training "
            "images, the Hub name of a dataset, or 'digits' for scikit-learn's training digits."
        },
    )
    measure_on: str | None = field(
        default=None,
        metadata={
            "help": "Compare accuracy and speed of every engine with PyTorch's on labelled images: a folder with one "
            "subfolder per label, the Hub name of a dataset, or 'digits' for scikit-learn's test digits."
        },
    )
    max_images: int | None = field(default=None, metadata={"help": "Compare on at most so many images."})
    revision: str | None = revision_option()


@command(ExportArguments)
def main(args: ExportArguments) -> None:
    """Writes the folder, and compares the graphs with the model."""
    folder = Path(args.output_dir)
    check_new(folder)
    from ..export.engines import ENGINES, INPUT, OUTPUT, installed_engines
    from ..export.exported_folder import export_folder, load_for_export
    from ..utils.image_config import image_shape_of

    model, processor = load_for_export(args.model, args.revision)
    if args.int8 or args.measure_on:
        try:  # images need the packages for training
            from ..export.calibration import load_calibration
            from ..export.compare import compare, comparison_table, load_labelled
        except ModuleNotFoundError as error:
            option = "--measure_on" if args.measure_on else "--int8"
            advice = "Install it with: pip install 'refiner_hf[train]'"
            raise ValueError(f"{option} needs {error.name}. {advice}") from error
    if args.measure_on:
        images = load_labelled(args.measure_on, args.max_images, model)
    calibration = load_calibration(args.int8, args.measure_on, processor) if args.int8 else None
    exported = export_folder(model, processor, folder, calibration)
    channels, height, width = image_shape_of(model.config)
    engines = " and ".join(ENGINES[engine] for engine in installed_engines())
    print(
        f"{exported.graph}: {INPUT} (batch, {channels}, {height}, {width}) to {OUTPUT} "
        f"(batch, {model.config.num_labels}); the largest difference of {engines} from PyTorch is "
        f"{exported.difference:.1e}."
    )
    files = [exported.graph]
    if calibration and exported.int8:
        files.append(exported.int8)
        pictures = counted(sum(map(len, calibration)), "picture")
        print(
            f"{exported.int8}: the same in 8 bits. Of {pictures} of {args.int8}, which set its ranges, "
            f"{exported.same_answers:.1%} get the same answer."
        )
    if args.measure_on:
        compared = compare(model, processor, files, images)
        write_json(folder / COMPARISON, compared)
        seen = counted(compared["images"], "image")
        print(f"\n{seen} of {compared['data']}, {compared['device']}, {compared['versions']}:\n")
        print(comparison_table(compared))
