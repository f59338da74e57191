"""How command lines and recipe files become arguments."""

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from ..data.arguments import AugmentationArguments, DataArguments
from ..training.arguments import ModelArguments, RefinerTrainingArguments


RECIPES = Path(__file__).parent.parent / "recipes"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the examples of the description as they are written."""


def pick_device(name: str | None) -> str:
    """The device of that name, or CUDA where there is some; a `ValueError` where it isn't there."""
    available = torch.cuda.is_available()
    if name is not None and name.startswith("cuda") and not available:
        raise ValueError(f"There is no {name} here: torch {torch.__version__} finds no GPU. Give --device cpu.")
    return name or ("cuda" if available else "cpu")


Arguments = tuple[ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments]


def parse_arguments(argv: list[str] | None = None, description: str | None = None) -> Arguments:
    """
    A command line to arguments. The first word may name a YAML or JSON file, or one of this package's recipes;
    options after it win over the file. Without file, data and model, the recipe `digits` is used.

    Args:
        argv (`list[str]`, *optional*): the words after the program's name; by default the process's own.
        description (`str`, *optional*): head of `--help`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = _recipe_words(_find_recipe(argv[0])) + argv[1:]
    elif not _NAMING_OPTIONS & _options(argv):
        argv = _recipe_words(_find_recipe("digits")) + argv
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments),
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    try:
        model_args, data_args, augmentation_args, training_args = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    if not {"--do_train", "--do_eval"} & _options(argv):
        training_args.do_train = training_args.do_eval = True
    return model_args, data_args, augmentation_args, training_args


_NAMING_OPTIONS = {
    "--help", "--dataset_name", "--train_dir", "--validation_dir", "--model_name_or_path", "--model_size",
}  # fmt: skip


def _options(argv: list[str]) -> set[str]:
    """The options in a command line; HfArgumentParser takes them with hyphens too."""
    return {"--" + word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find_recipe(name: str) -> Path:
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise SystemExit(f"There is no file {name}, and no recipe of that name; there are {', '.join(recipe_names())}.")


def _recipe_words(path: Path) -> list[str]:
    """A recipe file's entries as the words of a command line."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} isn't a YAML or JSON file of options: {error}") from error
    if not isinstance(content, dict):
        raise SystemExit(f"{path} must hold option names and values, as in '--help', one a line.")
    words = []
    for name, value in content.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words.extend(map(str, value))
        else:
            words.append(str(value))
    return words
