"""Pixels without PyTorch and transformers: bit for bit the image processor's, or an error in words."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, DeiTImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.commands.export import main
from refiner_hf.export import preprocess
from refiner_hf.export.pixels import copy_preprocessing
from refiner_hf.export.preprocess import Preprocess

from ..every_class import make


SIZES = ((1, 1), (3, 200), (200, 3), (53, 37), (37, 53), (64, 32), (32, 32), (33, 31))
GREY = dict(image_mean=[0.4], image_std=[0.2])


def noise(width: int, height: int, *channels: int, dtype=np.uint8) -> Image.Image:
    levels = np.random.default_rng(0).integers(
        0, np.iinfo(dtype).max, (height, width, *channels), dtype, endpoint=True
    )
    return Image.fromarray(levels)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


@pytest.fixture
def both(tmp_path):
    """A processor saved as an export does it: its PIL form, and what goes along."""

    def both(processor, num_channels: int = 3):
        processor.save_pretrained(tmp_path)
        RefinerConfig(num_channels=num_channels).save_pretrained(tmp_path)
        return AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), Preprocess(tmp_path)

    return both


def assert_same(prepare, processor, picture, given=None) -> None:
    expected = processor(picture if given is None else given, return_tensors="np").pixel_values
    pixels = prepare(picture)
    assert pixels.dtype == np.float32 and pixels.shape == expected.shape
    assert np.array_equal(pixels, expected)


def processors():
    yield from (
        pytest.param(RefinerImageProcessor(size=dict(height=32, width=wide), crop_pct=share), 3, id=f"{wide}, {share}")
        for wide in (32, 21)
        for share in (0.5, 0.875, 0.9, 1.0, 1.13, 1.5, 3.0)
    )
    yield from (
        pytest.param(ViTImageProcessor(size=dict(height=32, width=40), resample=filter), 3, id=filter.name)
        for filter in Image.Resampling
    )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    others = {
        "not resized": RefinerImageProcessor(size=square(32), do_resize=False),
        "shorter side": ViTImageProcessor(size={"shortest_edge": 35}, do_center_crop=True, crop_size=square(32)),
        "levels": ViTImageProcessor(size=square(32), image_mean=mean, image_std=std, rescale_factor=1 / 127.5),
        "0..1": ViTImageProcessor(size=square(32), do_normalize=False),
        "0..255": ViTImageProcessor(size=square(32), do_rescale=False),
        "DeiT": DeiTImageProcessor(size=square(40), crop_size=square(33)),
        "DeiT with borders": DeiTImageProcessor(size=dict(height=20, width=31), crop_size=dict(height=33, width=20)),
        "DeiT as published": DeiTImageProcessor(),
    }
    yield from (pytest.param(processor, 3, id=name) for name, processor in others.items())
    grey = {
        "grey ViT": ViTImageProcessor(size=square(32), **GREY),
        "grey DeiT": DeiTImageProcessor(size=square(36), crop_size=square(32), **GREY),
        "grey Refiner": RefinerImageProcessor(size=square(32), do_convert_rgb=False, **GREY),
    }
    yield from (pytest.param(processor, 1, id=name) for name, processor in grey.items())


@pytest.mark.parametrize("processor, num_channels", list(processors()))
def test_the_pil_forms_pixels(both, processor, num_channels):
    pil, prepare = both(processor, num_channels)
    for size in SIZES:
        assert_same(prepare, pil, noise(*size) if num_channels == 1 else noise(*size, 3))


def pictures():
    colour, grey = noise(50, 23, 3), noise(50, 23)
    see_through = noise(50, 23, 4)
    palette = colour.quantize(16)
    palette.info["transparency"] = b"\x00\x80\xff"
    deep = noise(50, 23, dtype=np.uint16)
    return {
        **{mode: colour.convert(mode) for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV")},
        **{mode: see_through.convert(mode) for mode in ("RGBA", "LA", "RGBa")},
        "palette with transparency": palette,
        "16-bit": deep,
        "I": deep.convert("I"),
        "I;16B": Image.frombytes("I;16B", deep.size, np.asarray(deep).astype(">u2").tobytes()),
        "grey": grey,
    }


@pytest.mark.parametrize("kind", pictures())
def test_every_mode(both, kind):
    pil, prepare = both(RefinerImageProcessor(size=square(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(prepare, pil, pictures()[kind])


@pytest.mark.parametrize("kind", ["P", "RGBA", "palette with transparency", "16-bit", "1", "grey"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(both, tmp_path, kind, orientation):
    file, exif = tmp_path / "picture.png", Image.Exif()
    exif[0x0112] = orientation
    pictures()[kind].save(file, exif=exif)
    pil, prepare = both(RefinerImageProcessor(size=dict(height=16, width=20)))
    assert_same(prepare, pil, str(file))
    assert_same(prepare, pil, file, given=str(file))
    with Image.open(file) as image:  # as it is
        assert_same(prepare, pil, image)
    if orientation > 1:
        assert not np.array_equal(prepare(file), prepare(Image.open(file)))


def test_a_vits_files_are_read_as_in_its_pipeline(both, tmp_path):
    pil, prepare = both(ViTImageProcessor(size=square(16)))
    for kind in ("L", "CMYK", "RGBA", "P"):
        file = tmp_path / ("picture.tif" if kind == "CMYK" else "picture.png")
        pictures()[kind].save(file)
        assert_same(prepare, pil, str(file))
    # transformers would clip these
    deep = pictures()["16-bit"]
    assert_same(prepare, pil, deep, given=Image.fromarray((np.asarray(deep) // 257).astype(np.uint8)).convert("RGB"))


def test_grey_of_colour(both):
    pil, prepare = both(ViTImageProcessor(size=square(16), **GREY), 1)
    for picture in pictures().values():
        if picture.mode in ("RGBA", "P", "CMYK"):
            assert_same(prepare, pil, picture, given=picture.convert("RGBA").convert("RGB").convert("L"))


class TestInWords:
    @pytest.fixture
    def prepare(self, both):
        return both(RefinerImageProcessor(size=square(16)))[1]

    def test_files(self, prepare, tmp_path):
        noise(300, 300, 3).save(tmp_path / "half.jpg")
        whole = (tmp_path / "half.jpg").read_bytes()
        (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "notes.png").write_text("not a picture")
        (tmp_path / "folder.png").mkdir()
        for name in ("half.jpg", "notes.png", "folder.png", "nowhere.png"):
            with pytest.raises(ValueError, match=f"{name} can't be read .*complete"):
                prepare(tmp_path / name)
        with pytest.raises(ValueError, match="half.jpg can't be read"):
            prepare(Image.open(tmp_path / "half.jpg"))

    def test_bombs(self, prepare, tmp_path, monkeypatch):
        noise(50, 50).save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match="bomb.png can't be read .*bomb"):
            prepare(tmp_path / "bomb.png")

    def test_levels_without_a_range(self, prepare):
        with pytest.raises(ValueError, match="mode F"):
            prepare(Image.new("F", (8, 8)))
        with pytest.raises(ValueError, match="outside 0..65535"):
            prepare(Image.new("I", (8, 8), 70000))

    def test_no_picture(self, prepare):
        with pytest.raises(TypeError, match="not ndarray"):
            prepare(np.zeros((8, 8, 3), np.uint8))

    @pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
    @pytest.mark.parametrize("content", [None, "{", "[1]"])
    def test_settings(self, prepare, tmp_path, name, content):
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"/{name} can't be read"):
            Preprocess(tmp_path)


class TestExport:
    def test_the_module_itself_goes_along(self, both, tmp_path):
        both(DeiTImageProcessor(size=square(36), crop_size=square(32), **GREY), 1)
        copy_preprocessing(tmp_path, RefinerConfig(image_size=32, num_channels=1))
        assert (tmp_path / "preprocess.py").read_bytes() == Path(preprocess.__file__).read_bytes()

    @pytest.mark.parametrize(
        "processor, says",
        [
            (MobileViTImageProcessor(size={"shortest_edge": 18}, crop_size=square(16)), "picture of 97 x 41 pixels"),
            (
                ViTImageProcessor(
                    size={"shortest_edge": 16, "longest_edge": 40}, do_center_crop=True, crop_size=square(16)
                ),
                "size of (shortest_edge, longest_edge|longest_edge, shortest_edge)",
            ),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, tmp_path, processor, says):
        """By the command, and nothing is left behind."""
        make(RefinerForImageClassification).save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        out = tmp_path / "out"
        with pytest.raises(SystemExit, match=says) as stopped:
            main(["--model", str(tmp_path / "model"), "--output_dir", str(out)])
        assert f"without transformers as by this model's image processor ({type(processor).__name__}Pil)" in str(
            stopped.value
        )
        assert not out.exists() and not list(tmp_path.glob(".out-*"))

    def test_one_pixel_aside_is_noticed(self, both, tmp_path, monkeypatch):
        """The crop's rounding is all that differs."""
        both(RefinerImageProcessor(size=square(16)))
        monkeypatch.setattr(Preprocess, "_start", lambda self, spare: spare // 2)
        with pytest.raises(ValueError, match="RefinerImageProcessorPil.: of a picture of"):
            copy_preprocessing(tmp_path, RefinerConfig(image_size=16))
        assert not (tmp_path / "preprocess.py").exists()


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (40_001, 3)])
def test_long_and_thin_pictures(both, shape):
    """Whose shorter side can't be resized as a whole: that would take gigabytes."""
    processor, prepare = both(RefinerImageProcessor(size=square(224)))
    assert_same(prepare, processor, noise(*shape, 3))
