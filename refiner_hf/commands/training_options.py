"""How the words of `refiner train` become arguments."""

import argparse
import json
import os
import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser

from ..data.arguments import AugmentationArguments, DataArguments
from ..training.model_arguments import ModelArguments
from ..training.options import RefinerTrainingOptions
from .library_options import library_options
from .recipes import AUTO, Recipe, as_mapping, load_recipe, recipe_names
from .running import HelpFormatter, check_options


if TYPE_CHECKING:
    from ..auto.options import Arguments
    from ..training.arguments import RefinerTrainingArguments

TIME_BUDGET = "20min"  # if none is given
# Without transformers' training options, so that help is there at once.
_OWN_KINDS: Any = (ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingOptions)


def parse_arguments(argv: list[str] | None = None) -> "Arguments":
    """A command line to arguments: see [`parse_training`]."""
    *arguments, _ = parse_training(argv)
    return tuple(arguments)


def parse_training(
    argv: list[str] | None = None, program: str | None = None, description: str = ""
) -> "tuple[ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments, Recipe]":
    """
    A command line to arguments. The first word may name a YAML or JSON file, or one of this package's recipes;
    options after it win over the file. Without file, a training on named data gets the recipe `auto`, which is made
    for them; without data and model, the recipe is `digits`. With `--show_recipe NAME` the recipe is printed, and the
    process ends as after `--help`.

    Args:
        argv (`list[str]`, *optional*): the words after the program's name. By default the process's own.
        program (`str`, *optional*): its name, for `--help`.
        description (`str`, *optional*): head of `--help`.

    Returns:
        the arguments of the training, and the recipe that they have in part.

    Raises:
        `ValueError`: what is wrong with the recipe. (What is wrong with an option ends the process.)
    """
    own = _options_about_it()
    about, argv = own.parse_known_args(argv)
    if "help_all" in about:
        _parser(program, description, own).print_help()
        own.exit()
    _check_quickly(argv, program, description, own)
    from ..auto.options import KINDS

    if "show_recipe" in about:
        argv.insert(0, about.show_recipe)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else _usual_recipe(argv)
    parser = _parser(program, description, own)
    if "time_budget" in about and name != AUTO:
        parser.error("--time_budget is for the recipe auto, which chooses what fits into it.")
    given = _given(parser, argv)
    if name == AUTO:
        from .auto_recipe import make_auto_recipe  # which opens the data, with packages for training

        recipe = make_auto_recipe(given, vars(about).get("time_budget", TIME_BUDGET), show="show_recipe" not in about)
    else:
        recipe = load_recipe(name) if name is not None else Recipe({})
    if unknown := sorted(recipe.options.keys() - {field.name for kind in KINDS for field in fields(kind)}):
        raise ValueError(f"{recipe.origin} has {', '.join(unknown)}, which --help doesn't list as an option.")
    words = recipe.to_words() + argv
    if name == AUTO and "config_overrides" in given:  # they change some fields of the network, and not all
        fields_of_both = recipe.options.get("config_overrides", {}) | given["config_overrides"]
        words += ["--config_overrides", json.dumps(fields_of_both)]
    if not {"--do_train", "--do_eval"} & _options(words):
        words += ["--do_train", "true", "--do_eval", "true"]
    if "show_recipe" in about:
        parser.parse_args(words)  # finds errors
        print(recipe.to_yaml(given), end="")
        parser.exit()
    try:
        return *parser.parse_args_into_dataclasses(words), recipe
    except ValueError as error:
        parser.error(str(error))


def _parser(program: str | None, description: str, own: argparse.ArgumentParser) -> HfArgumentParser:
    """Of all options, those of transformers among them; making it takes seconds."""
    from ..auto.options import KINDS

    return _parser_of(KINDS, program, description, own)


def _parser_of(kinds: Any, program: str | None, description: str, own: argparse.ArgumentParser) -> HfArgumentParser:
    return HfArgumentParser(
        kinds,
        prog=program,
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        parents=[own],
    )


def _check_quickly(argv: list[str], program: str | None, description: str, own: argparse.ArgumentParser) -> None:
    """
    Shows help; finds options that there aren't, values that they can't have, and folders that aren't there. All that
    without torch, at once.
    """
    of_transformers = library_options()
    parser = _parser_of(_OWN_KINDS, program, description, own)
    parser.epilog = textwrap.fill(
        "More options, of transformers' TrainingArguments, which --help_all describes: "
        + ", ".join(f"--{name}" for name in of_transformers),
        width=100,
        break_on_hyphens=False,
    )
    known, others = parser.parse_known_args(argv)
    check_options(parser, others, of_transformers)
    for folder in (known.train_dir, known.validation_dir, known.test_dir):
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(f"There is no folder {folder}.")


def _options_about_it() -> argparse.ArgumentParser:
    """What is about the recipe and the help, and no option of a training."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument(
        "--help_all",
        "--help-all",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Show all options, with those of transformers' TrainingArguments.",
    )
    own.add_argument(
        "--show_recipe",
        "--show-recipe",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="Print this recipe as one YAML file, with what its base says and with the other options given here in "
        f"place of its own. Nothing is trained. Recipes: {', '.join([AUTO, *recipe_names()])}, or a file.",
    )
    own.add_argument(
        "--time_budget",
        "--time-budget",
        metavar="TIME",
        default=argparse.SUPPRESS,
        help="How long the training, with its evaluations, may take, such as 90s, 20min or 1h30min: the recipe auto "
        f"times a few steps, and chooses what fits. Default: {TIME_BUDGET}.",
    )
    return own


def _usual_recipe(argv: list[str]) -> str | None:
    """The recipe of a command that names none."""
    options = _options(argv)
    if not _NAMING_OPTIONS & options:
        return "digits"
    trains = "--do_train" in options or "--do_eval" not in options
    return AUTO if trains and {"--train_dir", "--dataset_name"} & options and "--streaming" not in options else None


def _given(parser: HfArgumentParser, argv: list[str]) -> dict[str, Any]:
    """The options in a command line, by name."""
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(defaults))
    given = {name: as_mapping(value) for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    parser.set_defaults(**defaults)
    return given


_NAMING_OPTIONS = {
    "--help", "--dataset_name", "--train_dir", "--validation_dir", "--test_dir", "--model_name_or_path",
    "--model_size",
}  # fmt: skip


def _options(argv: list[str]) -> set[str]:
    """The options in a command line; HfArgumentParser takes them with hyphens too."""
    return {"--" + word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
