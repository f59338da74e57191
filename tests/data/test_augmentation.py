"""What becomes of a training image, and what of it is seen."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from refiner_hf.data import images
from refiner_hf.data.arguments import AugmentationArguments
from refiner_hf.data.augmentation import Augment, NormalizeViews
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


def photo(width, height):
    """Colours that change everywhere, both slowly and from pixel to pixel."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(40, 216, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse) + rng.integers(-40, 40, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def seen_in(view):
    """(left, top, right, bottom) of what a view of a ramp shows, in shares, at the middles of the outermost pixels."""
    shares = view.levels / 255
    return shares[:, 0, 0].mean(), shares[0, :, 1].mean(), shares[:, -1, 0].mean(), shares[-1, :, 1].mean()


class TestRotation:
    def views(self, processor, image, count=20, **fields):
        augment = Augment(processor, AugmentationArguments(crop_min_scale=1.0, horizontal_flip=False, **fields))
        for seed in range(count):
            with random_numbers_of(seed):
                yield augment(EncodedImage(encoded(image))).levels / 255

    def angles(self, processor, degrees):
        """Of a ramp from left to right: the direction in which it grows."""
        for view in self.views(processor, ramp(64, 64), rotation=degrees):
            middle = view[4:-4, 4:-4, 0]
            across, down = (middle[:, 1:] - middle[:, :-1]).mean(), (middle[1:] - middle[:-1]).mean()
            yield torch.rad2deg(torch.atan2(down, across)).item()

    def test_turns_to_both_sides_by_so_much_at_most(self, processor):
        found = list(self.angles(processor, 20))
        assert -21 < min(found) < -8 and 8 < max(found) < 21
        assert max(map(abs, self.angles(processor, 0))) < 1

    def test_no_corner_is_black(self, processor):
        white = Image.new("RGB", (40, 30), "white")
        assert all(view.min() > 0.98 for view in self.views(processor, white, rotation=45))

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
        assert view.levels.shape == (16, 16, 3) and view.levels.dtype == torch.uint8
        left, top, right, bottom = view.box
        flips.add(view.flipped), boxes.add(view.box)
        if view.flipped:
            left, right = right, left
        half_across, half_down = (right - left) / 32, (bottom - top) / 32  # of one pixel of the view
        expected = (left + half_across, top + half_down, right - half_across, bottom - half_down)
        assert torch.tensor(seen_in(view)) == pytest.approx(torch.tensor(expected), abs=0.02)
    assert flips == {True, False} and len(boxes) > 10


def test_the_same_random_numbers_give_the_same_view(processor):
    policy = AugmentationArguments(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.1)
    augment, views = Augment(processor, policy), []
    for seed in (1, 1, 2):
        with random_numbers_of(seed):
            views.append(augment(EncodedImage(encoded(ramp()))).levels)
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


class TestCrops:
    """What is decoded and resized, against Pillow's crop of the whole decoded image."""

    def views(self, processor, image, count=24, **fields):
        augment = Augment(processor, AugmentationArguments(horizontal_flip=False, **fields))
        for seed in range(count):
            with random_numbers_of(seed):
                yield augment(EncodedImage(image))

    def by_pillow(self, whole, view, shift=0.0):
        """Both ways to resize that there are, of the view's box or of one that lies aside; box in whole pixels."""
        box = [at * side for at, side in zip(view.box, whole.size * 2)]
        if shift:
            aside = shift * (box[2] - box[0])
            box[0], box[2] = box[0] + aside, box[2] + aside
        height, width = view.levels.shape[:2]
        for way in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            cropped = whole.crop([round(at) for at in box]).resize((width, height), way)
            yield np.asarray(cropped, dtype=np.int16)

    def differences(self, whole, view, shift=0.0):
        return [np.abs(view.levels.numpy() - other) for other in self.by_pillow(whole, view, shift)]

    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    @pytest.mark.parametrize("size", [(60, 45), (40, 31), (20, 300), (12, 9), (3, 2), (1, 1), (1, 50)])
    def test_to_one_level(self, processor, kind, size):
        """Larger than the view, smaller, and tiny; nothing is decoded smaller."""
        image, used = encoded(photo(*size), kind), set()
        whole = EncodedImage(image).decode()
        for view in self.views(processor, image, crop_min_scale=0.3):
            bilinear, bicubic = self.differences(whole, view)
            assert min(bilinear.max(), bicubic.max()) <= 1
            if bilinear.max() > 1:
                used.add("bicubic")
            if bicubic.max() > 1:
                used.add("bilinear")
        assert used == {"bilinear", "bicubic"} or min(size) < 16, "drawn for each view"

    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    def test_exactly_where_nothing_is_resized(self, processor, kind):
        image = encoded(photo(16, 16), kind)
        for view in self.views(processor, image, 4, crop_min_scale=1.0):
            assert view.box == (0, 0, 1, 1) and not view.flipped
            assert (view.levels.numpy() == np.asarray(EncodedImage(image).decode())).all()

    @pytest.mark.parametrize("orientation", [1, 6])
    def test_of_a_large_jpeg(self, orientation):
        """Decoded at a half or a quarter: a few levels beside it, far less than a box one pixel of the view aside."""
        processor = RefinerImageProcessor(size={"height": 48, "width": 48})
        exif = Image.Exif()
        exif[0x0112] = orientation
        coarse = photo(200, 150).resize((800, 600), Image.Resampling.BICUBIC)
        image = encoded(coarse, "jpeg", quality=95, exif=exif)
        whole, errors, aside = EncodedImage(image).decode(), [], []
        for view in self.views(processor, image, crop_min_scale=0.3):
            errors.append(min(each.mean() for each in self.differences(whole, view)))
            aside.append(min(each.mean() for each in self.differences(whole, view, shift=1 / 48)))
        assert max(errors) < 3 and all(far > 3 * near for near, far in zip(errors, aside))


class TestNormalizeViews:
    def levels(self, count=3):
        return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def test_as_the_processor_does(self, processor):
        processor.image_mean, processor.image_std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
        levels = self.levels()
        expected = processor(
            list(levels.permute(0, 3, 1, 2)), return_tensors="pt", do_resize=False, do_center_crop=False
        )["pixel_values"]
        pixels = NormalizeViews(processor)(levels)
        assert pixels.is_contiguous() and torch.allclose(pixels, expected, atol=1e-6)

    def test_erases_a_box_of_some(self, processor):
        levels = self.levels(200)
        with random_numbers_of(0):
            pixels = NormalizeViews(processor, 0.25)(levels)
        changed = (pixels != NormalizeViews(processor)(levels)).any(1)
        erased = changed.flatten(1).any(1)
        assert 0.15 < erased.float().mean() < 0.35
        for each in changed[erased]:
            rows, columns = each.any(1), each.any(0)
            assert each.sum() == rows.sum() * columns.sum() < 16 * 16
        noise = pixels.permute(0, 2, 3, 1)[changed]
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        with random_numbers_of(0):
            assert (NormalizeViews(processor, 0.25)(levels) == pixels).all()


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

    @pytest.mark.parametrize("by_simplejpeg", [True, False])
    @pytest.mark.parametrize("at_least", [None, (200, 100), (140, 90), (70, 50), (30, 20)])
    def test_levels_are_those_of_the_decoded_image(self, at_least, by_simplejpeg, monkeypatch):
        """Whoever decodes them, and to the last level."""
        if by_simplejpeg:
            pytest.importorskip("simplejpeg")
        else:
            monkeypatch.setattr(images, "simplejpeg", None)
        colours = photo(301, 203)
        kinds = {
            "photo": encoded(colours, "jpeg"),
            "all colours": encoded(colours, "jpeg", quality=95, subsampling=0),
            "progressive": encoded(colours, "jpeg", progressive=True),
            "grey": encoded(colours.convert("L"), "jpeg"),
            "print": encoded(colours.convert("CMYK"), "jpeg"),
            "camera": encoded(colours, "mpo", save_all=True, append_images=[colours.rotate(180)]),
            "png": encoded(colours),
            "palette": encoded(colours.convert("P")),
            "16 bit": encoded(Image.fromarray(np.arange(301 * 203, dtype=np.uint16).reshape(203, 301))),
            "transparent": encoded(colours.convert("RGBA")),
        }
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            kinds[f"orientation {orientation}"] = encoded(colours, "jpeg", exif=exif)
        for kind, image in kinds.items():
            expected = np.asarray(EncodedImage(image).decode(at_least))
            levels = EncodedImage(image).levels(at_least)
            assert levels.shape == expected.shape and (levels == expected).all(), kind

    @pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
    def test_a_cut_off_jpeg(self, kept):
        whole = encoded(photo(300, 200), "jpeg")["bytes"]
        for method in (EncodedImage.levels, EncodedImage.decode):
            with pytest.raises(UnreadableImageError, match="The image x.jpg can't be read .*truncated"):
                method(EncodedImage({"bytes": whole[: int(kept * len(whole))], "path": "x.jpg"}))

    def test_damaged_jpegs_are_what_pillow_makes_of_them(self):
        """One wrong byte: whether it can still be read, and what it shows then."""
        simplejpeg = pytest.importorskip("simplejpeg")
        whole, rng, refused = encoded(photo(300, 200), "jpeg")["bytes"], np.random.default_rng(0), 0
        for at, byte in zip(rng.integers(700, len(whole), 60), rng.integers(0, 256, 60)):
            content = whole[:at] + bytes([byte]) + whole[at + 1 :]
            image = {"bytes": content, "path": "x.jpg"}
            try:
                expected = np.asarray(EncodedImage(image).decode())
            except UnreadableImageError:
                with pytest.raises(UnreadableImageError, match="The image x.jpg"):
                    EncodedImage(image).levels()
                continue
            assert (EncodedImage(image).levels() == expected).all()
            try:
                simplejpeg.decode_jpeg(content)
            except ValueError:
                refused += 1
        assert refused, "or this tests nothing"

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
        return {type(each).__name__: each for each in augment.augment.transforms}

    assert not {"RandAugment", "ColorJitter"} & transforms().keys()
    policy = transforms(auto_augment="rand-m9-mstd0.5-inc1")["RandAugment"]
    assert {operation.magnitude for operation in policy.ops} == {9}
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
