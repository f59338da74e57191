"""
The command `refiner` and its sub-commands. Each is a module of this folder, which says what it takes and what it does.
"""

import argparse
import difflib
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from ..version import __version__


class Command(NamedTuple):
    """A sub-command: its module in this folder, what it does in one line, and the extra that it needs installed."""

    module: str
    summary: str
    extra: str = "train"


COMMANDS = {
    "train": Command("train", "Train, fine-tune or evaluate a Refiner or another image classifier."),
    "predict": Command("predict", "Classify many pictures, and write the answers into a table."),
    "demo": Command("demo", "Open a web page that shows a network's answers and maps for a picture.", "demo"),
    "convert": Command("convert", "Convert a checkpoint of the paper's code."),
    "refine": Command("refine", "Put refinements into a trained encoder of transformers."),
    "export": Command("export", "Export a classifier to ONNX.", "export"),
    "visualize": Command("visualize", "Draw where a network looks in a picture."),
    "analyze": Command("analyze", "Measure a network's attention maps and features."),
    "push": Command("push", "Publish a finished folder on the Hub."),
    "label-maps": Command("label_maps", "Make label maps for token labelling."),
    "benchmark": Command("benchmark", "Measure speed and memory of the implementations."),
}
ALIAS = "refiner-"  # `refiner-train` is `refiner train`


def main(argv: list[str] | None = None) -> None:
    """
    Entry point of `refiner`, of its aliases `refiner-train` and so on, and of `python -m refiner_hf`.

    Args:
        argv (`list[str]`, *optional*): the words after the program's name. By default the process's own.
    """
    program = Path(sys.argv[0]).stem
    argv = list(sys.argv[1:] if argv is None else argv)
    if program.startswith(ALIAS):
        argv.insert(0, program.removeprefix(ALIAS))
    name, words = _parse(argv)
    try:
        importlib.import_module(f".{COMMANDS[name].module}", __name__).main(words)
    except ModuleNotFoundError as error:
        extra = COMMANDS[name].extra
        sys.exit(f"Error: refiner {name} needs {error.name}. Install it with: pip install 'refiner_hf[{extra}]'")


def _parse(argv: list[str]) -> tuple[str, list[str]]:
    """The sub-command's name and its own words."""
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="refiner",
        description=f"Refiner vision transformers for Hugging Face.\n\ncommands:\n{table}",
        epilog="`refiner COMMAND --help` describes a command, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="refiner [--help] [--version] COMMAND [OPTIONS]",
    )
    parser.add_argument("--version", action="version", version=f"refiner_hf {__version__}")
    parser.add_argument("command", help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    name = command.replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(COMMANDS)}."
        parser.error(f"there is no command {command!r}. {hint}")
    return name, argv[1:]
