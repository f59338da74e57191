"""scikit-learn's digits: 1,797 real scans of 8 x 8 pixels that come with the package, for runs without any set-up."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


NAME = "scikit-learn digits"
TEST_SHARE = 0.2
SEEN = (0.9889, 0.9917)  # lowest and highest test accuracy of whole runs of the recipe, on machines of one kind


def digits_splits() -> tuple[Dataset, Dataset]:
    """
    Training (1,437) and test (360) images as `datasets` make them of a folder: columns `image` and `label`. The split
    is fixed and has each digit in equal shares.
    """
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    splits = []
    for pixels, labels in _split():
        levels = np.round(pixels * (255 / 16)).astype(np.uint8)
        images = [PILImage.fromarray(level) for level in levels]
        splits.append(Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features))
    return tuple(splits)


def accuracy_seen() -> str:
    """What to hold the demo's accuracy against: rounding differs from machine to machine, and an image is 0.28 %."""
    return f"Whole runs of the recipe digits have reached {SEEN[0]:.2%} to {SEEN[1]:.2%}, depending on the machine."


def _split() -> list[tuple[np.ndarray, np.ndarray]]:
    """[(pixels (images, 8, 8) in 0..16, labels), the same for the test]."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=TEST_SHARE, random_state=0, stratify=digits.target
    )
    return [(train_x, train_y), (test_x, test_y)]
