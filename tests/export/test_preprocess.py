"""Pictures prepared without torch and transformers: to the last bit what the image processors do."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor, DeiTImageProcessor, ViTConfig, ViTImageProcessor

from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.commands.export_onnx import main
from refiner_hf.export.folder import check_preprocess
from refiner_hf.export.preprocess import pixel_values
from refiner_hf.image_processing_pil_refiner import open_image, to_8_bit_rgb


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(processor, folder, channels: int = 3):
    processor.save_pretrained(folder)
    ViTConfig(num_channels=channels).save_pretrained(folder)
    return folder


def same_as_processor(folder, picture, given=None) -> None:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = np.asarray(processor(given or picture, return_tensors="np").pixel_values)
    made = pixel_values(picture, folder)
    assert made.dtype == np.float32 and made.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(made, expected)


SHAPES = [(20, 20), (61, 23), (23, 60), (300, 1), (1, 90), (3, 2), (224, 223)]


@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 0.9, 1.0, 1.13, 2.5])
@pytest.mark.parametrize("size", [(16, 16), (15, 24), (33, 17)])
def test_a_refiners(size, crop_pct, tmp_path):
    processor = RefinerImageProcessor(size=dict(zip(("height", "width"), size)), crop_pct=crop_pct)
    folder = folder_of(processor, tmp_path)
    for shape in SHAPES:
        same_as_processor(folder, noise(*shape))


SIZE, CROP = {"height": 20, "width": 24}, {"height": 16, "width": 17}
PROCESSORS = {
    "vit": ViTImageProcessor(size=SIZE),
    "vit, other numbers": ViTImageProcessor(
        size=SIZE, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ),
    "vit, only resized": ViTImageProcessor(size=SIZE, do_rescale=False, do_normalize=False),
    "vit, nearest, other scale": ViTImageProcessor(size=SIZE, resample=0, rescale_factor=1 / 127.5),
    "deit": DeiTImageProcessor(size=SIZE, crop_size=CROP),
    "deit, crop larger than the image": DeiTImageProcessor(size=CROP, crop_size={"height": 31, "width": 22}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_vits(name, tmp_path):
    folder = folder_of(PROCESSORS[name], tmp_path)
    for shape in SHAPES:
        same_as_processor(folder, noise(*shape))
    check_preprocess(folder)


def test_one_channel(tmp_path):
    folder = folder_of(ViTImageProcessor(size=SIZE, image_mean=[0.3], image_std=[0.2]), tmp_path, channels=1)
    same_as_processor(folder, noise(31, 40), noise(31, 40).convert("L"))
    check_preprocess(folder)


def test_files_of_every_kind(tmp_path):
    """Modes, 16 bits, transparency and orientation, from files, as refiner-predict reads them."""
    folder = folder_of(RefinerImageProcessor(size={"height": 16, "width": 16}, crop_pct=0.8), tmp_path / "model")
    picture = noise(40, 25)
    pictures = {f"{mode}.png": picture.convert(mode) for mode in ("L", "LA", "RGBA", "P", "1")}
    pictures["16.png"] = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    pictures["cmyk.jpg"] = picture.convert("CMYK")
    pictures["turned.jpg"] = picture
    transparent = picture.convert("P")
    transparent.info["transparency"] = 3
    pictures["transparent.png"] = transparent
    for name, image in pictures.items():
        file, options = tmp_path / name, {}
        if name == "turned.jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            options["exif"] = exif
        image.save(file, **options)
        same_as_processor(folder, file, to_8_bit_rgb(open_image(file)))


def test_pictures_that_cannot_be_read(tmp_path):
    folder = folder_of(RefinerImageProcessor(size={"height": 16, "width": 16}), tmp_path / "model")
    (tmp_path / "text.png").write_text("no picture")
    noise(60, 60).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    for name in ("text.png", "cut.png", "nothing.png"):
        with pytest.raises(ValueError, match=f"The picture .*{name} can't be read"):
            pixel_values(tmp_path / name, folder)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb"):
        pixel_values(tmp_path / "bomb.png", folder)


def test_a_processor_that_cannot_be_written(tmp_path):
    folder = folder_of(CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=CROP), tmp_path)
    with pytest.raises(ValueError, match="does something that can't be written without transformers"):
        check_preprocess(folder)


PROGRAM = """
import sys
for module in ("torch", "torchvision", "transformers", "refiner_hf"):
    sys.modules[module] = None  # from here on it can't be imported
import numpy as np
import onnxruntime
sys.path.insert(0, sys.argv[1])
from preprocess import pixel_values
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
(logits,) = session.run(["logits"], {"pixel_values": pixel_values(sys.argv[2])})
np.save(sys.argv[3], logits)
"""


def test_an_exported_folder_alone(tmp_path):
    """A picture that isn't square, with a crop: the answer is that of the model and its processor."""
    torch.manual_seed(0)
    config = RefinerConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = RefinerForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    RefinerImageProcessor(size={"height": 16, "width": 16}, crop_pct=0.7).save_pretrained(tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "exported")])
    noise(80, 33).save(tmp_path / "wide.png")
    shutil.move(tmp_path / "exported", tmp_path / "elsewhere")
    words = [str(tmp_path / name) for name in ("elsewhere", "wide.png", "logits.npy")]
    run = subprocess.run([sys.executable, "-P", "-c", PROGRAM, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    with torch.no_grad():
        expected = model(processor(noise(80, 33), return_tensors="pt").pixel_values).logits
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected.numpy(), atol=1e-5)
