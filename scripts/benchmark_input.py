"""
How many training images a second one core prepares: what the input pipeline of a recipe can feed a GPU.

On synthetic photos (noise over gradients, JPEG of quality 90), since a machine has no others that everybody has. Times
take turns, so that ratios hold although a machine is noisy. Writes a Markdown table.

    python scripts/benchmark_input.py                                   # into docs/benchmarks/input.md, about a minute
    python scripts/benchmark_input.py --rounds 2 --output trial.md
"""

import argparse
import platform
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import default_data_collator

from refiner_hf.data.arguments import AugmentationArguments
from refiner_hf.data.augmentation import Augment
from refiner_hf.data.images import EncodedImage, decode_image
from refiner_hf.data.seeded_sampling import SeededImages, SeededSampler
from refiner_hf.data.transforms import PrepareTraining
from refiner_hf.image_processing_refiner import RefinerImageProcessor
from refiner_hf.utils.machine import describe_machine
from refiner_hf.utils.markdown import markdown_table


SIZES = {"500 x 375 (as in ImageNet)": (500, 375, 64), "4000 x 3000 (a camera's)": (4000, 3000, 8)}
RECIPE = dict(crop_min_scale=0.08, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25)


def photos(width, height, count):
    """Encoded rows."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        coarse = PILImage.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), PILImage.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        buffer = BytesIO()
        PILImage.fromarray(noisy).save(buffer, "jpeg", quality=90)
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "labels": 0})
    return rows


def contenders(rows):
    """By name, what prepares all rows once, and in how many processes."""
    processor = RefinerImageProcessor(size={"height": 224, "width": 224})
    crop = Augment(processor, AugmentationArguments(crop_min_scale=0.08))
    recipe = Augment(processor, AugmentationArguments(**RECIPE))
    features = Features({"image": Image(decode=False), "labels": Value("int64")})
    data = SeededImages(Dataset.from_list(rows, features=features), PrepareTraining(recipe))

    def load():
        loader = DataLoader(data, 8, sampler=SeededSampler(data, 0), collate_fn=default_data_collator, num_workers=0)
        for _ in loader:
            pass

    return {
        "decode the whole image": lambda: [decode_image(row["image"]) for row in rows],
        "crop, resize, flip": lambda: [crop(EncodedImage(row["image"])) for row in rows],
        "and RandAugment, random erasing": lambda: [recipe(EncodedImage(row["image"])) for row in rows],
        "the recipe's loader, batches of 8": load,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/input.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rates = {}
    for size, (width, height, count) in SIZES.items():
        rows = photos(width, height, count)
        makers = contenders(rows)
        for _ in range(args.rounds):
            for name, prepare in makers.items():
                begun = time.perf_counter()
                prepare()
                rates.setdefault(name, {}).setdefault(size, []).append(count / (time.perf_counter() - begun))
    cells = []
    for name, by_size in rates.items():
        cells.append([name])
        for size in SIZES:
            low, middle, high = np.percentile(by_size[size], (25, 50, 75))
            cells[-1].append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
    facts = describe_machine("cpu") | {"platform": platform.machine(), "rounds": args.rounds}
    text = (
        "# Images per second that one core prepares for training at 224 pixels\n\n"
        f"Made by `python scripts/benchmark_input.py --rounds {args.rounds}`; median (quartiles).\n\n"
        + markdown_table(["", *SIZES], cells)
        + "\n\n"
        + markdown_table(["", ""], [(name, fact) for name, fact in facts.items() if fact is not None])
        + "\n"
    )
    args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
