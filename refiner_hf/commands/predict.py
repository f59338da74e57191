"""
Classify many pictures, and write the answers into a table (CSV or parquet): file, label, score.

The model is a Refiner or any other image classifier of transformers, or an exported ONNX file, which ONNX Runtime or
OpenVINO computes. Pictures that can't be read are listed at the end. The same command continues an interrupted run.
Several processes or GPUs divide the images: start it with torchrun or accelerate.

    refiner predict --model outputs/demo --images photos --output_file answers.csv
    refiner predict --model outputs/demo --images photos 'holiday/**/*.jpg' one.png --output_file answers.csv --top_k 3
    refiner predict --model exported/model.onnx --images photos --output_file answers.csv
    refiner predict --model exported/model_int8.onnx --engine openvino --images photos --output_file answers.csv
    refiner predict --model outputs/demo --precision bfloat16 --images photos --output_file answers.csv
    refiner predict --model outputs/demo --images photos --output_file answers.parquet --features
    torchrun --nproc_per_node 4 -m refiner_hf predict --model outputs/demo --images photos --output_file answers.csv
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..utils.image_files import check_images
from ..utils.text import FORMULA, counted, printable
from .options import device_option, pick_device, revision_option
from .running import command, if_interrupted


if TYPE_CHECKING:
    from ..prediction.predict import Predictions

_LABELS_SHOWN = 10


@dataclass
class PredictArguments:
    model: str = field(
        metadata={
            "help": "Folder or Hub name of an image classifier; or an .onnx file with config.json and "
            "preprocessor_config.json beside it, or the folder of a model.onnx."
        }
    )
    images: list[str] = field(
        metadata={"help": "Files, folders (with all below them) and quoted patterns, in which ** means any folders."}
    )
    output_file: str = field(metadata={"help": "The table to write, CSV or *.parquet; must be new."})
    top_k: int = field(default=1, metadata={"help": "How many labels of each image."})
    features: bool = field(
        default=False,
        metadata={"help": "Also a column of features, the numbers that the model makes its answer of. In parquet."},
    )
    batch_size: int = field(default=32, metadata={"help": "Images at a time."})
    num_workers: int = field(
        default=min(4, os.cpu_count() or 1), metadata={"help": "Processes that read images ahead."}
    )
    revision: str | None = revision_option()
    device: str | None = device_option()
    engine: Literal["onnxruntime", "openvino"] | None = field(
        default=None, metadata={"help": "What computes an exported model. Default: onnxruntime."}
    )
    precision: Literal["float32", "bfloat16"] | None = field(
        default=None,
        metadata={
            "help": "What the model is computed in, except for what is in 8 bits; bfloat16 where the device has it, "
            "by PyTorch or OpenVINO. Default: float32."
        },
    )


@command(PredictArguments)
def main(args: PredictArguments) -> None:
    """Writes the table, and says how many images got each label."""
    check_images(args.images)
    from ..prediction.predict import list_unreadable, predict
    from ..prediction.table import partial_file
    from ..utils.processes import Processes

    with if_interrupted(lambda: _what_is_kept(partial_file(Path(args.output_file)))):
        device = "cpu" if args.engine == "openvino" and args.device is None else pick_device(args.device)
        predictions = predict(**{**vars(args), "device": device})
    if not Processes().is_first:
        return
    print(_summary(predictions, args.output_file))
    if predictions.unreadable:
        print(list_unreadable(predictions.unreadable), file=sys.stderr)


def _summary(predictions: "Predictions", output_file: str) -> str:
    labels = predictions.labels
    lines = [f"{counted(labels.total(), 'image')}:"]
    lines += [f"  {printable(label)}: {count:,}" for label, count in labels.most_common(_LABELS_SHOWN)]
    if (others := len(labels) - _LABELS_SHOWN) > 0:
        lines.append(f"  and {counted(others, 'other label')}")
    if formulas := [label for label in labels if label.startswith(FORMULA)]:
        lines.append(
            f"Labels such as {printable(formulas[0])!r} look like formulas to a spreadsheet: import the table as text."
        )
    return "\n".join([*lines, f"Wrote {output_file}"])


def _what_is_kept(partial: Path) -> str:
    from ..prediction.table import whole_rows

    if not partial.exists():
        return "Nothing was written yet."
    rows = max(0, len(whole_rows(partial)[0]) - 1)
    return f"{partial} keeps {rows:,} answers; the same command continues after them."
