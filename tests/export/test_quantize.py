"""Graphs in 8 bits: what is quantized, with ranges of which pictures, and what engines make of it."""

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx.numpy_helper import to_array

from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.commands.export import main
from refiner_hf.data.digits import digits_splits
from refiner_hf.export import quantize
from refiner_hf.export.calibration import load_calibration
from refiner_hf.export.engines import BFLOAT16, ENGINES, FLOAT32, has_bfloat16, open_every_way, open_graph
from refiner_hf.export.graph import export_onnx
from refiner_hf.export.quantize import check_quantized, quantize_onnx

from ..conftest import save_with_processor
from ..every_class import make
from ..images import write_folder


def noise(images: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, 3, 16, 16)).astype(np.float32)


PICTURES = [noise(8, 1), noise(3, 2)]


@pytest.fixture(scope="module")
def file(file):
    """The graph, and beside it its int8 form."""
    quantize_onnx(file, small(file), PICTURES)
    return file


def small(file):
    return file.with_name("model_int8.onnx")


def stored(file) -> dict[str, np.ndarray]:
    return {each.name: to_array(each) for each in onnx.load(file).graph.initializer}


def quantized_inputs(file) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The products and convolutions whose two inputs are in 8 bits, and the others."""
    graph = onnx.load(file).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    computing = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    taken = [node for node in computing if {made_by.get(name) for name in node.input[:2]} == {"DequantizeLinear"}]
    return taken, [node for node in computing if node not in taken]


def test_what_is_quantized(network, file):
    """Every linear layer, and of the convolutions the stem's last two."""
    taken, others = quantized_inputs(small(file))
    linear = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(node.op_type != "Conv" for node in taken) == len(linear)
    stem = [node.input[1] for node in taken if node.op_type == "Conv"]
    assert len(stem) == 2 and "stem.convolution3" in stem[0] and "patch_embeddings.projection" in stem[1]
    assert sum("refinement" in node.input[1] for node in others) == 6, "two layers' convolutions over maps"
    assert sum(node.op_type == "MatMul" for node in others) == 6, "attention's own products"


def test_weights_fit_into_7_bits(file):
    """So that a CPU that adds two products in 16 bits gives the same answers."""
    found = stored(small(file))
    weights = {name: each for name, each in found.items() if each.dtype == np.int8 and each.ndim > 1}
    assert len(weights) > 10 and max(np.abs(each.astype(int)).max() for each in weights.values()) == 64
    for name, each in weights.items():
        scales = found[name.replace("_quantized", "_scale")]
        assert scales.size > 1 and scales.size in each.shape, "one for each output channel"


def test_it_is_smaller(network, file):
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear))
    assert file.stat().st_size - small(file).stat().st_size > 2 * linear  # three of four bytes, less the scales


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_answers(file, engine, precision):
    """Near the graph's own, and in every engine near each other; as a share of all that the logits are."""
    if precision == BFLOAT16 and not has_bfloat16(engine):
        pytest.skip("it can't compute in that here")
    pixels = noise(30)
    exact, rough = open_graph(file)(pixels), open_graph(small(file), engine, precision)(pixels)
    other = open_graph(small(file))(pixels)
    size = np.linalg.norm(exact)
    assert 1e-3 < np.linalg.norm(rough - exact) / size < 0.1
    assert np.linalg.norm(rough - other) / size < 0.05


def test_openvino_computes_in_8_bits(network, file):
    """It could as well make float32 of everything first."""
    compiled = openvino.Core().compile_model(str(small(file)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [
        (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
        for info in (node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops())
    ]
    linear = sum(isinstance(module, torch.nn.Linear) for module in network.modules())
    assert kinds.count(("FullyConnected", "u8")) == linear and kinds.count(("FullyConnected", "f32")) == 0
    assert kinds.count(("Convolution", "u8")) == 2


def test_ranges_are_those_of_the_pictures(file, tmp_path):
    """The same pictures give the same file; brighter ones larger scales; and such as it never saw are cut off."""
    quantize_onnx(file, tmp_path / "same.onnx", PICTURES)
    quantize_onnx(file, tmp_path / "bright.onnx", [5 * each for each in PICTURES])
    usual, same, bright = stored(small(file)), stored(tmp_path / "same.onnx"), stored(tmp_path / "bright.onnx")
    assert all(np.array_equal(usual[name], same[name]) for name in usual)
    changed = {name for name in usual if not np.array_equal(usual[name], bright[name])}
    assert len(changed) > 10 and all("scale" in name or "zero_point" in name or "bias" in name for name in changed)
    (stem,) = (name for name in changed if name == "relu_1_scale")
    assert bright[stem] > 3 * usual[stem]
    pixels = 5 * noise(20)
    exact = open_graph(file)(pixels)
    lost = [np.abs(open_graph(each)(pixels) - exact).mean() for each in (small(file), tmp_path / "bright.onnx")]
    assert lost[0] > 2 * lost[1]


class TestCheck:
    def test_finds_that_answers_are_the_same(self, file):
        assert check_quantized(file, small(file), [noise(40)]) > 0.9

    def test_finds_an_engine_that_computes_otherwise(self, file, monkeypatch):
        def one_is_wrong(file):
            graphs = open_every_way(file)
            right = graphs["OpenVINO"]
            return graphs | {"OpenVINO": lambda pixels: 1.3 * right(pixels)}

        monkeypatch.setattr(quantize, "open_every_way", one_is_wrong)
        with pytest.raises(
            RuntimeError, match=r"OpenVINO computes the graph model_int8.onnx wrongly: .* \d\d\.\d% away"
        ):
            check_quantized(file, small(file), PICTURES)

    @pytest.mark.slow
    def test_a_real_stem(self, tmp_path):
        """OpenVINO computes some quantized stems wrongly if the number of images is open; not what we make."""
        torch.manual_seed(0)
        size = dict(image_size=64, num_hidden_layers=2, num_labels=10)
        network = RefinerForImageClassification(RefinerConfig.small(**size)).eval()
        export_onnx(network, tmp_path / "model.onnx")
        pictures = [np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32)]
        quantize_onnx(tmp_path / "model.onnx", small(tmp_path / "model.onnx"), pictures)
        check_quantized(tmp_path / "model.onnx", small(tmp_path / "model.onnx"), pictures)
        taken, _ = quantized_inputs(small(tmp_path / "model.onnx"))
        assert sum(node.op_type == "Conv" for node in taken) == 2


class TestPictures:
    processor = RefinerImageProcessor(size={"height": 8, "width": 8}, crop_pct=1.0)

    def pixels_of(self, image) -> np.ndarray:
        return self.processor(image.convert("RGB"), return_tensors="pt").pixel_values.numpy()

    @pytest.fixture
    def folder(self, tmp_path):
        network = make(RefinerForImageClassification)
        network.reset_classifier(["red", "blue", "green"])
        return save_with_processor(network, tmp_path / "model")

    def test_of_digits_are_training_images(self):
        pixels = np.concatenate(load_calibration("digits", "digits", self.processor))
        assert pixels.shape == (200, 3, 8, 8) and pixels.dtype == np.float32
        train, test = ({self.pixels_of(row["image"]).tobytes() for row in split} for split in digits_splits())
        found = {each.tobytes() for each in pixels}
        assert found <= train and not found & test

    def test_need_no_labels(self, tmp_path):
        folder = write_folder(tmp_path / "photos", per_label=4) / "red"
        batches = load_calibration(str(folder), None, self.processor)
        assert [len(each) for each in batches] == [4]

    @pytest.mark.parametrize("calibrated, measured", [("", ""), ("", "red"), ("red", ""), ("../photos/red", "red")])
    def test_are_not_those_that_are_measured_on(self, tmp_path, calibrated, measured):
        photos = write_folder(tmp_path / "photos")
        with pytest.raises(ValueError, match="name the same pictures.* Give --int8 the training images"):
            load_calibration(str(photos / calibrated), str(photos / measured), self.processor)

    def test_that_are_not_there(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        for data in ("empty", "nowhere/at/all"):
            with pytest.raises(SystemExit, match=data):
                main(["--model", str(folder), "--output_dir", str(tmp_path / "out"), "--int8", str(tmp_path / data)])
        assert not (tmp_path / "out").exists()
