"""The linear model beside a network."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from refiner_hf.data.rows import StoredRows, StreamedRows
from refiner_hf.data.sources import ImageData
from refiner_hf.training import baseline
from refiner_hf.training.baseline import linear_baseline


def pictures(count: int, side: int, colours: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a stripe, across or down, on one half; (count, side, side, colours)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    pixels = random.normal(128, 40, (count, side, side, colours))
    for image, label in zip(pixels, labels):
        image[label * side // 3 : (label + 1) * side // 3] += 25
    return pixels.clip(0, 255).astype(np.uint8), labels


def rows(pixels: np.ndarray, labels: np.ndarray) -> StoredRows:
    features = Features({"image": Image(), "labels": ClassLabel(num_classes=3)})
    images = [PILImage.fromarray(image.squeeze()) for image in pixels]
    data = Dataset.from_dict({"image": images, "labels": labels.tolist()}, features=features)
    return StoredRows(data.cast_column("image", Image(decode=False)))


def data_of(train, evaluation) -> ImageData:
    return ImageData("stripes", ["a", "b", "c"], train, evaluation, "test")


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("side", [12, 16])
def test_is_that_of_the_pixels(side, colours):
    """Where nothing has to be made smaller."""
    train, test = pictures(90, side, colours, 0), pictures(60, side, colours, 1)
    found = linear_baseline(data_of(rows(*train), rows(*test)), 0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    model.fit(train[0].reshape(90, -1).astype(np.float32), train[1])
    expected = model.score(test[0].reshape(60, -1).astype(np.float32), test[1])
    assert (found.side, found.trained_on, found.measured_on) == (side, 90, 60)
    assert abs(found.value - expected) < 0.04 and found.value > 0.5
    assert str(found) == f"logistic regression on thumbnails of {side} x {side} pixels"


def test_larger_images_become_thumbnails_and_many_a_sample(monkeypatch):
    monkeypatch.setattr(baseline, "_MOST_IMAGES", 40)
    train, test = rows(*pictures(90, 64, 3, 0)), rows(*pictures(60, 64, 3, 1))
    found = linear_baseline(data_of(train, test), 0)
    assert (found.side, found.trained_on, found.measured_on) == (16, 40, 40) and found.value > 0.8
    assert linear_baseline(data_of(train, test), 0) == found


def test_where_there_is_none(monkeypatch):
    pixels, labels = pictures(30, 16, 3, 0)
    some = rows(pixels, labels)
    assert linear_baseline(data_of(some, None), 0) is None
    assert linear_baseline(data_of(StreamedRows(some.data.to_iterable_dataset()), some), 0) is None
    assert linear_baseline(data_of(rows(pixels, 0 * labels), some), 0) is None
    monkeypatch.setattr(baseline, "_MOST_LABELS", 2)
    assert linear_baseline(data_of(some, some), 0) is None
