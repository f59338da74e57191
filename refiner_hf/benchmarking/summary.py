"""Ratios, made of a record's measurements."""

from typing import Any

import numpy as np


Results = dict[str, Any]  # of one setting, by kind


def settings(record: dict[str, Any], part: str) -> dict[str, Results]:
    """Results of one part by setting ("S 224", and the batch where there are several) and kind, the complete ones."""
    results = [result for result in record["results"].values() if result["part"] == part and _is_complete(result)]
    batches: dict[tuple, set[int]] = {}
    for result in results:
        batches.setdefault((result["network"], result["image_size"], result["kind"]), set()).add(result["batch_size"])
    several = {of[:2] for of, sizes in batches.items() if len(sizes) > 1}
    found: dict[str, Results] = {}
    for result in results:
        setting = f"{result['network']} {result['image_size']}"
        if (result["network"], result["image_size"]) in several:
            setting += f", batch {result['batch_size']}"
        found.setdefault(setting, {})[result["kind"]] = result
    return found


def ratio(row: dict[str, Any], base: dict[str, Any], inverse: bool = False) -> tuple[float, float, float] | None:
    """
    Median and quartiles of a contender's times in relation to the base's of the same round; `inverse` for speeds.
    `None` where one of them failed.
    """
    if "seconds" not in row or "seconds" not in base:
        return None
    ratios = np.array(row["seconds"]) / np.array(base["seconds"])
    low, middle, high = np.percentile(1 / ratios if inverse else ratios, (25, 50, 75))
    return float(middle), float(low), float(high)


def memory_ratio(row: dict[str, Any], base: dict[str, Any]) -> float | None:
    """Peak memory in relation to the base's; `None` where one of them isn't known."""
    return row["memory"] / base["memory"] if row.get("memory") and base.get("memory") else None


def share_of_roofline(row: dict[str, Any], part: str, roofline: dict[str, float] | None) -> float | None:
    """
    How near a step comes to the machine's own rates: for a network its matrix products, for a refinement whichever of
    operations and memory traffic takes longer.
    """
    if roofline is None or "seconds" not in row:
        return None
    least = row["flops"] / roofline["flops_per_second"]
    if part == "op":
        least = max(least, row["bytes"] / roofline["bytes_per_second"])
    return least / float(np.median(row["seconds"]))


def _is_complete(result: dict[str, Any]) -> bool:
    return all("seconds" in row or "error" in row for row in result["rows"].values())
