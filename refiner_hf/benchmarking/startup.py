"""How long a process takes until it answers, beside one that only imports torch."""

import subprocess
import sys
from functools import partial

from ..utils.measure import seconds_of


IMPORT_TORCH = "import torch"  # what every ratio is to
_CODE = {
    IMPORT_TORCH: IMPORT_TORCH,
    "import transformers": "import transformers",
    "import refiner_hf": "import refiner_hf",
    "from refiner_hf import RefinerForImageClassification": "from refiner_hf import RefinerForImageClassification",
}
_WORDS = {
    "refiner --help": ["--help"],
    "refiner predict --help": ["predict", "--help"],
    "refiner train --help": ["train", "--help"],
    "refiner train, with a folder that isn't there": ["train", "--train_dir", "a folder that isn't there"],
}


def measure_startup(rounds: int) -> dict[str, list[float]]:
    """By what is run, seconds of a process from its start to its end, one for each round. All take turns."""
    commands = {name: ["-c", code] for name, code in _CODE.items()}
    commands |= {name: ["-m", "refiner_hf", *words] for name, words in _WORDS.items()}
    run = partial(subprocess.run, capture_output=True)
    steps = {name: partial(run, [sys.executable, *words]) for name, words in commands.items()}
    for step in steps.values():  # once, so that all files have been read
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, "cpu"))
    return times
