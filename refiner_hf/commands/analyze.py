"""
Measure a network's attention maps and features in each layer, for one network or several side by side:
similarity of maps between heads and layers, effective rank, entropy, locality, similarity of tokens, CKA of features.
Writes analysis.json, figures (PNG and PDF) and prints a table. docs/look_inside.md says what the numbers mean.

Models are Refiners and encoders of transformers, refined or not, in any mix, all for images or all for texts. Data are
a folder of images, with or without subfolders, a folder of parquet files, a text file with an example in each line, or
a dataset of the Hub; labels aren't needed. Default: scikit-learn's digits.

    refiner analyze --model outputs/demo
    refiner analyze --model my_refiner my_plain_network google/vit-base-patch16-224 --data photos --max_examples 256
    refiner analyze --model my_refined_bert bert-base-uncased --data sentences.txt
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.locking import locked_folder
from ..utils.text import counted
from .options import device_option, pick_device
from .running import command


@dataclass
class AnalyzeArguments:
    model: list[str] = field(
        metadata={"help": "Folders or Hub names of the networks; may be given several times.", "action": "extend"}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Folder of images or of parquet files, a text file, or a dataset's name on the Hub."},
    )
    max_examples: int = field(default=64, metadata={"help": "At most so many images or texts, picked at random."})
    batch_size: int = field(default=16, metadata={"help": "Examples whose features are compared with each other."})
    seed: int = field(default=0, metadata={"help": "Decides which examples."})
    output_dir: str = field(default="analysis", metadata={"help": "Folder for the numbers and figures."})
    revision: list[str] | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit on the Hub: one for all networks, or one for each. Default: main."},
    )
    device: str | None = device_option()

    def __post_init__(self):
        if self.max_examples < 1:
            raise ValueError(f"--max_examples must be at least 1, got {self.max_examples}.")
        self.revision = self.revision or ["main"]
        if len(self.revision) == 1:
            self.revision *= len(self.model)
        if len(self.revision) != len(self.model):
            raise ValueError(
                f"Give one --revision, or one for each --model, got {len(self.revision)} for {len(self.model)}."
            )


@command(AnalyzeArguments)
def main(args: AnalyzeArguments) -> None:
    """Measures the networks, and prints means over their layers."""
    from ..data.image_sample import decoded, load_images
    from ..data.text_sample import has_texts, load_texts
    from ..inspection.analysis import analyze
    from ..inspection.networks import open_network, short_names
    from ..inspection.report import facts_of, summary_table, write_analyses

    folder, device = Path(args.output_dir), pick_device(args.device)
    with locked_folder(folder):
        texts = args.data is not None and has_texts(args.data)
        examples: Callable[[], Iterable[Any]]
        if texts:
            assert args.data is not None
            data, sentences = load_texts(args.data, args.max_examples, args.seed)
            count, examples = len(sentences), lambda: sentences
        else:
            data, rows = load_images(args.data, args.max_examples, args.seed)
            count, examples = len(rows), lambda: decoded(rows)
        networks = [
            open_network(name, device, revision, texts=texts) for name, revision in zip(args.model, args.revision)
        ]
        for network, name in zip(networks, short_names(args.model)):
            network.name = name
        analyses = [analyze(network, examples(), count, args.batch_size) for network in networks]
        write_analyses(analyses, facts_of(data, args.seed, args.batch_size, device), folder)
    print(f"Means over layers and {counted(count, 'text' if texts else 'image')} of {data}:\n")
    print(summary_table(analyses))
    print(f"\nWrote analysis.json, analysis_curves and analysis_layers (.png, .pdf) into {folder}.")
