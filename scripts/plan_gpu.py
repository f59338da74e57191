"""
What inference and the kernels of the refinement cost on an H100, on paper: operations launched, bytes moved, and from
the compiler registers, spills and instructions. No GPU is needed, and nothing is measured. Writes Markdown.

    python scripts/plan_gpu.py                                        # docs/benchmarks/gpu_plan.md, about a minute
    python scripts/plan_gpu.py --model tiny --image_size 64 --batch_size 2 --output trial.md
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from math import ceil
from pathlib import Path
from unittest.mock import patch

import torch

from refiner_hf.benchmarking.contenders import NETWORKS
from refiner_hf.benchmarking.on_paper import Compiled, Launch, Operation, compile_launch, imagined_gpu, operations_of
from refiner_hf.configuration_refiner import RefinerConfig
from refiner_hf.modeling_refiner import RefinerAttention, RefinerForImageClassification
from refiner_hf.utils.markdown import markdown_table


# An H100 SXM, by NVIDIA's data sheet: bytes a second; operations a second of dense products in bfloat16; and of
# multiprocessors with four schedulers, each of which issues an instruction of a warp in a cycle of the clock that goes
# with those operations. How many programs a multiprocessor holds is limited by its registers and bytes.
BANDWIDTH, PRODUCTS = 3.35e12, 989e12
SMS, INSTRUCTIONS = 132, 132 * 4 * 1.83e9
REGISTERS, SHARED, MOST_WARPS = 65536, 227 * 1024, 64
CAPABILITIES = {"8.0": 80, "9.0": 90}


TEXT = """# What a GPU has to do, on paper

Made by

```bash
python scripts/plan_gpu.py {command}
```

Nothing here is measured. {subject}, bfloat16; {versions}. An operation reads and writes each of its tensors once. An
H100 moves {bandwidth:.2f} TB/s, does {products:.0f} TFLOP/s of dense products in bfloat16, and issues
{instructions:.0f} billion instructions of warps a second ({sms} multiprocessors, 4 schedulers each, 1.83 GHz). "At
least" adds up, over the operations, whichever of the three takes longest.

## Inference

{layers}

## Training

Forward and backward of a layer's attention, under autocast.

{training}

## Kernels

As the compiler makes them, for compute capability 8.0 (A100) and 9.0 (H100). Warps at once (64 is the most),
instructions and times are those on an H100. A kernel with two loops has the instructions of both; one without has all
of its instructions there. Times are of all launches together.

{kernels}
"""


HEAD = [
    "attention of a layer", "layers", "map", "launched", "MB moved", "memory, ms", "products, ms",
    "kernels' instructions, ms", "at least, ms",
]  # fmt: skip


def steps_of(launch: Launch) -> int:
    """How often the loops of a kernel run."""
    given = launch.arguments
    if "COLUMNS" in given:  # a layer's own map
        size = given["ROWS" if launch.name == "key_gradient_kernel" else "COLUMNS"]
        return ceil((given["N"] + 2 * given.get("HALF", 0)) / size)
    if launch.name == "join_kernel":
        return ceil(given["programs"] / given["PROGRAMS"])
    return given["STEPS"] if "STEPS" in given else given.get("ROWS", 0) + given.get("K", 0) - 1


def instructions_of(launch: Launch, compiled: Compiled) -> int:
    """Instructions of all warps."""
    of_a_warp = compiled.outside + sum(compiled.loops) * (steps_of(launch) if compiled.loops else 0)
    return launch.programs * compiled.warps * of_a_warp


def warps_at_once(compiled: Compiled) -> int:
    """Of a multiprocessor."""
    by_registers = REGISTERS // (32 * compiled.warps * -(-compiled.registers // 8) * 8)
    programs = min(by_registers, SHARED // (compiled.shared + 1024), MOST_WARPS // compiled.warps)
    return programs * compiled.warps


class Costs:
    """Sums over operations; a kernel is compiled once for all launches that are alike."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[str, int], Compiled] = {}

    def compile(self, launch: Launch, capability: int = 90) -> Compiled:
        key = launch.compiled_for, capability
        if key not in self.compiled:
            self.compiled[key] = compile_launch(launch, capability)
        return self.compiled[key]

    def times(self, operation: Operation) -> tuple[float, float, float]:
        """Seconds that memory, tensor cores and a kernel's instructions take at least."""
        launch = operation.launch
        instructions = 0 if launch is None else instructions_of(launch, self.compile(launch))
        return operation.moved / BANDWIDTH, operation.flops / PRODUCTS, instructions / INSTRUCTIONS

    def floor(self, operations: list[Operation]) -> float:
        """Seconds, where each operation takes as long as what it takes most of."""
        return sum(max(self.times(operation)) for operation in operations)

    def row(self, operations: list[Operation]) -> list[str]:
        sums = [1e3 * sum(column) for column in zip(*map(self.times, operations), strict=True)]
        moved = sum(operation.moved for operation in operations)
        return [
            str(len(operations)), f"{moved / 1e6:,.0f}", *(f"{each:.2f}" for each in sums),
            f"{1e3 * self.floor(operations):.2f}",
        ]  # fmt: skip


def layers_of(config: RefinerConfig) -> list[tuple[str, int, int]]:
    """
    Layers that cost the same: what they are called, the number of one of them, and how many there are.
    """
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, kind in enumerate(config.attention_types):
        kinds.setdefault((kind, i > 0 and config.accumulate_attention), []).append(i)
    names = {True: "{}, adds the map before", False: "{}, adds no map"}
    return [
        (
            "refines the map before" if kind == "shared_refined" else names[adds].format(kind),
            of_these[0],
            len(of_these),
        )
        for (kind, adds), of_these in kinds.items()
    ]


def inference(config: RefinerConfig, batch_size: int, by_kernel: bool) -> tuple[dict[int, list], list[Operation]]:
    """By layer, what its attention launches; and what the whole network does."""
    with torch.device("meta"):
        model = RefinerForImageClassification(config).to(torch.bfloat16).eval()
    layers: dict[int, list[Operation]] = {}

    class Watched(RefinerAttention):
        def forward(self, *args):
            results = []
            layers[len(layers)] = operations_of(lambda: results.append(RefinerAttention.forward(self, *args)))
            return results[0]

    by_torch = patch("refiner_hf.modeling_refiner.makes_map", return_value=False)
    with imagined_gpu(), torch.no_grad(), nullcontext() if by_kernel else by_torch:
        model = model.to_empty(device="cuda")
        pixels = torch.empty(
            batch_size, config.num_channels, *config.image_height_width, device="cuda", dtype=torch.bfloat16
        )
        whole = operations_of(lambda: model(pixels))
        for layer in model.refiner.layers:
            layer.attention.__class__ = Watched
        operations_of(lambda: model(pixels))
    return layers, whole


def training_layer(config: RefinerConfig, batch_size: int, layer: int, by_kernel: bool) -> list[Operation]:
    """What a layer's attention launches in training, forward and backward."""
    kind = config.attention_types[layer]
    with torch.device("meta"):
        attention = RefinerAttention(config, kind).train()
    by_torch = patch("refiner_hf.modeling_refiner.makes_map", return_value=False)
    with imagined_gpu(), nullcontext() if by_kernel else by_torch:
        attention.to_empty(device="cpu")  # only there torch knows backward without a GPU
        tokens = 1 + config.patch_grid[0] * config.patch_grid[1]
        hidden_states = torch.empty(batch_size, tokens, config.hidden_size, requires_grad=True)
        shape = batch_size, config.num_attention_heads, tokens, tokens
        previous = None if layer == 0 else torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                output, _, passed_on = attention(hidden_states, previous)
            # A map that a layer makes has a gradient from those that refine it and add it, too.
            outputs = [output] if kind == "shared_refined" else [output, passed_on]
            inputs = [each for each in (hidden_states, previous, *attention.parameters()) if each is not None]
            torch.autograd.grad(outputs, inputs, [torch.empty_like(each) for each in outputs])

        return operations_of(step)


def layer_table(config: RefinerConfig, batch_size: int, costs: Costs) -> Iterator[str]:
    rows, totals = [], []
    for by_kernel, how in ((False, "by torch"), (True, "by kernels")):
        layers, whole = inference(config, batch_size, by_kernel)
        in_layers = [operation for operations in layers.values() for operation in operations]
        rest = 1e3 * (costs.floor(whole) - costs.floor(in_layers))
        for name, layer, count in layers_of(config):
            rows.append([name, str(count), how, *costs.row(layers[layer])])
        totals.append([
            how, str(len(whole)), f"{sum(each.moved for each in whole) / 1e9:.1f}",
            f"{1e3 * costs.floor(in_layers):.1f}", f"{rest:.1f}", f"{1e3 * costs.floor(whole):.1f}",
        ])  # fmt: skip
    yield markdown_table(HEAD, rows)
    yield "The whole network:"
    yield markdown_table(
        ["map", "launched", "GB moved", "attention at least, ms", "all else at least, ms", "together, ms"], totals
    )


def training_table(config: RefinerConfig, batch_size: int, costs: Costs) -> str:
    rows = []
    for by_kernel, how in ((False, "by torch"), (True, "by kernels")):
        for name, layer, count in layers_of(config):
            rows.append([name, str(count), how, *costs.row(training_layer(config, batch_size, layer, by_kernel))])
    return markdown_table(HEAD, rows)


def kernel_table(config: RefinerConfig, batch_size: int, costs: Costs) -> str:
    """One row for all launches of a kernel, with the registers of the one that has most instructions."""
    head = ["kernel", "launches", "warps of a program"]
    for capability in CAPABILITIES:
        head += [f"{name} on {capability}" for name in ("registers", "bytes spilled", "KB shared")]
    head += ["warps at once", "instructions of a step", "steps", "instructions, ms", "memory, ms"]
    layers = [layer for _, layer, _ in layers_of(config)]
    steps = {
        "inference of the network": inference(config, batch_size, True)[1],
        "training of one layer of each kind": [
            operation for layer in layers for operation in training_layer(config, batch_size, layer, True)
        ],
    }
    rows = []
    for step, operations in steps.items():
        rows.append([f"**{step}**", *[""] * (len(head) - 1)])
        launched: dict[str, list[Operation]] = {}
        for operation in operations:
            if operation.launch is not None:
                launched.setdefault(operation.name, []).append(operation)
        for name, same in launched.items():
            launch = max((each.launch for each in same), key=lambda each: instructions_of(each, costs.compile(each)))
            found = [costs.compile(launch, capability) for capability in CAPABILITIES.values()]
            memory, _, instructions = (sum(times) for times in zip(*map(costs.times, same), strict=True))
            row = [f"`{name}`", str(len(same)), str(found[-1].warps)]
            for each in found:
                row += [str(each.registers), str(each.spilled), f"{each.shared / 1024:.0f}"]
            row += [str(warps_at_once(found[-1])), " + ".join(map(str, found[-1].loops)) or str(found[-1].outside)]
            row += [str(steps_of(launch)) if found[-1].loops else "1", f"{1e3 * instructions:.2f}"]
            rows.append([*row, f"{1e3 * memory:.2f}"])
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S", choices=NETWORKS)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--output", default="docs/benchmarks/gpu_plan.md")
    args = parser.parse_args()
    config = NETWORKS[args.model](image_size=args.image_size)
    config.refine_implementation = "triton"
    costs = Costs()
    import triton

    text = TEXT.format(
        command=f"--model {args.model} --image_size {args.image_size} --batch_size {args.batch_size}",
        subject=f"Refiner-{args.model} at {args.image_size} pixels, {args.batch_size} images",
        versions=f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}",
        bandwidth=BANDWIDTH / 1e12, products=PRODUCTS / 1e12, instructions=INSTRUCTIONS / 1e9, sms=SMS,
        layers="\n\n".join(layer_table(config, args.batch_size, costs)),
        training=training_table(config, args.batch_size, costs),
        kernels=kernel_table(config, args.batch_size, costs),
    )  # fmt: skip
    Path(args.output).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
