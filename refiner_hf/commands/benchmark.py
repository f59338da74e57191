"""
Measure what a Refiner costs: inference throughput, training-step time and peak memory of every implementation of the
refinement, beside the same network with plain attention, transformers' ViT of the same size and torch.compile of ours,
all in the same run. Prints a table; writes the record (JSON), the table and plots. The same command continues an
interrupted run.

    refiner benchmark --models tiny --image_sizes 64 --rounds 3 --output_dir trial     # to try it out
    refiner benchmark --models S --image_sizes 224 --roofline
    refiner benchmark --device cuda --dtype bfloat16 --name h100 --roofline
    refiner benchmark --part op --models S L --image_sizes 224 448
    refiner benchmark --name h100 --report                                             # tables and plots anew

Before anything else on an NVIDIA GPU, for everything that runs on it from then on:

    refiner benchmark --part tiles --dtype bfloat16 --models S --image_sizes 224       # in minutes, the fastest tiles
"""

import shlex
from dataclasses import fields
from pathlib import Path

from ..benchmarking.options import BenchmarkOptions
from ..utils.locking import locked_beside
from ..utils.paths import without_paths
from .running import command, if_interrupted


@command(BenchmarkOptions)
def main(options: BenchmarkOptions) -> None:
    """Measures what the record doesn't hold yet, and writes the report; or tunes the kernels."""
    if options.part == "tiles":
        from ..benchmarking.tiles import tune

        with if_interrupted("The fastest of each table above are kept, and used."):
            tune(options)
        return

    from ..benchmarking.record import read_record
    from ..benchmarking.report import write_report
    from ..benchmarking.run import run_benchmark

    options.stem.parent.mkdir(parents=True, exist_ok=True)
    with locked_beside(options.stem):
        path = Path(f"{options.stem}.json")
        with if_interrupted("The same command continues with what isn't measured yet."):
            record = read_record(path) if options.report else run_benchmark(options, command_of(options))
        print(write_report(record, options.stem))
    print(f"Wrote {options.stem}.json, .md and plots.")


def command_of(options: BenchmarkOptions) -> str:
    """The command line with these options, without paths of this machine."""
    words = ["refiner", "benchmark"]
    default = BenchmarkOptions()
    for option in fields(options):
        value = getattr(options, option.name)
        if value == getattr(default, option.name) or option.name == "fresh":
            continue
        words.append(f"--{option.name}")
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return shlex.join(without_paths(words))
