"""Image classifiers behind one interface, whether PyTorch or an engine for exported graphs computes them."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedConfig

from ..export.engines import BFLOAT16, FLOAT32, INPUT, ONNXRUNTIME, OUTPUT, open_graph
from ..utils.loading import load_classifier_and_processor, load_config, load_image_processor
from ..utils.machine import computes_bfloat16
from ..utils.text import counted
from .scores import probabilities


class Classifier(ABC):
    """
    A classifier, its labels in the order of the scores, and the processor of its images.

    Args:
        name (`str`): what to call it in errors.
        config ([`PreTrainedConfig`]): says the labels, and whether an image has one of them, any number of them, or a
            number of its own.
        processor ([`BaseImageProcessor`]): makes `pixel_values` of images.

    Attributes:
        precision (`str`): what it is computed in.

    Raises:
        `ValueError`: the model has no labels.
    """

    precision = FLOAT32

    def __init__(self, name: str, config: PreTrainedConfig, processor: BaseImageProcessor):
        if not config.id2label:
            raise ValueError(f"{name} isn't an image classifier: it has no labels.")
        self.name, self.config, self.processor = name, config, processor
        self.labels = [config.id2label[i] for i in sorted(config.id2label)]

    @torch.inference_mode()
    def scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        (B, C, height, width) -> each label's probability (B, labels), or a regression's number (B, 1), on the CPU.

        Raises:
            `ValueError`: the images or the labels don't fit the model, or it gives numbers that aren't finite.
        """
        logits = self.logits(pixel_values).float().cpu()
        if logits.shape != (len(pixel_values), len(self.labels)):
            raise ValueError(
                f"{self.name} has {counted(len(self.labels), 'label')}, but gives numbers of shape "
                f"{tuple(logits.shape)} for {counted(len(pixel_values), 'image')}."
            )
        if not logits.isfinite().all():
            raise ValueError(
                f"{self.name} answers with numbers that aren't finite: it is damaged, or its training broke."
            )
        return probabilities(logits, self.config)

    def keep_features(self) -> None:
        """
        Lets [`last_features`] have something to give.

        Raises:
            `ValueError`: the model gives no features, or its head can't be told.
        """
        raise ValueError(f"{self.name} gives no features, only answers: take a model of transformers.")

    def last_features(self) -> torch.Tensor:
        """Of the images that [`scores`] got last, what the head made them of: (B, width), on the CPU."""
        raise NotImplementedError

    @abstractmethod
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> (B, labels)."""

    @abstractmethod
    def weights(self) -> Iterable[bytes | memoryview]:
        """The model's bytes, to tell it from others."""

    def digest(self) -> str:
        """A digest of the model, its processor and its configuration. It doesn't depend on where they are stored."""
        elsewhere = ("_name_or_path", "transformers_version")
        config = {name: value for name, value in self.config.to_dict().items() if name not in elsewhere}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(self.processor.to_json_string().encode())
        for part in self.weights():
            digest.update(part)
        return digest.hexdigest()


def open_classifier(
    name: str,
    device: str = "cpu",
    revision: str | None = None,
    engine: str | None = None,
    precision: str | None = None,
) -> Classifier:
    """
    Args:
        name (`str`): folder or Hub name of any of transformers' image classifiers, Refiners among them; or an exported
            one: an `.onnx` file with `config.json` and `preprocessor_config.json` beside it, or the folder of a
            `model.onnx` that has no safetensors.
        device (`str`, *optional*, defaults to `"cpu"`): where it shall run.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.
        engine (`str`, *optional*): what computes an exported one, `"onnxruntime"` (the default) or `"openvino"`.
        precision (`str`, *optional*): what it is computed in, `"float32"` (the default) or `"bfloat16"`; for exported
            ones see [`~refiner_hf.export.engines.open_graph`].

    Raises:
        `ValueError`, `OSError`: there is no such model, it is damaged, or it isn't a classifier; the device or engine
            can't compute in this precision, or the model isn't exported, and an engine was asked for.
        `RuntimeError`: it needs an engine that isn't installed.
    """
    path = Path(name)
    if path.suffix != ".onnx" and (path / "model.onnx").is_file() and not any(path.glob("*.safetensors")):
        path = path / "model.onnx"
    if path.suffix == ".onnx":
        return GraphClassifier(path, device, engine or ONNXRUNTIME, precision or FLOAT32)
    if engine is not None:
        raise ValueError(f"--engine is for exported models (.onnx), and {name} is none.")
    return TorchClassifier(name, device, revision, precision or FLOAT32)


class TorchClassifier(Classifier):
    """A model of transformers, in `precision` however it was saved."""

    def __init__(self, name: str, device: str, revision: str | None = None, precision: str = FLOAT32):
        if precision == BFLOAT16 and not computes_bfloat16(device):
            raise ValueError(f"{device} can't compute in bfloat16, or only slowly: drop --precision.")
        model, processor = load_classifier_and_processor(name, revision)
        super().__init__(name, model.config, processor)
        self.precision = precision
        self._model = (model.bfloat16() if precision == BFLOAT16 else model).to(device)
        if hasattr(self._model, "prepack_weights"):
            with suppress(ValueError):  # where it can't, it is only slower
                self._model.prepack_weights()
        self._into_head: torch.Tensor | None = None

    def keep_features(self) -> None:
        from ..utils.heads import head_modules  # the base installation hasn't what it needs

        head = self._model.get_submodule(head_modules(self.config, self._model)[0])
        head.register_forward_pre_hook(self._keep)

    def _keep(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._into_head = args[0]

    def last_features(self) -> torch.Tensor:
        assert self._into_head is not None
        return self._into_head.flatten(1).float().cpu()

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._model(pixel_values=pixel_values.to(self._model.device, self._model.dtype)).logits

    def weights(self) -> Iterable[memoryview]:
        for name, tensor in sorted(self._model.state_dict().items()):
            yield name.encode()
            # Quantized weights are of classes of their own; as numbers they are like any others.
            plain = tensor if type(tensor) is torch.Tensor else tensor.dequantize()
            yield plain.cpu().flatten().view(torch.uint8).numpy().data


class GraphClassifier(Classifier):
    """A graph that takes `pixel_values` and gives `logits`."""

    def __init__(self, file: Path, device: str, engine: str, precision: str):
        if not file.is_file():
            raise ValueError(f"There is no file {file}.")
        self._graph = open_graph(file, engine, precision, device)
        folder = str(file.parent)
        super().__init__(str(file), load_config(folder), load_image_processor(folder))
        self._file, self.precision = file, precision
        inputs, outputs = self._graph.inputs, self._graph.outputs
        if inputs != {INPUT} or OUTPUT not in outputs:
            raise ValueError(
                f"{file} isn't an image classifier: it takes {', '.join(sorted(inputs))} and gives "
                f"{', '.join(sorted(outputs))}, not {INPUT} and {OUTPUT}."
            )

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        try:
            return torch.from_numpy(self._graph(pixel_values.numpy()))
        except Exception as error:  # the engines' own errors have nothing else in common
            raise ValueError(f"{self.name} can't compute these images: {error}") from error

    def weights(self) -> Iterable[bytes]:
        # Large graphs keep their weights in files beside them, such as model.onnx.data.
        for file in sorted(self._file.parent.glob(f"{escape(self._file.name)}*")):
            with file.open("rb") as opened:
                yield hashlib.file_digest(opened, "sha256").digest()
