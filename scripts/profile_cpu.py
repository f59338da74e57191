"""
What a network's inference on a CPU spends its time on, beside OpenVINO on the exported graph: which parts are faster
there, and by how much. And how fast a linear layer's product is when its weight lies as torch keeps it, and when it
was brought into the product's order before. Writes Markdown.

    python scripts/profile_cpu.py                                      # docs/benchmarks/cpu_profile.md, a minute
    python scripts/profile_cpu.py --model M --threads 2 --batch_size 8 --output trial.md
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import openvino
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from refiner_hf.benchmarking.contenders import NETWORKS
from refiner_hf.benchmarking.engines import engine_step
from refiner_hf.benchmarking.pages import facts_of_run
from refiner_hf.export.graph import export_onnx
from refiner_hf.modeling_refiner import RefinerForImageClassification
from refiner_hf.prepacking_refiner import prepack, prepacked, prepacked_linear
from refiner_hf.utils.markdown import markdown_table
from refiner_hf.utils.measure import time_in_turns


LINEAR, PROJECTION, STEM, REST = "linear layers and their GELU", "patch projection", "stem's convolutions", "all else"
OPENVINO = "OpenVINO"  # the benchmark's name
REPETITIONS = 5  # of what is profiled
CACHE = 256 * 2**20  # bytes of weights that take turns, so that each comes from memory as in a network

TEXT = """# What inference on a CPU spends its time on

Made by

```bash
{command}
```

{subject}; {machine}; {versions}; commit {commit}, {date}. Times of the whole are medians of {rounds} rounds in which
all take turns; each part is its share by torch's profiler and by OpenVINO's counters.

{parts}

"All else" is the refinement, the layers' own maps and what they make of values, norms, sums, copies, and Python. GFLOP
are those of plain products and convolutions; the stem's 3 x 3 convolutions take half as many multiplications here.
"Prepacked" is after `model.prepack_weights()`.

## The product of a linear layer

GFLOP/s of its product alone, with weights that come from memory one after the other: by `torch.nn.functional.linear`;
by oneDNN with the weight as torch keeps it, which `"auto"` takes; by oneDNN with a weight that was brought into the
product's order before, as engines do when they load a network; and by the C++ function that `prepack_weights` is for.

{products}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S", choices=NETWORKS)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/cpu_profile.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = RefinerForImageClassification(NETWORKS[args.model](image_size=args.image_size)).eval()
    pixels = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    with torch.no_grad():
        text = TEXT.format(
            **facts_of_run(),
            subject=f"Refiner-{args.model} at {args.image_size} pixels, batch {args.batch_size}, float32",
            rounds=args.rounds,
            parts=table_of_parts(model, pixels, args.rounds),
            products=table_of_products(model, args.batch_size, args.rounds),
        )
    args.output.write_text(text, encoding="utf-8")
    print(text)


def table_of_parts(model: RefinerForImageClassification, pixels: torch.Tensor, rounds: int) -> str:
    counting_engine = counting_openvino(model, pixels)
    packed = copy.deepcopy(model)
    packed.prepack_weights()
    forms = {
        "auto": model,
        "compiled": torch.compile(model, dynamic=False),
        "prepacked": packed,
        "compiled, prepacked": torch.compile(packed, dynamic=False),
    }
    contenders = {
        **{
            name: (partial(form, pixels), partial(torch_parts, model, partial(form, pixels)))
            for name, form in forms.items()
        },
        OPENVINO: (engine_step(OPENVINO, model, pixels), lambda: openvino_parts(counting_engine)),
    }
    times = time_in_turns({name: lambda step=step: step for name, (step, _) in contenders.items()}, rounds, "cpu")
    found = {}
    for name, (_, parts_of) in contenders.items():
        milliseconds, shares = 1e3 * median(times[name]["seconds"]), parts_of()
        shares[REST] = 1 - sum(shares.values())
        found[name] = {part: milliseconds * share for part, share in shares.items()}
    flops, rows = flops_of_parts(model, len(pixels)), []
    for part in (LINEAR, PROJECTION, STEM, REST):
        row = [part, f"{flops[part] / 1e9:.2f}" if part in flops else ""]
        for parts in found.values():
            rate = f" ({flops[part] / parts[part] / 1e6:.0f} GFLOP/s)" if part in flops else ""
            row.append(f"{parts[part]:.1f}{rate}")
        rows.append(row)
    rows.append(["**together**", "", *(f"**{sum(parts.values()):.1f}**" for parts in found.values())])
    return markdown_table(["part", "GFLOP", *(f"{name}, ms" for name in found)], rows)


def flops_of_parts(model: RefinerForImageClassification, images: int) -> dict[str, int]:
    """2 for each multiplication with its addition."""
    embeddings = model.base_model.embeddings
    stem, projection = embeddings.patch_embeddings.stem, embeddings.patch_embeddings.projection
    height, width = model.config.image_height_width
    tokens = embeddings.position_embeddings.shape[1]
    patches = tokens - model.config.num_prefix_tokens
    linear = sum(each.weight.numel() for each in model.base_model.modules() if isinstance(each, nn.Linear))
    convolutions = sum(each.weight.numel() for each in stem.modules() if isinstance(each, nn.Conv2d))
    return {
        LINEAR: 2 * images * tokens * linear,
        PROJECTION: 2 * images * patches * projection.weight.numel(),
        STEM: 2 * images * (height // 2) * (width // 2) * convolutions,
    }


def torch_parts(model: RefinerForImageClassification, step: Callable[[], object]) -> dict[str, float]:
    """Shares of the time."""
    depth = model.base_model.embeddings.patch_embeddings.projection.weight[0].numel()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(REPETITIONS):
            step()
    parts = dict.fromkeys((LINEAR, PROJECTION, STEM), 0.0)
    total = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        total += event.self_cpu_time_total
        first = 1 if event.key == "aten::addmm" else 0  # a bias comes before what is multiplied
        shape = event.input_shapes[first] if len(event.input_shapes) > first else []
        if event.key in ("refiner_hf::linear", "aten::addmm"):
            parts[PROJECTION if shape[-1:] == [depth] else LINEAR] += event.cpu_time_total
        elif event.key == "aten::copy_" and len(shape) == 6:  # patches, for the projection
            parts[PROJECTION] += event.cpu_time_total
        elif event.key == "refiner_hf::embed_patches":
            parts[STEM] += event.cpu_time_total
    parts[STEM] -= parts[PROJECTION]  # which is one operation's
    return {part: time / total for part, time in parts.items()}


def counting_openvino(model: RefinerForImageClassification, pixels: torch.Tensor) -> openvino.InferRequest:
    """For the exported graph, as the benchmark has it but for counters, which take time of their own."""
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export_onnx(model, file)
        graph = core.read_model(str(file))
        graph.reshape(list(pixels.shape))
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": True,
        }
        request = core.compile_model(graph, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(pixels.numpy()))
    return request


def openvino_parts(request: openvino.InferRequest) -> dict[str, float]:
    """Shares of the time."""
    parts = dict.fromkeys((LINEAR, PROJECTION, STEM), 0.0)
    total = 0.0
    for _ in range(REPETITIONS):
        request.infer()
        convolutions = iter((STEM, STEM, STEM, PROJECTION))  # the first ones; others are the refinement's
        for node in request.get_profiling_info():
            time = node.real_time.total_seconds()
            total += time
            part = LINEAR if node.node_type == "FullyConnected" else None
            if node.node_type == "Convolution":
                part = next(convolutions, None)
            if part is not None:
                parts[part] += time
    return {part: time / total for part, time in parts.items()}


def table_of_products(model: RefinerForImageClassification, images: int, rounds: int) -> str:
    projection = model.base_model.embeddings.patch_embeddings.projection
    tokens = model.base_model.embeddings.position_embeddings.shape[1]
    layers = [each.weight for each in model.base_model.modules() if isinstance(each, nn.Linear)]
    shapes = sorted({tuple(weight.shape) for weight in layers}) + [tuple(projection.weight.flatten(1).shape)]
    rows = []
    for outputs, inputs in shapes:
        count = tokens - model.config.num_prefix_tokens if inputs == shapes[-1][1] else tokens
        steps = dict(product_steps(images * count, inputs, outputs))
        times = time_in_turns({name: lambda step=step: step for name, step in steps.items()}, 4 * rounds, "cpu")
        flops = 2 * images * count * inputs * outputs
        rates = (f"{flops / median(times[name]['seconds']) / 1e9:.1f}" for name in steps)
        rows.append([f"({images * count}, {inputs}) x ({inputs}, {outputs})", *rates])
    return markdown_table(["product", "torch's", "oneDNN's", "oneDNN's, weight in its order", "prepacked"], rows)


def product_steps(rows: int, inputs: int, outputs: int) -> Iterator[tuple[str, Callable[[], object]]]:
    hidden, bias = torch.randn(rows, inputs), torch.randn(outputs)
    weights = torch.randn(max(2, CACHE // (4 * inputs * outputs)), outputs, inputs).unbind()
    ordered = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
    kept = prepack(weights)
    product = torch.ops.mkldnn._linear_pointwise
    for name, turns, multiply in (
        ("torch", cycle(weights), lambda weight: nn.functional.linear(hidden, weight, bias)),
        ("oneDNN", cycle(weights), lambda weight: product(hidden, weight, bias, "none", [], "")),
        ("ordered", cycle(ordered), lambda weight: product(hidden, weight, bias, "none", [], "")),
        (
            "prepacked",
            cycle(kept),
            lambda each: prepacked_linear(hidden, each.weight, prepacked(each.weight), bias, False),
        ),
    ):
        yield name, lambda turns=turns, multiply=multiply: multiply(next(turns))


if __name__ == "__main__":
    main()
