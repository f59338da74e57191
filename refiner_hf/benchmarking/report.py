"""A record as tables and plots. Every ratio is to the refinement module by module ("eager"), in the same run."""

from pathlib import Path
from typing import Any

import numpy as np

from ..utils.markdown import markdown_table
from ..utils.measure import OUT_OF_MEMORY
from .contenders import BASE, COMPILED
from .plots import plot_bars, plot_curves
from .startup import IMPORT_TORCH
from .summary import Results, memory_ratio, ratio, settings, share_of_roofline


AMOUNTS = {
    ("model", "inference"): "inference, images/s",
    ("model", "training"): "training step, ms",
    ("op", "inference"): "inference, ms",
    ("op", "forward"): "forward in training, ms",
    ("op", "training"): "forward and backward, ms",
}
TITLES = {"model": "Networks", "op": "One refinement on its own"}


def write_report(record: dict[str, Any], stem: Path) -> str:
    """
    Writes `STEM.md`, `STEM.png` and, if curves were measured, `STEM_curves.png`.

    Returns:
        the Markdown.
    """
    parts = [part for part in TITLES if settings(record, part)]
    pictures = []
    if parts:
        plot_bars({part: settings(record, part) for part in parts}, Path(f"{stem}.png"))
        pictures.append(f"![Relative to {BASE}]({stem.name}.png)")
    if curves := [result for result in record["results"].values() if result["part"] == "curves"]:
        curves_path = Path(f"{stem}_curves.png")
        plot_curves(curves, curves_path)
        pictures.append(f"![Cost against tokens and batch]({curves_path.name})")
    sections = [_section(record, part) for part in parts]
    if "startup" in record:
        sections.append(_startup(record["startup"]))
    text = "\n\n".join([_head(record), *sections, *pictures]) + "\n"
    Path(f"{stem}.md").write_text(text, encoding="utf-8")
    return text


def _head(record: dict[str, Any]) -> str:
    facts = record["facts"] | {"date": record["date"]}
    if record["roofline"]:
        facts["the machine's own rates"] = (
            f"{record['roofline']['flops_per_second'] / 1e9:.4g} GFLOP/s in a product of 2048 x 2048, "
            f"{record['roofline']['bytes_per_second'] / 1e9:.3g} GB/s read and written in a copy"
        )
    rows = [(name.replace("_", " "), "none: not a checkout" if fact is None else fact) for name, fact in facts.items()]
    commands = "\n".join(record["commands"])
    return f"# Benchmark\n\nMade by\n\n```bash\n{commands}\n```\n\n{markdown_table(['', ''], rows)}"


def _section(record: dict[str, Any], part: str) -> str:
    found = settings(record, part)
    kinds = [kind for some_part, kind in AMOUNTS if some_part == part]
    head = ["", "contender"]
    for kind in kinds:
        head += ["batch", AMOUNTS[part, kind], f"times {BASE}'s", "memory, MB", "GFLOP/s"]
    head += ["GFLOP", "MB moved"]
    rows, failures = [], []
    for setting, results in found.items():
        for name in dict.fromkeys(name for result in results.values() for name in result["rows"]):
            cells = [setting, name]
            for kind in kinds:
                row = results.get(kind, {}).get("rows", {}).get(name)
                cells += [""] * 5 if row is None else _cells(results[kind], name, record["roofline"])
                if row and row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY:
                    failures.append(f"- {setting}, {name}, {kind}: {row['error']}")
            rows.append(cells + _paper_cells(results, name))
    texts = [f"## {TITLES[part]}", markdown_table(head, rows), _notes(part, found)]
    return "\n\n".join([*texts, "\n".join(failures)] if failures else texts)


def _startup(times: dict[str, list[float]]) -> str:
    rows = []
    for name, seconds in times.items():
        compared = ratio({"seconds": seconds}, {"seconds": times[IMPORT_TORCH]})
        assert compared is not None  # both were measured
        relative = f"{compared[0]:.2f} ({compared[1]:.2f} to {compared[2]:.2f})"
        rows.append([f"`{name}`", _number(float(np.median(seconds))), relative])
    table = markdown_table(["", "seconds", f"times those of `{IMPORT_TORCH}`"], rows)
    return f"## Commands and imports\n\n{table}\n\nFrom a process's start to its end, medians (quartiles)."


def _cells(result: dict[str, Any], name: str, roofline: dict[str, float] | None) -> list[str]:
    row, base = result["rows"][name], result["rows"].get(BASE, {})
    if "error" in row:
        return [result["batch_size"], OUT_OF_MEMORY if row["error"] == OUT_OF_MEMORY else "failed", "", "", ""]
    seconds = float(np.median(row["seconds"]))
    is_rate = "images/s" in AMOUNTS[result["part"], result["kind"]]
    amount = result["batch_size"] / seconds if is_rate else 1e3 * seconds
    compared = ratio(row, base, inverse=is_rate)
    memory = _number(row["memory"] / 1e6) if "memory" in row else ""
    if less := memory_ratio(row, base):
        memory += f" ({less:.2f}x)"
    speed = _number(row["flops"] / seconds / 1e9)
    if share := share_of_roofline(row, result["part"], roofline):
        speed += f" ({share:.0%})"
    relative = f"{compared[0]:.2f} ({compared[1]:.2f} to {compared[2]:.2f})" if compared else ""
    return [result["batch_size"], _number(amount), relative, memory, speed]


def _paper_cells(results: Results, name: str) -> list[str]:
    """Operations and bytes of the inference."""
    row = results.get("inference", {}).get("rows", {}).get(name)
    if row is None:
        return ["", ""]
    return [_number(row["flops"] / 1e9), _number(row.get("bytes_moved", row["bytes"]) / 1e6)]


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _notes(part: str, found: dict[str, Results]) -> str:
    notes = [
        f"Times are medians; beside them what they are in relation to {BASE}'s of the same round: median (quartiles). "
        "Memory is the peak of a step above what stays between steps (weights, optimizer states; engines keep all of "
        "theirs, so it isn't listed). GFLOP and MB moved "
        "are those of the inference, for the whole batch: 2 operations per multiply-add of products and convolutions; "
        "bytes that have to be read and written at least. A step with backward counts as three forwards; what an "
        "implementation recomputes isn't counted."
    ]
    if part == "op":
        notes.append(f"For {BASE} MB moved are what its modules read and write, one after the other.")
    shares = {
        "model": "of the machine's own rate of matrix products",
        "op": "of the roofline: of the time that operations or memory traffic, whichever is longer, take at the "
        "machine's own rates",
    }
    notes.append(f"Percentages, where there are some, are {shares[part]}.")
    for setting, results in found.items():
        for kind, result in results.items():
            notes += [
                f"Compiling {name.removeprefix('compiled ')}, {setting}, {kind}: {row['first_seconds']:.0f} s."
                for name, row in result["rows"].items()
                if name in COMPILED and "first_seconds" in row
            ]
    return " ".join(notes)
