"""
What a call of a small network costs on a CPU before it computes anything, and what each image adds: times of some
batches with a line through them, beside engines on the exported graph. And what one image's time goes into where the
network is compiled. Writes Markdown.

    python scripts/profile_call.py                                  # docs/benchmarks/cpu_call.md, a minute
    python scripts/profile_call.py --rounds 5 --batch_sizes 1 4 --output trial.md
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from refiner_hf.benchmarking.engines import engine_step
from refiner_hf.benchmarking.pages import facts_of_run
from refiner_hf.commands.recipes import load_recipe
from refiner_hf.configuration_refiner import RefinerConfig
from refiner_hf.modeling_refiner import RefinerForImageClassification
from refiner_hf.utils.markdown import markdown_table
from refiner_hf.utils.measure import time_in_turns


COMPILED = "compiled"
ENGINES = ("onnxruntime", "OpenVINO")  # the benchmark's names

# What the profiler calls the parts of a compiled call. Of parts within each other the outer one counts.
CHECK, REST = "asking whether what was compiled fits", "norms, sums, copies, and what Python does between"
PARTS = {
    "TorchDynamo Cache Lookup": CHECK,
    "refiner_hf::embed_patches": "stem and patch projection",
    "refiner_hf::native_attend": "maps and their refinement",
    "refiner_hf::native_refine": "maps and their refinement",
    "refiner_hf::linear": "linear layers",
    "aten::addmm": "linear layers",
}
REPETITIONS = 50  # of what is profiled

TEXT = """# What a call of a small network costs on a CPU

Made by

```bash
{command}
```

The demo's network ({subject}) in float32; {machine}; {versions}; commit {commit}, {date}. Times are medians of
{rounds} rounds in which all take turns. "A call" and "each image" are the line through the times: what is there
without any image, and what every image adds. "Operations" are how many Python starts in a call; what is compiled
starts its own.

{calls}

"Without checks" is compiled with `options={{"guard_filter_fn": lambda guards: [False] * len(guards)}}`: what was
compiled doesn't ask, at each call, whether it still fits the network and the input.

What the time of one image goes into where the network is compiled, by torch's profiler, whose shares are taken of the
median above:

{parts}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs=2, default=[1, 32], metavar=("FEW", "MANY"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/cpu_call.md"))
    args = parser.parse_args()
    if not 0 < args.batch_sizes[0] < args.batch_sizes[1]:
        parser.error("the second of --batch_sizes has to be the larger one")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = RefinerConfig(**load_recipe("digits").options["config_overrides"], num_labels=10)
    model = RefinerForImageClassification(config).eval()
    height, width = config.image_height_width
    pixels = [torch.randn(size, 3, height, width) for size in args.batch_sizes]
    with torch.no_grad():
        times, operations = measure(model, pixels, args.rounds)
        text = TEXT.format(
            **facts_of_run(),
            subject=f"{height} x {width} pixels, {config.num_hidden_layers} layers of width {config.hidden_size}",
            rounds=args.rounds,
            calls=table_of_calls(times, operations, args.batch_sizes),
            parts=table_of_parts(model, pixels[0], times[COMPILED][0]),
        )
    args.output.write_text(text, encoding="utf-8")
    print(text)


def measure(
    model: RefinerForImageClassification, batches: list[torch.Tensor], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """By contender, milliseconds for each batch; and of those that torch runs, how many operations Python starts."""
    times: dict[str, list[float]] = {}
    for pixels in batches:
        steps = steps_with(model, pixels)
        taken = time_in_turns({name: lambda step=step: step for name, step in steps.items()}, rounds, "cpu")
        for name, row in taken.items():
            times.setdefault(name, []).append(1e3 * median(row["seconds"]))
    return times, {name: operations_of(step) for name, step in steps.items() if name not in ENGINES}


def table_of_calls(times: dict[str, list[float]], operations: dict[str, int], sizes: list[int]) -> str:
    rows = []
    for name, (few, many) in times.items():
        each = (many - few) / (sizes[1] - sizes[0])
        call = few - sizes[0] * each
        rows.append([name, operations.get(name, ""), f"{call:.2f}", f"{each:.3f}", f"{few:.2f}", f"{many:.2f}"])
    measured = (f"{size} image{'s' * (size > 1)}, ms" for size in sizes)
    return markdown_table(["", "operations", "a call, ms", "each image, ms", *measured], rows)


def table_of_parts(model: RefinerForImageClassification, pixels: torch.Tensor, milliseconds: float) -> str:
    torch.compiler.reset()
    step = partial(torch.compile(model, dynamic=False), pixel_values=pixels)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(REPETITIONS):
            step()
    parts = dict.fromkeys([CHECK, *PARTS.values(), REST], 0.0)
    for event in profiler.events():
        part, around = REST, event
        while around is not None:
            part = PARTS.get(around.name, part)
            around = around.cpu_parent
        parts[part] += event.self_cpu_time_total
    whole = sum(parts.values())
    rows = [[name, f"{milliseconds * part / whole:.2f}"] for name, part in parts.items()]
    return markdown_table(["part", "ms"], [*rows, ["**together**", f"**{milliseconds:.2f}**"]])


def steps_with(model: RefinerForImageClassification, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """By name, what answers these images."""
    torch.compiler.reset()  # what was compiled for other sizes counts against the compiler's limit of variants
    forms = {
        "auto": model,
        COMPILED: torch.compile(model, dynamic=False),
        "compiled, without checks": torch.compile(
            lambda pixel_values: model(pixel_values),  # code of its own: the compiler would take what it made before
            dynamic=False,
            options={"guard_filter_fn": lambda guards: [False] * len(guards)},
        ),
    }
    return {
        **{name: partial(form, pixel_values=pixels) for name, form in forms.items()},
        **{name: engine_step(name, model, pixels) for name in ENGINES},
    }


def operations_of(step: Callable[[], object]) -> int:
    """How many operations Python starts, those within others not counted."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return sum(event.cpu_parent is None and "::" in event.name for event in profiler.events())


if __name__ == "__main__":
    main()
