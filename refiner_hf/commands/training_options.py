"""How the words of `refiner train` become arguments."""

import argparse
from dataclasses import fields

from transformers import HfArgumentParser

from ..data.arguments import AugmentationArguments, DataArguments
from ..training.arguments import ModelArguments, RefinerTrainingArguments
from .recipes import Recipe, load_recipe, recipe_names
from .running import HelpFormatter


Arguments = tuple[ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments]


def parse_arguments(argv: list[str] | None = None, program: str | None = None, description: str = "") -> Arguments:
    """
    A command line to arguments. The first word may name a YAML or JSON file, or one of this package's recipes;
    options after it win over the file. Without file, data and model, the recipe `digits` is used. With
    `--show_recipe NAME` the recipe is printed, and the process ends as after `--help`.

    Args:
        argv (`list[str]`, *optional*): the words after the program's name. By default the process's own.
        program (`str`, *optional*): its name, for `--help`.
        description (`str`, *optional*): head of `--help`.

    Raises:
        `ValueError`: what is wrong with the recipe. (What is wrong with an option ends the process.)
    """
    showing = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    showing.add_argument(
        "--show_recipe",
        "--show-recipe",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="Print this recipe as one YAML file, with what its base says and with the other options given here in "
        f"place of its own. Nothing is trained. Recipes: {', '.join(recipe_names())}, or a file.",
    )
    shown, argv = showing.parse_known_args(argv)
    if "show_recipe" in shown:
        argv.insert(0, shown.show_recipe)
    recipe = Recipe({})
    if argv and not argv[0].startswith("-"):
        recipe = load_recipe(argv.pop(0))
    elif not _NAMING_OPTIONS & _options(argv):
        recipe = load_recipe("digits")
    kinds = (ModelArguments, DataArguments, AugmentationArguments, RefinerTrainingArguments)
    if unknown := sorted(recipe.options.keys() - {field.name for kind in kinds for field in fields(kind)}):
        raise ValueError(f"{recipe.origin} has {', '.join(unknown)}, which --help doesn't list as an option.")
    parser = HfArgumentParser(
        kinds,
        prog=program,
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        parents=[showing],
    )
    words = recipe.to_words() + argv
    if not {"--do_train", "--do_eval"} & _options(words):
        words += ["--do_train", "true", "--do_eval", "true"]
    if "show_recipe" in shown:
        every_option = vars(parser.parse_args(words))  # finds errors, too
        parser.set_defaults(**dict.fromkeys(every_option))
        given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
        print(recipe.to_yaml(given), end="")
        parser.exit()
    try:
        return parser.parse_args_into_dataclasses(words)
    except ValueError as error:
        parser.error(str(error))


_NAMING_OPTIONS = {
    "--help", "--dataset_name", "--train_dir", "--validation_dir", "--model_name_or_path", "--model_size",
}  # fmt: skip


def _options(argv: list[str]) -> set[str]:
    """The options in a command line; HfArgumentParser takes them with hyphens too."""
    return {"--" + word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
