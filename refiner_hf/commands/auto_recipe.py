"""The recipe `auto`: made for the data and the time at hand, and shown."""

from pathlib import Path
from typing import Any

import pandas as pd

from ..auto.choose import Choices
from ..auto.look import Facts
from ..auto.run import choose_options
from ..training.output_folder import FINISHED_FILE
from ..utils.processes import Processes
from ..utils.run_files import AUTO_RECIPE, RUN_FILE
from ..utils.text import counted
from .recipes import AUTO, Recipe, load_recipe


# Of the given options these aren't part of the recipe: they say where things are, which differs from run to run.
_NOT_KEPT = {"output_dir", "train_dir", "validation_dir", "test_dir", "cache_dir", "token", "hub_token", "dry_run"}


def make_auto_recipe(given: dict[str, Any], time_budget: str, *, show: bool) -> Recipe:
    """
    The options that weren't given, chosen for the data and the time. A run that has begun goes on with what was chosen
    then. Several processes time their steps together, and the first one chooses.

    Args:
        given (`dict[str, Any]`): the options that were given, by name; `config_overrides` as a mapping.
        time_budget (`str`): how long the training, with its evaluations, may take, such as "20min".
        show (`bool`): whether to print what was chosen, and why.

    Raises:
        `ValueError`: a time that isn't one; data or options that don't fit.
    """
    seconds, processes = seconds_of(time_budget), Processes()
    return processes.from_first(_make(given, seconds, processes.count, show and processes.is_first))


def seconds_of(time_budget: str) -> float:
    """
    Raises:
        `ValueError`: not a time, or none at all.
    """
    try:
        seconds = 0.0 if time_budget.strip().isdigit() else pd.Timedelta(time_budget).total_seconds()
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"--time_budget must be a time with its unit, such as 20min or 1h30min, got {time_budget!r}.")
    return seconds


def _make(given: dict[str, Any], seconds: float, processes: int, show: bool) -> Recipe:
    folder = Path(given.get("output_dir") or "trainer_output")
    folds = given.get("k_folds") if given.get("fold") is None else None
    folder, seconds = (folder, seconds) if folds is None else (folder / "fold_1", seconds / folds)
    file = folder / AUTO_RECIPE
    if file.exists() and (folder / RUN_FILE).exists() and (folds or not (folder / FINISHED_FILE).exists()):
        if show:
            print(f"This run began with the options in {file}, and goes on with them.")
        return load_recipe(str(file))
    facts, choices = choose_options(given, seconds, processes)
    chosen = {name: value for name, value in choices.options.items() if name not in _NOT_KEPT}
    recipe = Recipe(chosen, (Path(AUTO),))
    if show:
        print(_table(facts, choices, seconds))
        print(f"\nThe training keeps this as a recipe: {file}\n", flush=True)
    return recipe


def _table(facts: Facts, choices: Choices, seconds: float) -> str:
    """What was seen and chosen, with the reasons."""
    colours = "grey" if facts.grey else "coloured"
    seen = (
        f"{counted(facts.images, 'training image')} of {counted(facts.labels, 'label')} ({facts.fewest:,} to "
        f"{facts.most:,} of each), {facts.width} x {facts.height} pixels (median), {colours}; "
        f"{counted(facts.evaluated, 'image')} to evaluate on; {seconds / 60:.3g} minutes to train"
    )
    rows = [(row.name, _shown(row.value), row.reason) for row in choices.rows if row.reason]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for name, value, reason in rows]
    return "\n".join([f"Seen: {seen}.", "", "Chosen (an option of the same name overrides it):", "", *lines])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
