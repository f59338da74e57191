"""What computes a graph: ONNX Runtime or OpenVINO. Each is imported when it is asked for."""

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


INPUT, OUTPUT = "pixel_values", "logits"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"
ENGINES = {ONNXRUNTIME: "onnxruntime", OPENVINO: "OpenVINO"}  # by package, how each is called in texts


class Graph(ABC):
    """
    A graph, ready to be computed, with as many threads as torch has.

    Attributes:
        inputs, outputs (`set[str]`): their names.
    """

    inputs: set[str]
    outputs: set[str]

    @abstractmethod
    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """(B, C, height, width) -> (B, K), both float32. Errors are the engine's own."""


def open_graph(
    file: str | Path,
    engine: str = ONNXRUNTIME,
    precision: str = FLOAT32,
    device: str | torch.device = "cpu",
    any_number: bool = False,
) -> Graph:
    """
    Args:
        file: the `.onnx` file.
        engine (*optional*): of [`ENGINES`].
        precision (*optional*): what is computed in, but for what the graph itself has in 8 bits: `"float32"`, or in
            OpenVINO `"bfloat16"`.
        device (*optional*): where. OpenVINO is used on the CPU only.
        any_number (`bool`, *optional*): compile once for any number of images, as servers do. Otherwise OpenVINO
            compiles for each number that it is given, which takes a moment, and is faster from then on.

    Raises:
        `RuntimeError`: the engine isn't installed.
        `ValueError`: there is no such engine or precision, it can't compute in this precision here, or the file is
            damaged.
    """
    for what, name, names in (("engine", engine, list(ENGINES)), ("precision", precision, [FLOAT32, BFLOAT16])):
        if name not in names:
            raise ValueError(f"There is no {what} {name!r}; choose among {', '.join(names)}.")
    package = _import(engine)
    if precision == BFLOAT16 and not has_bfloat16(engine):
        raise ValueError(
            f"{ENGINES[engine]} can't compute in bfloat16 "
            + ("on this CPU: drop --precision." if engine == OPENVINO else f"on a CPU: give --engine {OPENVINO}.")
        )
    if engine == OPENVINO and torch.device(device).type != "cpu":
        raise ValueError(f"OpenVINO computes on the CPU, and not on {device}: give --device cpu.")
    try:
        if engine == OPENVINO:
            return _OpenVinoGraph(Path(file), precision, any_number)
        return _OnnxRuntimeGraph(package, Path(file), torch.device(device))
    except Exception as error:  # the engines' own errors have nothing else in common
        raise ValueError(f"The ONNX model {file} is damaged or incomplete: {error}") from error


def open_every_way(file: str | Path) -> dict[str, Graph]:
    """A graph in each installed engine, by what to call it in errors; in OpenVINO also for any number of images."""
    graphs = {ENGINES[engine]: open_graph(file, engine) for engine in installed_engines()}
    if OPENVINO in installed_engines():
        graphs["OpenVINO, for any number of images,"] = open_graph(file, OPENVINO, any_number=True)
    return graphs


def installed_engines() -> list[str]:
    """Those that can be imported here."""
    return [engine for engine in ENGINES if find_spec(engine)]


def has_bfloat16(engine: str) -> bool:
    """Whether an engine, which is installed, computes in bfloat16 on this CPU, and doesn't only pretend to."""
    if engine != OPENVINO:
        return False
    return "BF16" in _openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class _OnnxRuntimeGraph(Graph):
    def __init__(self, onnxruntime: ModuleType, file: Path, device: torch.device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait in a loop between runs slow down everything else that runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":  # where this onnxruntime has no CUDA, it says so and takes the CPU
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        self._session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        self.inputs = {each.name for each in self._session.get_inputs()}
        self.outputs = {each.name for each in self._session.get_outputs()}

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        return self._session.run([OUTPUT], {INPUT: pixel_values})[0]


class _OpenVinoGraph(Graph):
    def __init__(self, file: Path, precision: str, any_number: bool):
        self._core = _openvino_core()
        self._model = self._core.read_model(str(file))
        self._options = {
            # Left to itself, it takes bfloat16 where that is fast.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == BFLOAT16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._any_number = any_number
        self._compiled: Any = None
        self._compiled_for: tuple[int, ...] | None = None
        self.inputs = {each.any_name for each in self._model.inputs}
        self.outputs = {each.any_name for each in self._model.outputs}

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        shape = None if self._any_number else pixel_values.shape
        if self._compiled is None or shape != self._compiled_for:
            if shape is not None:
                self._model.reshape({INPUT: list(shape)})
            self._compiled, self._compiled_for = self._core.compile_model(self._model, "CPU", self._options), shape
        return self._compiled({INPUT: pixel_values})[OUTPUT]


@cache
def _openvino_core() -> Any:
    """One for the whole process: with its last one OpenVINO unloads code that a later fork would jump to."""
    return _import(OPENVINO).Core()


def _import(engine: str) -> ModuleType:
    try:
        return import_module(engine)
    except ImportError as error:
        raise RuntimeError(
            f"An exported model needs {engine}. Install it with: pip install 'refiner_hf[export]'"
        ) from error
