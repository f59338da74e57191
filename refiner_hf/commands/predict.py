"""
Ask an image classifier about many pictures, and write its answers into a table (CSV): file, label, score.

The model is a Refiner or any other image classifier of transformers, or an exported ONNX file. Pictures that can't be
read are listed at the end. A run that breaks off goes on when the same command is given again.

    refiner-predict --model outputs/demo --images photos --output_file answers.csv
    refiner-predict --model outputs/demo --images photos 'holiday/**/*.jpg' one.png --output_file answers.csv --top_k 3
    refiner-predict --model exported/model.onnx --images photos --output_file answers.csv
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from ..prediction.predict import DEFAULT_WORKERS, Predictions, list_unreadable, predict
from ..prediction.table import partial_file, whole_rows
from ..utils.text import FORMULA, printable
from .parsing import HelpFormatter, pick_device
from .running import command


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
    output_file: str = field(metadata={"help": "The table to write; must be new."})
    top_k: int = field(default=1, metadata={"help": "How many labels of each image."})
    batch_size: int = field(default=32, metadata={"help": "Images at a time."})
    num_workers: int = field(default=DEFAULT_WORKERS, metadata={"help": "Processes that read images ahead."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model on the Hub. Default: main."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda. Default: cuda where there is one."})


@command
def main(argv: list[str] | None = None) -> None:
    """Entry point of `refiner-predict` and scripts/predict.py."""
    (args,) = HfArgumentParser(
        PredictArguments, description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    ).parse_args_into_dataclasses(argv)
    try:
        predictions = predict(**{**vars(args), "device": pick_device(args.device)})
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_what_is_kept(partial_file(Path(args.output_file)))) from interrupt
    print(_summary(predictions, args.output_file))
    if predictions.unreadable:
        print(list_unreadable(predictions.unreadable), file=sys.stderr)


def _summary(predictions: Predictions, output_file: str) -> str:
    labels = predictions.labels
    lines = [f"{labels.total():,} images:"]
    lines += [f"  {printable(label)}: {count:,}" for label, count in labels.most_common(_LABELS_SHOWN)]
    if (others := len(labels) - _LABELS_SHOWN) > 0:
        lines.append(f"  and {others:,} other labels")
    if formulas := [label for label in labels if label.startswith(FORMULA)]:
        lines.append(
            f"Labels such as {printable(formulas[0])!r} look like formulas to a spreadsheet: import the table as text."
        )
    return "\n".join([*lines, f"Wrote {output_file}"])


def _what_is_kept(partial: Path) -> str:
    if not partial.exists():
        return "Nothing was written yet."
    rows = max(0, len(whole_rows(partial)[0]) - 1)
    return f"{partial} keeps {rows:,} answers; the same command goes on after them."


if __name__ == "__main__":
    main()
