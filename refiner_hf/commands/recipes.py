"""Recipes: files of options, each with what its base says where it says nothing itself."""

import json
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml


RECIPES = Path(__file__).parent.parent / "recipes"
AUTO = "auto"  # a recipe that is made for the data, and no file


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        options (`dict[str, Any]`): names of options, without dashes, and their values.
        files (`tuple[Path, ...]`): where they come from: the recipe's own file, its base, the base's base.
    """

    options: dict[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def is_auto(self) -> bool:
        """Whether it was made for the data, and isn't in a file of its own yet."""
        return self.files == (Path(AUTO),)

    @property
    def origin(self) -> str:
        """The files' names, as in "mine.yaml on digits.yaml"."""
        return " on ".join(path.name for path in self.files)

    def to_words(self) -> list[str]:
        """The options as the words of a command line."""
        words = []
        for name, value in self.options.items():
            words.append(f"--{name}")
            if isinstance(value, dict):
                words.append(json.dumps(value))
            elif isinstance(value, list):
                words.extend(map(str, value))
            else:
                words.append(str(value))
        return words

    def to_yaml(self, given: dict[str, Any]) -> str:
        """One recipe file without a base, with the options `given` on the command line in place of the recipe's."""
        head = f"# {self.origin}\n" + (f"# From the command line: {', '.join(given)}\n" if given else "")
        options = self.options | given
        return head + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """The recipes that come with the package. A file whose name begins with an underscore is a base only."""
    return sorted(path.stem for path in RECIPES.glob("[!_]*.yaml"))


def load_recipe(name: str) -> Recipe:
    """
    Reads a recipe, its base, the base's base, and so on. What the recipe says wins over its base; mappings are merged
    key by key; an option that is null has its default again.

    Args:
        name (`str`):
            path of a YAML or JSON file, or name of one of this package's recipes. The entry `base` of a file names
            another in the same way; its path begins at the folder of the file that names it.

    Raises:
        `ValueError`: a file that isn't there, holds no options or is its own base; or a base in place of a recipe.
    """
    path = _find(name)
    if path.name.startswith("_"):
        raise ValueError(f"{path} is only a base for recipes. The recipes are {', '.join(recipe_names())}.")
    contents = {path: _read(path)}
    while (base := contents[path].pop("base", None)) is not None:
        path = _find(str(base), named_by=path)
        if any(path.samefile(other) for other in contents):
            raise ValueError(f"A recipe can't be its own base: {Recipe({}, (*contents, path)).origin}.")
        contents[path] = _read(path)
    options = reduce(lambda below, above: _merge(above, below), reversed(contents.values()))
    return Recipe({name: value for name, value in options.items() if value is not None}, tuple(contents))


def _find(name: str, named_by: Path | None = None) -> Path:
    path = Path(name) if named_by is None else named_by.parent / name
    for candidate in (path, RECIPES / f"{name.removesuffix('.yaml')}.yaml"):
        if candidate.is_file():
            return candidate
    reason = "" if named_by is None else f"{named_by} has the base {name}. "
    raise ValueError(
        f"{reason}There is no file {path}, and no recipe of that name; there are {', '.join(recipe_names())}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} isn't a YAML or JSON file of options: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold option names and values, as in '--help', one a line.")
    # Two spellings of one option would not find each other in the merge.
    return {str(name).replace("-", "_"): as_mapping(value) for name, value in content.items()}


def as_mapping(value: Any) -> Any:
    """A JSON object in a string, as command lines have it, becomes a mapping. Anything else stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
    except json.JSONDecodeError:
        return value  # an error comes when the option is parsed


def _merge(above: dict, below: dict) -> dict:
    """In the order of `above`, then what only `below` has."""
    both_mappings = {
        name: _merge(above[name], below[name])
        for name in above.keys() & below.keys()
        if isinstance(above[name], dict) and isinstance(below[name], dict)
    }
    return above | below | above | both_mappings
