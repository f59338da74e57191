"""
How many training images a second one core prepares: what the input pipeline of the ImageNet recipe can feed a GPU.

Beside it what could be used in its place, and timm's own loader with the same recipe. On synthetic photos (noise over
gradients, JPEG of quality 90), since a machine has no others that everybody has. Times take turns, each round with
random numbers of its own, so that ratios hold although a machine is noisy. Writes a Markdown table.

    python scripts/benchmark_input.py                                # into docs/benchmarks/input.md, some minutes
    python scripts/benchmark_input.py --rounds 2 --output trial.md
"""

import argparse
import platform
import random
import time
import warnings
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from timm.data import create_loader, create_transform
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from transformers import default_data_collator

from refiner_hf.data.arguments import AugmentationArguments
from refiner_hf.data.augmentation import Augment, NormalizeViews
from refiner_hf.data.images import EncodedImage, decode_image
from refiner_hf.data.seeded_sampling import SeededImages, SeededSampler
from refiner_hf.data.transforms import PrepareTraining
from refiner_hf.image_processing_refiner import RefinerImageProcessor
from refiner_hf.utils.machine import describe_machine
from refiner_hf.utils.markdown import markdown_table


# width, height, photos, how often each comes in an epoch of a loader
SIZES = {"500 x 375 (as in ImageNet)": (500, 375, 64, 8), "4000 x 3000 (a camera's)": (4000, 3000, 8, 4)}
POLICY, ERASING, BATCH = "rand-m9-mstd0.5-inc1", 0.25, 32
TIMM = dict(
    is_training=True, scale=(0.08, 1.0), color_jitter=None, auto_augment=POLICY, interpolation="random",
    re_prob=ERASING, re_mode="pixel", mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip


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


class Photos(torch.utils.data.Dataset):
    """For timm's loader, which sets `transform`."""

    transform = None

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.transform(by_pillow(self.rows[i])), 0


def by_pillow(row):
    return PILImage.open(BytesIO(row["image"]["bytes"])).convert("RGB")


def by_torchvision(row):
    return decode_jpeg(torch.frombuffer(bytearray(row["image"]["bytes"]), dtype=torch.uint8), ImageReadMode.RGB)


class OurLoader:
    """Epochs of the recipe's loader, with one worker; what is left is done by this process, as it comes."""

    def __init__(self, rows, processor, augment):
        features = Features({"image": Image(decode=False), "labels": Value("int64")})
        self.data = SeededImages(Dataset.from_list(rows, features=features), PrepareTraining(augment))
        self.normalize = NormalizeViews(processor, ERASING)
        self.loader = DataLoader(
            self.data, BATCH, sampler=SeededSampler(self.data, 0), collate_fn=default_data_collator, num_workers=1,
            persistent_workers=True,
        )  # fmt: skip

    def __call__(self):
        self.data.set_epoch(self.data.epoch + 1)
        for batch in self.loader:
            self.normalize(batch["pixel_values"])


def timm_loader(rows, prefetcher):
    loader = create_loader(
        Photos(rows),
        (3, 224, 224),
        BATCH,
        num_workers=1,
        use_prefetcher=prefetcher,
        device=torch.device("cpu"),
        **TIMM,
    )
    return lambda: all(True for _ in loader)


def contenders(rows, repeats):
    """By name, what prepares all photos, and how many it prepares each time."""
    processor = RefinerImageProcessor(size={"height": 224, "width": 224})
    crop = Augment(processor, AugmentationArguments(crop_min_scale=0.08))
    recipe = Augment(processor, AugmentationArguments(crop_min_scale=0.08, auto_augment=POLICY))
    timm_crop, timm_policy, _ = create_transform((3, 224, 224), separate=True, **TIMM)
    tensors = v2.Compose([v2.RandomResizedCrop(224, (0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    tensor_policy = v2.Compose([tensors, v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR)])

    def each(prepare):
        return lambda: [prepare(row) for row in rows], len(rows)

    many = rows * repeats
    return {
        "decode whole: Pillow": each(lambda row: decode_image(row["image"])),
        "decode whole: torchvision": each(by_torchvision),
        "decode whole: simplejpeg": each(lambda row: simplejpeg.decode_jpeg(row["image"]["bytes"])),
        "crop, resize, flip: timm, on Pillow": each(lambda row: timm_crop(by_pillow(row))),
        "crop, resize, flip: torchvision, on tensors": each(lambda row: tensors(by_torchvision(row))),
        "**crop, resize, flip: ours**": each(lambda row: crop(EncodedImage(row["image"]))),
        "and RandAugment: timm, on Pillow": each(lambda row: timm_policy(timm_crop(by_pillow(row)))),
        "and RandAugment: torchvision, on tensors": each(lambda row: tensor_policy(by_torchvision(row))),
        "**and RandAugment: ours** (timm's)": each(lambda row: recipe(EncodedImage(row["image"]))),
        "loader, one worker: timm, no prefetcher": (timm_loader(many, prefetcher=False), len(many)),
        "loader, one worker: timm": (timm_loader(many, prefetcher=True), len(many)),
        "**loader, one worker: ours**": (OurLoader(many, processor, recipe), len(many)),
    }


def rates_of(makers, rounds):
    """Images per second by name, one for each round."""
    rates = {name: [] for name in makers}
    for number in range(rounds + 1):
        for name, (prepare, images) in makers.items():
            random.seed(number), np.random.seed(number), torch.manual_seed(number)
            begun = time.perf_counter()
            prepare()
            rates[name].append(images / (time.perf_counter() - begun))
    return {name: all_rounds[1:] for name, all_rounds in rates.items()}  # the first one starts workers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/input.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
    by_size = {}
    for size, (width, height, count, repeats) in SIZES.items():
        by_size[size] = rates_of(contenders(photos(width, height, count), repeats), args.rounds)
    cells = []
    for name in next(iter(by_size.values())):
        cells.append([name])
        for rates in by_size.values():
            low, middle, high = np.percentile(rates[name], (25, 50, 75))
            cells[-1].append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
    facts = describe_machine("cpu")
    packages = ("torchvision", "timm", "pillow", "simplejpeg")
    facts["versions"] += "".join(f", {name} {version(name)}" for name in packages)
    facts |= {"platform": platform.machine(), "rounds": args.rounds}
    text = (
        "# Images per second that one core prepares for training at 224 pixels\n\n"
        f"Made by `python scripts/benchmark_input.py --rounds {args.rounds}`; median (quartiles).\n\n"
        + markdown_table(["", *SIZES], cells)
        + "\n\n"
        "Each loader has one worker process. Ours, and timm's with its prefetcher, leave normalising and erasing to\n"
        "the process that trains, here on another core; timm's without it does them in the worker.\n\n"
        + markdown_table(["", ""], [(name, fact) for name, fact in facts.items() if fact is not None])
        + "\n"
    )
    args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
