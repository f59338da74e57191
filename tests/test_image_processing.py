import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from refiner_hf import RefinerImageProcessor, RefinerImageProcessorPil


BACKENDS = [RefinerImageProcessor, RefinerImageProcessorPil]
CASES = [
    (picture, size, crop_pct)
    for picture in ("tall", "wide")
    for size, crop_pct in ((224, 0.9), (224, 1.0), (224, 1.13), (384, 1.0), (448, 1.13))
]


def square(size):
    return {"height": size, "width": size}


def levels(processor, image):
    """Prepared pixels as 8-bit levels, (3, height, width)."""
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    return (pixels * 127.5 + 127.5).round()


@pytest.mark.parametrize("picture, size, crop_pct", CASES)
class TestGoldenPixels:
    def prepared(self, golden, backend, picture, size, crop_pct):
        golden = golden("eval_preprocessing")
        image = Image.fromarray(golden[f"image_uint8.{picture}"].numpy())
        pixels = backend(size=square(size), crop_pct=crop_pct)(image, return_tensors="pt").pixel_values[0]
        expected = golden[f"pixels_uint8.{picture}.size{size}.crop{crop_pct}"]
        return pixels, (expected.float() / 255 - 0.5) / 0.5

    def test_pil_is_exact(self, golden, picture, size, crop_pct):
        pixels, expected = self.prepared(golden, RefinerImageProcessorPil, picture, size, crop_pct)
        assert (pixels - expected).abs().max() < 1e-6

    def test_torchvision_is_within_rounding(self, golden, picture, size, crop_pct):
        pixels, expected = self.prepared(golden, RefinerImageProcessor, picture, size, crop_pct)
        difference = (pixels - expected).abs() * 127.5
        assert difference.max() <= 2.01 and difference.mean() < 0.005


@pytest.mark.parametrize("backend", BACKENDS)
class TestImagesOfEveryKind:
    def gradient(self, channels=3):
        ramp = np.linspace(0, 255, 40 * 30 * channels).reshape(40, 30, channels).astype(np.uint8)
        return ramp if channels > 1 else ramp[..., 0]

    def test_grey(self, backend):
        grey = self.gradient(1)
        result = levels(backend(size=square(16)), Image.fromarray(grey))
        assert result.shape == (3, 16, 16) and torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])
        assert torch.equal(result, levels(backend(size=square(16)), grey))

    def test_transparency_is_dropped(self, backend):
        rgb = self.gradient()
        rgba = np.concatenate([rgb, np.full((40, 30, 1), 7, np.uint8)], axis=-1)
        expected = levels(backend(size=square(16)), Image.fromarray(rgb))
        assert torch.equal(levels(backend(size=square(16)), Image.fromarray(rgba)), expected)
        assert torch.equal(levels(backend(size=square(16)), rgba), expected)

    @pytest.mark.filterwarnings("error:Palette images with Transparency")
    def test_palette(self, backend):
        image = Image.fromarray(self.gradient()).quantize(16)
        expected = levels(backend(size=square(16)), image.convert("RGB"))
        assert torch.equal(levels(backend(size=square(16)), image), expected)
        image.info["transparency"] = b"\x00\x80"
        assert torch.equal(levels(backend(size=square(16)), image), expected)

    def test_two_levels(self, backend):
        image = Image.fromarray(self.gradient(1)).convert("1")
        assert set(levels(backend(size=square(40), crop_pct=1.0, do_resize=False), image).unique().tolist()) <= {
            0,
            255,
        }

    def test_16_bit_keeps_its_contrast(self, backend, tmp_path):
        grey = self.gradient(1)
        deep = grey.astype(np.uint16) * 257
        Image.fromarray(deep).save(tmp_path / "deep.png")
        expected = levels(backend(size=square(16)), Image.fromarray(grey))
        for image in (Image.open(tmp_path / "deep.png"), str(tmp_path / "deep.png"), deep):
            assert torch.equal(levels(backend(size=square(16)), image), expected)
        steps = np.array([0, 256, 257, 65534, 65535], np.uint16).repeat(4).reshape(4, 5)
        found = levels(backend(size=square(4), do_resize=False, do_center_crop=False), steps)
        assert found.unique().tolist() == [0, 1, 254, 255]

    def test_floating_point_mode_is_refused(self, backend):
        with pytest.raises(ValueError, match="mode F"):
            backend()(Image.fromarray(np.zeros((8, 8), np.float32)))

    def test_cmyk_jpeg(self, backend, tmp_path):
        Image.fromarray(self.gradient()).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
        expected = levels(backend(size=square(16)), Image.open(tmp_path / "print.jpg").convert("RGB"))
        assert torch.equal(levels(backend(size=square(16)), str(tmp_path / "print.jpg")), expected)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 500)])
    def test_tiny_and_thin(self, backend, shape):
        image = Image.fromarray(np.full((*shape, 3), 100, np.uint8))
        result = levels(backend(size=square(16)), image)
        assert result.shape == (3, 16, 16) and (result == 100).all()

    def test_non_square(self, backend):
        processor = backend(size={"height": 16, "width": 32}, crop_pct=0.8)
        for shape in ((100, 50), (50, 100), (37, 41)):
            result = levels(processor, Image.fromarray(np.full((*shape, 3), 200, np.uint8)))
            assert result.shape == (3, 16, 32) and (result == 200).all()

    def test_black_borders_above_one(self, backend):
        result = levels(backend(size=square(20), crop_pct=2.0), Image.fromarray(np.full((40, 40, 3), 200, np.uint8)))
        assert (result[:, 5:15, 5:15] == 200).all() and result.sum() == 200 * 300

    def test_truncated_file_is_named(self, backend, tmp_path):
        Image.fromarray(self.gradient()).resize((300, 300)).save(tmp_path / "half.jpg")
        data = (tmp_path / "half.jpg").read_bytes()
        (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
        for image in (str(tmp_path / "half.jpg"), Image.open(tmp_path / "half.jpg")):
            with pytest.raises(ValueError, match="half.jpg"):
                backend()(image)

    def test_file_that_is_no_image_is_named(self, backend, tmp_path):
        (tmp_path / "notes.png").write_text("not an image")
        with pytest.raises(ValueError, match="notes.png"):
            backend()(str(tmp_path / "notes.png"))

    @pytest.mark.parametrize("name", ["nope.png", "folder.d"])
    def test_path_without_a_file_is_named(self, backend, tmp_path, name):
        (tmp_path / "folder.d").mkdir()
        with pytest.raises(ValueError, match=name):
            backend()(str(tmp_path / name))

    def test_paths_are_turned_upright(self, backend, tmp_path):
        image = Image.fromarray(self.gradient())
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.png", exif=exif)
        expected = levels(backend(size=square(16)), image.transpose(Image.Transpose.ROTATE_270))
        assert torch.equal(levels(backend(size=square(16)), str(tmp_path / "turned.png")), expected)

    def test_list_equals_one_by_one(self, backend):
        images = [Image.fromarray(np.roll(self.gradient(), i, axis=0)) for i in range(3)]
        images.append(images[0].resize((70, 20)))
        processor = backend(size=square(16))
        together = processor(images, return_tensors="pt").pixel_values
        for image, pixels in zip(images, together):
            assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], pixels)

    @pytest.mark.parametrize("settings", [dict(size={"shortest_edge": 16}), dict(crop_pct=0.0), dict(crop_pct=-1.0)])
    def test_settings_that_make_no_sense(self, backend, settings):
        with pytest.raises(ValueError, match="size must have|crop_pct must be"):
            backend(**settings)(Image.fromarray(self.gradient()))


def test_defaults():
    processor = RefinerImageProcessor()
    assert processor.crop_pct == 0.9 and dict(processor.size) == {"height": 224, "width": 224}


def test_options_for_one_call():
    image = Image.fromarray(np.arange(30 * 30 * 3, dtype=np.uint8).reshape(30, 30, 3))
    default = RefinerImageProcessor(size=square(16))
    other = RefinerImageProcessor(size=square(24), crop_pct=1.0)
    assert torch.equal(
        default(image, size=square(24), crop_pct=1.0, return_tensors="pt").pixel_values,
        other(image, return_tensors="pt").pixel_values,
    )


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_round_trip_through_auto_class(tmp_path, backend, tiny_config):
    saved = RefinerImageProcessor(size=square(48), crop_pct=1.13)
    saved.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is {"torchvision": RefinerImageProcessor, "pil": RefinerImageProcessorPil}[backend]
    assert loaded.crop_pct == 1.13 and dict(loaded.size) == square(48)


def test_from_memory_too():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(buffer, "JPEG")
    half = Image.open(io.BytesIO(buffer.getvalue()[:700]))
    with pytest.raises(ValueError, match="can't be read"):
        RefinerImageProcessor()(half)


@pytest.mark.parametrize("kind", [RefinerImageProcessor, RefinerImageProcessorPil])
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (3, 40_001), (30_000, 2)])
def test_long_and_thin_images(kind, shape):
    """
    Resized as a whole one of 1 x 60,000 pixels would take 9 GB. What the crop shows is the same as of an image that
    was cut around its middle before.
    """
    pixels = np.zeros((*shape, 3), np.uint8)
    middle = shape[0] // 2, shape[1] // 2
    pixels[max(0, middle[0] - 60) : middle[0] + 60, max(0, middle[1] - 60) : middle[1] + 60] = np.random.default_rng(
        0
    ).integers(0, 256, pixels[max(0, middle[0] - 60) : middle[0] + 60, max(0, middle[1] - 60) : middle[1] + 60].shape)
    processor = kind(size={"height": 224, "width": 224}, crop_pct=0.9)
    made = np.asarray(processor(Image.fromarray(pixels), return_tensors="pt").pixel_values)
    assert made.shape == (1, 3, 224, 224)
    long = 0 if shape[0] > shape[1] else 1
    kept = 80 + (shape[long] - 80) % 2
    start = (shape[long] - kept) // 2
    cut = pixels[start : start + kept] if long == 0 else pixels[:, start : start + kept]
    expected = np.asarray(processor(Image.fromarray(cut), return_tensors="pt").pixel_values)
    np.testing.assert_allclose(made, expected, atol=0.02)
