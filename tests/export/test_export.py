"""Graphs away from PyTorch: the same answers for any number of images, and what each engine makes of them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from refiner_hf import RefinerForImageClassification, RefinerImageProcessor, RefinerImageProcessorPil, RefinerModel
from refiner_hf.commands.export import main
from refiner_hf.export import compare as comparing
from refiner_hf.export import graph
from refiner_hf.export.compare import compare, comparison_table, load_labelled
from refiner_hf.export.engines import OPENVINO, has_bfloat16, open_every_way, open_graph
from refiner_hf.export.graph import check_onnx, export_onnx
from refiner_hf.hub.code import add_code
from refiner_hf.utils.machine import computes_bfloat16

from ..conftest import GOLDEN_MODELS, LAYOUTS, assert_close, load_json, save_with_processor
from ..every_class import config_of, make
from ..images import write_folder


PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture
def network():
    return make(RefinerForImageClassification)


def answers(file, pixels: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(open_graph(file)(pixels.numpy()))


# An export takes seconds, so most of them are slow tests.
SLOW_MODELS = set(GOLDEN_MODELS) - {"released"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_MODELS else n for n in GOLDEN_MODELS]
)
def test_the_references_logits(golden, name, tmp_path):
    golden = golden(name)
    export_onnx(golden.model(), tmp_path / "model.onnx")
    assert_close(answers(tmp_path / "model.onnx", golden["pixel_values"]), golden["eval.logits"])


VARIANTS = {
    **{layout: dict(attention_types=types) for layout, types in LAYOUTS.items()},
    "expansion": dict(refinement="expansion"),
    "convolution": dict(refinement="convolution"),
    "no stem": dict(use_conv_stem=False),
    "no dense head": dict(use_dense_head=False),
    "distillation": dict(use_distillation_token=True, use_distillation_head=True),
    "not square": dict(image_size=(12, 20), num_channels=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_images(variant, tmp_path):
    """As in evaluation, although the model is in training mode, and stays in it."""
    model = make(RefinerForImageClassification, **VARIANTS[variant]).train()
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training and model.refiner.norm.training
    config = model.eval().config
    for batch in (1, 3, 8):
        pixels = torch.randn(batch, config.num_channels, *config.image_height_width)
        with torch.no_grad():
            difference = (answers(tmp_path / "model.onnx", pixels) - model(pixels).logits).abs().max()
        assert difference < 1e-4


def test_another_models_answers_are_noticed(network, tmp_path, monkeypatch):
    export_onnx(network, tmp_path / "model.onnx")
    asked = []

    def noted(name, run):
        return lambda pixels: asked.append((name, len(pixels))) or run(pixels)

    monkeypatch.setattr(
        graph, "open_every_way", lambda file: {name: noted(name, run) for name, run in open_every_way(file).items()}
    )
    assert check_onnx(tmp_path / "model.onnx", network) < 1e-4
    assert {name.split(",")[0] for name, _ in asked} == {"onnxruntime", "OpenVINO"} and len(asked) == 9
    batches = {images for _, images in asked}
    assert 1 in batches and max(batches) > 2, "other numbers of images than it was recorded with"
    with torch.no_grad():
        network.classifier.bias[0] += 0.001
    with pytest.raises(RuntimeError, match=r"model.onnx in onnxruntime answers differently: by 0\.0"):
        check_onnx(tmp_path / "model.onnx", network)


def test_half_precision_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        export_onnx(network.half(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A model that knows the photos' labels, in another order, and its processor."""
    network = make(RefinerForImageClassification)
    network.reset_classifier(["red", "blue", "green"])
    return network, save_with_processor(network, tmp_path / "model")


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", per_label=13)


RUN = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "transformers", "refiner_hf"]))  # importing them fails
import numpy
{block}
numpy.savez("out.npz", pixel_values=pixel_values, logits=logits)
"""


def test_command(saved, photos, tmp_path, capsys):
    model, folder = saved
    out = tmp_path / "exported"
    main(["--model", str(folder), "--output_dir", str(out), "--int8", "digits", "--measure_on", str(photos)])
    files = ["comparison.json", "config.json", "model.onnx", "model_int8.onnx", "preprocess.py"]
    files.append("preprocessor_config.json")
    assert sorted(path.name for path in out.iterdir()) == files
    assert load_json(out / "config.json")["id2label"] == {"0": "red", "1": "blue", "2": "green"}
    said = capsys.readouterr().out
    assert "pixel_values (batch, 3, 16, 16) to logits (batch, 3)" in said and "39 images of photos" in said
    assert "the largest difference of onnxruntime and OpenVINO" in said and "Of 200 pictures of digits" in said
    rows = load_json(out / "comparison.json")["contenders"].values()
    ways = {(row["engine"], row.get("file"), row["precision"]) for row in rows}
    files = ("model.onnx", "model_int8.onnx")
    expected = {(engine, file, "float32") for engine in ("onnxruntime", "OpenVINO") for file in files}
    expected |= {("OpenVINO", file, "bfloat16") for file in files if has_bfloat16(OPENVINO)}
    expected |= {("PyTorch", None, "bfloat16")} if computes_bfloat16("cpu") else set()
    assert ways == expected | {("PyTorch", None, "float32")} and len(rows) == len(ways)
    assert said.count("\n| ") == len(rows) + 2

    # The page's own lines, for a picture that isn't square, as on a machine with NumPy, Pillow and onnxruntime alone.
    noise = np.random.default_rng(0).integers(0, 256, (60, 140, 3), np.uint8)
    picture = tmp_path / "outputs" / "demo" / "examples" / "0.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(noise).save(picture)
    block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    run = subprocess.run([sys.executable, "-c", RUN.format(block=block)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    processor = RefinerImageProcessorPil(size={"height": 16, "width": 16})
    pixels = processor(Image.open(picture), return_tensors="pt").pixel_values
    made = np.load(tmp_path / "out.npz")
    assert np.array_equal(made["pixel_values"], pixels.numpy())
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    assert_close(torch.from_numpy(made["logits"]), logits)
    assert run.stdout.strip() == model.config.id2label[logits.argmax().item()]


@pytest.mark.slow
def test_comparison(saved, photos, tmp_path):
    """Accuracy over all images, in the model's own order of labels, and of more than one batch."""
    model, _ = saved
    files = [tmp_path / "model.onnx", tmp_path / "other.onnx"]
    export_onnx(model, files[0])
    with torch.no_grad():  # a graph that always says "green"
        other = make(RefinerForImageClassification)
        other.reset_classifier(["red", "blue", "green"])
        other.classifier.bias[2] += 100
    export_onnx(other, files[1])
    processor = RefinerImageProcessor(size={"height": 16, "width": 16})
    compared = compare(model.eval(), processor, files, load_labelled(str(photos), None, model))
    assert compared["images"] == 39
    rows = compared["contenders"]
    for engine in ("onnxruntime", "OpenVINO"):
        right, wrong = (rows[f"{engine}, {file.name}, float32"] for file in files)
        assert wrong["accuracy"] == pytest.approx(1 / 3)
        assert right["same_answers"] == 1 and right["accuracy"] == rows["PyTorch"]["accuracy"]
        assert right["bytes"] == files[0].stat().st_size
    assert all(set(row["images_per_second"]) == set(row["times_pytorch"]) == {"1", "32"} for row in rows.values())
    assert set(rows["PyTorch"]["times_pytorch"].values()) == {1}
    lost = 100 * (1 / 3 - rows["PyTorch"]["accuracy"])
    lines = comparison_table(compared).splitlines()
    assert len(lines) == 2 + len(rows) and all(f"33.33% ({lost:+.2f})" in line for line in lines if "other" in line)


@pytest.mark.parametrize("seconds, rounds", [(0.001, 30), (1.0, 20), (50.0, 5)])
def test_a_large_network_takes_fewer_turns(monkeypatch, seconds, rounds):
    """As many as take a minute, of three contenders here; and never so few that a median says nothing."""
    monkeypatch.setattr(comparing, "seconds_of", lambda step, device: seconds)
    assert comparing._rounds(dict.fromkeys("abc", lambda: None)) == rounds


def test_what_cannot_be_exported(saved, photos, tmp_path):
    _, folder = saved
    out = tmp_path / "exported"

    def fails(*words: str, says: str) -> None:
        with pytest.raises(SystemExit, match=says):
            main(["--output_dir", str(out), *words])

    bare = tmp_path / "bare"
    RefinerModel(config_of()).save_pretrained(bare)
    fails("--model", str(bare), says="they lack classifier.bias")
    ViTForImageClassification(ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "vit"
    )
    fails("--model", str(tmp_path / "vit"), says="'vit' model without refinements")
    fails("--model", str(tmp_path / "nowhere"), says="nowhere")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    fails("--model", str(folder), says="model.safetensors are damaged")
    weights.write_bytes(whole)
    (folder / "preprocessor_config.json").unlink()
    fails("--model", str(folder), says="processor")
    assert not out.exists() and not list(tmp_path.glob(".exported*"))
    RefinerImageProcessor(size={"height": 24, "width": 16}).save_pretrained(folder)
    fails("--model", str(folder), says="makes .3, 24, 16. .channels, height, width. of a picture")
    RefinerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    fails("--model", str(folder), "--measure_on", str(photos), "--max_images", "0", says="--max_images must be at")
    (photos / "red").rename(photos / "yellow")
    fails("--model", str(folder), "--measure_on", str(photos), says="doesn't know: yellow")
    assert not out.exists() and not list(tmp_path.glob(".exported*"))  # all of it before the long part
    out.mkdir()
    (out / "mine.txt").touch()
    fails("--model", str(folder), says="isn't an empty folder")


def test_measuring_takes_the_packages_for_training(saved, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "refiner_hf.export.compare", None)
    for option in ("--measure_on", "--int8"):
        words = ["--model", str(saved[1]), "--output_dir", str(tmp_path / "out"), option, str(photos)]
        with pytest.raises(SystemExit, match=rf"{option} needs .*refiner_hf\[train\]"):
            main(words)


def test_code_stays_behind(saved, tmp_path):
    """An export can't be loaded with the model's code, so it doesn't name it."""
    add_code(saved[1])
    main(["--model", str(saved[1]), "--output_dir", str(tmp_path / "out")])
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" in load_json(saved[1] / name) and "auto_map" not in load_json(tmp_path / "out" / name)
