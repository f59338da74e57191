"""A graph in 8 bits, its ranges taken from pictures, and whether every engine computes it alike."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from .engines import INPUT, Graph, open_every_way, open_graph
from .graph import quiet


_PRODUCTS, _CONVOLUTION = ("MatMul", "Gemm"), "Conv"
_FLOAT_CONVOLUTIONS = 2  # of the stem; see `_nodes_to_quantize`
_MOST_LOST = 2  # times what the engine loses that loses least: they round at different places


def quantize_onnx(file: str | Path, quantized: str | Path, pixel_values: Iterable[np.ndarray]) -> None:
    """
    Writes the int8 form of a graph: the linear layers, and the convolutions of the stem but for the first two. Weights
    get a scale for each output channel; what they are multiplied with gets one scale, of the range of numbers that
    pictures make there. Everything else, such as what happens to maps, stays in float32.

    Args:
        file: the graph, of [`export_onnx`].
        quantized: the `.onnx` file to write.
        pixel_values (`Iterable[np.ndarray]`): batches (B, C, height, width) of pictures like those to come.
    """
    kinds = [*_PRODUCTS, _CONVOLUTION]
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared,
            Path(quantized),
            _Pictures(pixel_values),
            nodes_to_quantize=_nodes_to_quantize(onnx.load(prepared).graph),
            op_types_to_quantize=kinds,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Weights use 7 of the 8 bits: a CPU without VNNI adds two products in 16 bits, where larger ones would be
            # cut off, and answers would be worse there without a word.
            reduce_range=True,
            # What comes out stays in float32, in which the next step takes it; see also `_nodes_to_quantize`.
            extra_options={"OpTypesToExcludeOutputQuantization": kinds},
        )


def check_quantized(file: str | Path, quantized: str | Path, pixel_values: Iterable[np.ndarray]) -> float:
    """
    Compares a graph's int8 form with the graph itself, in each engine that is installed.

    Args:
        file, quantized: the two.
        pixel_values (`Iterable[np.ndarray]`): batches (B, C, height, width) of pictures.

    Returns:
        `float`: the share of pictures with the same answer, in the engine with the fewest.

    Raises:
        `RuntimeError`: an engine loses much more than another one.
    """
    pictures = list(pixel_values)
    exact = _logits(open_graph(file), pictures)
    lost, same = {}, []
    for name, graph in open_every_way(quantized).items():
        answers = _logits(graph, pictures)
        lost[name] = float(np.linalg.norm(answers - exact) / np.linalg.norm(exact))
        same.append(float((answers.argmax(1) == exact.argmax(1)).mean()))
    most, least = max(lost, key=lost.__getitem__), min(lost, key=lost.__getitem__)
    if not lost[most] <= _MOST_LOST * lost[least]:
        raise RuntimeError(
            f"{most} computes the graph {Path(quantized).name} wrongly: its logits are {lost[most]:.1%} away from "
            f"those in float32, and in {least} {lost[least]:.1%}. Export without --int8, or try another version of "
            "the package."
        )
    return min(same)


def _nodes_to_quantize(graph: onnx.GraphProto) -> list[str]:
    """
    Products with weights, not those of attention; and convolutions of the stem, not those of maps, which have few
    weights. The stem's first two have few, too. Besides, where the number of images is open, OpenVINO 2026.4 computes
    wrongly what the first one gives, if that is quantized for the second; and what the last one gives, if that is.
    """
    weights = {each.name for each in graph.initializer}
    products = [node for node in graph.node if node.op_type in _PRODUCTS and node.input[1] in weights]
    stem = [node for node in graph.node if node.op_type == _CONVOLUTION and ".patch_embeddings." in node.input[1]]
    return [node.name for node in (*products, *stem[_FLOAT_CONVOLUTIONS:])]


def _logits(graph: Graph, pictures: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([graph(pixels) for pixels in pictures])


class _Pictures(CalibrationDataReader):
    def __init__(self, pixel_values: Iterable[np.ndarray]):
        self._batches = iter(pixel_values)

    def get_next(self) -> dict[str, np.ndarray] | None:
        pixels = next(self._batches, None)
        return None if pixels is None else {INPUT: pixels}
