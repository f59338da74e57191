"""Graphs away from PyTorch: the same answers for any number of images, and what their int8 form is worth."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from refiner_hf import RefinerForImageClassification, RefinerImageProcessor, RefinerImageProcessorPil, RefinerModel
from refiner_hf.commands.export import main
from refiner_hf.export import graph
from refiner_hf.export.compare import compare, comparison_table, load_labelled
from refiner_hf.export.graph import check_onnx, export_onnx, open_onnx, quantize_onnx, run_onnx
from refiner_hf.hub.code import add_code

from ..conftest import GOLDEN_MODELS, LAYOUTS, assert_close, load_json, save_with_processor
from ..every_class import config_of, make
from ..images import write_folder


PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture
def network():
    return make(RefinerForImageClassification)


def answers(file, pixels: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(run_onnx(open_onnx(file), pixels.numpy()))


def kinds(file) -> set[str]:
    return {node.op_type for node in onnx.load(file).graph.node}


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
    batches = []
    monkeypatch.setattr(
        graph, "run_onnx", lambda session, pixels: batches.append(len(pixels)) or run_onnx(session, pixels)
    )
    assert check_onnx(tmp_path / "model.onnx", network) < 1e-4
    assert 1 in batches and max(batches) > 2, "other numbers of images than it was recorded with"
    with torch.no_grad():
        network.classifier.bias[0] += 0.001
    with pytest.raises(RuntimeError, match=r"model.onnx answers differently: by 0\.0"):
        check_onnx(tmp_path / "model.onnx", network)


def test_half_precision_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        export_onnx(network.half(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_int8(network, tmp_path):
    file, small = tmp_path / "model.onnx", tmp_path / "model_int8.onnx"
    export_onnx(network.train(), file)
    assert network.training and network.refiner.norm.training, "as it was, though its evaluation is exported"
    quantize_onnx(file, small)
    assert "MatMulInteger" in kinds(small) and "ConvInteger" not in kinds(small)
    assert "Gemm" in kinds(file) and "Gemm" not in kinds(small), "the classifiers too"
    pixels = torch.randn(7, 3, 16, 16)
    exact, rough = answers(file, pixels), answers(small, pixels)
    assert 0 < (exact - rough).norm() < 0.2 * exact.norm()
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear))
    assert file.stat().st_size - small.stat().st_size > 2 * linear  # three of four bytes, less the scales


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
    main(["--model", str(folder), "--output_dir", str(out), "--int8", "--measure_on", str(photos)])
    files = ["comparison.json", "config.json", "model.onnx", "model_int8.onnx", "preprocess.py"]
    files.append("preprocessor_config.json")
    assert sorted(path.name for path in out.iterdir()) == files
    assert load_json(out / "config.json")["id2label"] == {"0": "red", "1": "blue", "2": "green"}
    said = capsys.readouterr().out
    assert "pixel_values (batch, 3, 16, 16) to logits (batch, 3)" in said and "39 images of photos" in said

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
    assert rows["other.onnx"]["accuracy"] == pytest.approx(1 / 3)
    assert rows["model.onnx"]["same_answers"] == 1 and rows["model.onnx"]["accuracy"] == rows["PyTorch"]["accuracy"]
    assert rows["model.onnx"]["bytes"] == files[0].stat().st_size
    assert set(rows["PyTorch"]["images_per_second"]) == {"1", "32"}
    assert comparison_table(compared).count("\n") == 4


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
    words = ["--model", str(saved[1]), "--output_dir", str(tmp_path / "out"), "--measure_on", str(photos)]
    with pytest.raises(SystemExit, match=r"refiner_hf\[train\]"):
        main(words)


def test_code_stays_behind(saved, tmp_path):
    """An export can't be loaded with the model's code, so it doesn't name it."""
    add_code(saved[1])
    main(["--model", str(saved[1]), "--output_dir", str(tmp_path / "out")])
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" in load_json(saved[1] / name) and "auto_map" not in load_json(tmp_path / "out" / name)
