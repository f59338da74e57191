"""Engines: every one and every precision gives the model's answers, or says why it can't."""

import sys
from types import SimpleNamespace

import pytest
import torch

from refiner_hf.export import engines
from refiner_hf.export.engines import BFLOAT16, ENGINES, FLOAT32, ONNXRUNTIME, OPENVINO, has_bfloat16, open_graph


WAYS = [(ONNXRUNTIME, False), (OPENVINO, False), (OPENVINO, True)]


@torch.no_grad()
def away(graph, network, images: int) -> float:
    """How far logits are from the model's, as a share of these."""
    pixels = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(images))
    expected, actual = network(pixels).logits, torch.from_numpy(graph(pixels.numpy()))
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("engine, any_number", WAYS)
def test_float32(network, file, engine, any_number):
    """Also if the number of images changes, and changes back."""
    graph = open_graph(file, engine, any_number=any_number)
    assert graph.inputs == {"pixel_values"} and graph.outputs == {"logits"}
    for images in (3, 1, 8, 3):
        assert away(graph, network, images) < 1e-5


def test_bfloat16(network, file):
    """Its answers are those of 8 bits of mantissa: not the same, and not far."""
    if not has_bfloat16(OPENVINO):
        pytest.skip("this CPU has no bfloat16")
    for any_number in (False, True):
        assert 1e-4 < away(open_graph(file, OPENVINO, BFLOAT16, any_number=any_number), network, 8) < 0.05
    assert away(open_graph(file, OPENVINO, FLOAT32), network, 8) < 1e-5, "which isn't left to OpenVINO"


def test_as_many_threads_as_torch(file):
    """Which is one in these tests."""
    assert open_graph(file)._session.get_session_options().intra_op_num_threads == torch.get_num_threads() == 1
    graph = open_graph(file, OPENVINO, any_number=True)
    graph(torch.zeros(1, 3, 16, 16).numpy())
    assert graph._compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_one_that_is_not_installed(file, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(RuntimeError, match=rf"needs {engine}. Install it with: pip install 'refiner_hf\[export\]'"):
        open_graph(file, engine)
    assert engine not in engines.installed_engines()
    assert len(engines.open_every_way(file)) == {ONNXRUNTIME: 2, OPENVINO: 1}[engine]


def test_a_cpu_without_bfloat16(file, monkeypatch):
    """There OpenVINO takes float32 without a word."""
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setattr(engines, "_openvino_core", lambda: core)
    with pytest.raises(ValueError, match="OpenVINO can't compute in bfloat16 on this CPU: drop --precision"):
        open_graph(file, OPENVINO, BFLOAT16)
    with pytest.raises(ValueError, match="onnxruntime can't compute in bfloat16 on a CPU: give --engine openvino"):
        open_graph(file, ONNXRUNTIME, BFLOAT16)


def test_what_there_is_not(file):
    """Rather than float32 without a word."""
    with pytest.raises(ValueError, match="no precision 'int8'; choose among float32, bfloat16"):
        open_graph(file, OPENVINO, "int8")
    with pytest.raises(ValueError, match="no engine 'torch'; choose among onnxruntime, openvino"):
        open_graph(file, "torch")


def test_openvino_stays_on_the_cpu(file):
    with pytest.raises(ValueError, match="OpenVINO computes on the CPU, and not on cuda:0: give --device cpu"):
        open_graph(file, OPENVINO, device="cuda:0")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_damaged_file(file, engine, tmp_path):
    content = file.read_bytes()
    (tmp_path / "half.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="half.onnx is damaged or incomplete"):
        open_graph(tmp_path / "half.onnx", engine)
