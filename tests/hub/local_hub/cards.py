"""The check of a card's metadata."""

import re

import yaml


FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def read_card(text: str) -> dict | None:
    """A card's metadata; None where there is none."""
    match = FRONT_MATTER.match(text)
    return yaml.safe_load(match[1] or "") if match else None


def lacking(value, *paths: str) -> list[str]:
    """Those dotted paths that lead to nothing in a nested mapping."""

    def look_up(value, path: str):
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return [path for path in paths if look_up(value, path) in (None, "", [])]


def check_model_index(index) -> list[str]:
    """What the Hub needs to show results, and what is missing of it."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []

    def need(value, where: str, *paths: str) -> None:
        errors.extend(f'"{where}.{path}" is required' for path in lacking(value, *paths))

    for i, model in enumerate(index):
        need(model, f"model-index[{i}]", "name")
        results = model.get("results") if isinstance(model, dict) else None
        if not isinstance(results, list):  # none at all is fine
            errors.append(f'"model-index[{i}].results" is required')
        for j, result in enumerate(results or []):
            where = f"model-index[{i}].results[{j}]"
            need(result, where, "task.type", "dataset.type", "dataset.name", "metrics")
            for k, metric in enumerate(result.get("metrics") or [] if isinstance(result, dict) else []):
                need(metric, f"{where}.metrics[{k}]", "type", "value")
    return errors


def check_card(text: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings that a card's metadata gives rise to."""
    try:
        data = read_card(text)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"], []
    errors = check_model_index(data["model-index"]) if "model-index" in data else []
    licenses = data.get("license", [])
    for license in licenses if isinstance(licenses, list) else [licenses]:
        if not isinstance(license, str) or not LICENSE_ID.fullmatch(license):
            errors.append(f'"license" must be one of the known identifiers, not {license!r}')
    for name in ("tags", "datasets", "metrics"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be an array of strings')
    return errors, []
