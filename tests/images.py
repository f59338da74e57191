"""Folders of small synthetic photos whose label shows in their colour."""

from pathlib import Path

import numpy as np
from PIL import Image


COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def write_folder(folder: Path, per_label: int = 8, labels: tuple[str, ...] = tuple(COLOURS), side: int = 24) -> Path:
    """
    folder/LABEL/i.png, noisy and of one main colour each. Uncompressed, so that their files, whose content decides
    which ones are held out, are the same with each version of Pillow.
    """
    rng = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(per_label):
            noise = rng.normal(0, 25, (side, side + 6, 3))
            pixels = np.clip(np.array(COLOURS.get(label, (128, 128, 128))) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png", compress_level=0)
    return folder
