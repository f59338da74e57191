"""What becomes of a training image, and what of it is seen."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from refiner_hf.data.arguments import AugmentationArguments
from refiner_hf.data.augmentation import Augment
from refiner_hf.data.images import EncodedImage, UnreadableImageError
from refiner_hf.data.seeded_sampling import random_numbers_of
from refiner_hf.image_processing_refiner import RefinerImageProcessor


@pytest.fixture
def processor():
    return RefinerImageProcessor(size={"height": 16, "width": 16})


def encoded(image, kind="png", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": f"a.{kind}"}


def ramp(width=200, height=100):
    """Red grows from left to right, green from top to bottom."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack((across, down, 0 * across), 2).round().astype(np.uint8))


def seen_in(pixels):
    """(left, top, right, bottom) of what pixels of a ramp show, in shares, at the middles of the outermost pixels."""
    levels = (pixels * 0.5 + 0.5).clamp(0, 1)
    return levels[0, :, 0].mean(), levels[1, 0].mean(), levels[0, :, -1].mean(), levels[1, -1].mean()


class TestRotation:
    def views(self, processor, image, count=20, **fields):
        augment = Augment(processor, AugmentationArguments(crop_min_scale=1.0, horizontal_flip=False, **fields))
        for seed in range(count):
            with random_numbers_of(seed):
                yield augment(EncodedImage(encoded(image))).pixels * 0.5 + 0.5

    def angles(self, processor, degrees):
        """Of a ramp from left to right: the direction in which it grows."""
        for pixels in self.views(processor, ramp(64, 64), rotation=degrees):
            middle = pixels[0, 4:-4, 4:-4]
            across, down = (middle[:, 1:] - middle[:, :-1]).mean(), (middle[1:] - middle[:-1]).mean()
            yield torch.rad2deg(torch.atan2(down, across)).item()

    def test_turns_to_both_sides_by_so_much_at_most(self, processor):
        found = list(self.angles(processor, 20))
        assert -21 < min(found) < -8 and 8 < max(found) < 21
        assert max(map(abs, self.angles(processor, 0))) < 1

    def test_no_corner_is_black(self, processor):
        white = Image.new("RGB", (40, 30), "white")
        assert all(pixels.min() > 0.98 for pixels in self.views(processor, white, rotation=45))

    @pytest.mark.parametrize("degrees", [-1, 181])
    def test_refused(self, degrees):
        with pytest.raises(ValueError, match="--rotation must be in"):
            AugmentationArguments(rotation=degrees)


@pytest.mark.parametrize("kind, options", [("png", {}), ("jpeg", {"quality": 95})])
@pytest.mark.parametrize("size", [(200, 100), (1600, 1200)])
def test_a_view_says_what_it_shows(processor, kind, options, size):
    """The box and the flip, against what the pixels show; large JPEGs are decoded smaller on the way."""
    image = encoded(ramp(*size), kind, **options)
    augment = Augment(processor, AugmentationArguments(crop_min_scale=0.2))
    flips, boxes = set(), set()
    for seed in range(12):
        with random_numbers_of(seed):
            view = augment(EncodedImage(image))
        assert view.pixels.shape == (3, 16, 16)
        left, top, right, bottom = view.box
        flips.add(view.flipped), boxes.add(view.box)
        if view.flipped:
            left, right = right, left
        half_across, half_down = (right - left) / 32, (bottom - top) / 32  # of one pixel of the view
        expected = (left + half_across, top + half_down, right - half_across, bottom - half_down)
        assert torch.tensor(seen_in(view.pixels)) == pytest.approx(torch.tensor(expected), abs=0.02)
    assert flips == {True, False} and len(boxes) > 10


def test_the_same_random_numbers_give_the_same_view(processor):
    policy = AugmentationArguments(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, color_jitter=0.1)
    augment, views = Augment(processor, policy), []
    for seed in (1, 1, 2):
        with random_numbers_of(seed):
            views.append(augment(EncodedImage(encoded(ramp()))).pixels)
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


def test_without_augmentation_the_image_is_resized(processor):
    augment = Augment(processor, AugmentationArguments(crop_min_scale=1.0, horizontal_flip=False))
    view = augment(EncodedImage(encoded(ramp(40, 40))))
    expected = np.asarray(ramp(40, 40).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    assert np.allclose(view.pixels.numpy().transpose(1, 2, 0) * 0.5 + 0.5, expected, atol=1e-5)
    assert view.box == (0, 0, 1, 1) and not view.flipped


class TestEncodedImages:
    def test_large_jpegs_are_decoded_smaller_but_large_enough(self):
        image = encoded(ramp(1600, 1200), "jpeg")
        assert EncodedImage(image).decode().size == (1600, 1200)
        assert EncodedImage(image).decode((390, 290)).size == (400, 300)
        assert EncodedImage(image).decode((410, 10)).size == (800, 600)
        assert EncodedImage(image).decode((9999, 9999)).size == (1600, 1200)
        assert EncodedImage(encoded(ramp(1600, 1200))).decode((390, 290)).size == (1600, 1200), "a PNG can't be"

    @pytest.mark.parametrize("at_least", [None, (290, 390)])
    def test_upright(self, at_least):
        exif = Image.Exif()
        exif[0x0112] = 6
        image = EncodedImage(encoded(ramp(1600, 1200), "jpeg", exif=exif))
        assert image.size == (1200, 1600)
        decoded = image.decode(at_least)
        assert decoded.size == ((300, 400) if at_least else (1200, 1600))
        corner = decoded.getpixel((decoded.size[0] - 3, 3))  # was the upper left one
        assert max(corner[:2]) < 20

    @pytest.mark.parametrize("content", [b"", b"no picture", None])
    def test_what_is_none(self, content):
        whole = encoded(ramp())["bytes"]
        with pytest.raises(UnreadableImageError, match="The image x.png can't be read"):
            EncodedImage({"bytes": whole[:300] if content is None else content, "path": "x.png"}).decode()

    def test_a_file(self, tmp_path):
        ramp().save(tmp_path / "a.png")
        assert EncodedImage({"bytes": None, "path": str(tmp_path / "a.png")}).decode().size == (200, 100)
        with pytest.raises(UnreadableImageError, match="b.png"):
            EncodedImage({"bytes": None, "path": str(tmp_path / "b.png")})


def test_options_reach_timm(processor):
    def transforms(**fields):
        augment = Augment(processor, AugmentationArguments(**fields))
        return {type(each).__name__: each for each in (*augment.augment.transforms, *augment.normalize.transforms)}

    assert not {"RandAugment", "RandomErasing", "ColorJitter"} & transforms().keys()
    policy = transforms(auto_augment="rand-m9-mstd0.5-inc1")["RandAugment"]
    assert {operation.magnitude for operation in policy.ops} == {9}
    assert transforms(random_erasing=0.25)["RandomErasing"].probability == 0.25
    assert transforms(color_jitter=0.2)["ColorJitter"].brightness == pytest.approx((0.8, 1.2))


@pytest.mark.parametrize("policy", ["rand-m10-n15", "rand-m10-mstd0.5-inc1-n15", "original-mstd5", "v0", "augmix-m10"])
def test_no_policy_keeps_nothing_of_an_image(processor, policy):
    """At their highest levels, for long enough that each operation comes: Pillow refuses to keep 0 bits."""
    augment = Augment(processor, AugmentationArguments(auto_augment=policy))
    for seed in range(60):
        with random_numbers_of(seed):
            augment(EncodedImage(encoded(ramp(40, 40))))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixup": -1}, "--mixup must not be negative"),
        ({"cutmix": -0.1}, "--cutmix must not be negative"),
        ({"repeated_augmentation": 0}, "--repeated_augmentation must be at least 1"),
        ({"crop_min_scale": 0}, "--crop_min_scale must be in"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentationArguments(**fields)
