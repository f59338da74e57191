"""
Whether two forms of a network answer alike: converted, exported or published, and the one that it was made of.

This file is also run as a program, in a process without this package, for a model on the Hub:

    python -P same_answers.py QUESTION_AS_JSON FILE
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image


def noise_of(shape: tuple[int, int, int], images: int = 1) -> torch.Tensor:
    """Images of noise, (images, channels, height, width), the same ones at each call."""
    generator = torch.Generator().manual_seed(images)
    return torch.randn(images, *shape, generator=generator)


def check_same_answers(expected, actual, tolerance: float, what: str) -> float:
    """
    Args:
        expected, actual (`torch.Tensor` or `np.ndarray`): the answers of both.
        tolerance (`float`): how much they may differ; where the largest answer is above 1, this share of it.
        what (`str`): gave the actual answers, for the error.

    Returns:
        `float`: the largest difference.

    Raises:
        `RuntimeError`: they differ by more, or one isn't finite.
    """
    expected, actual = (np.asarray(answers) for answers in (expected, actual))
    if actual.shape != expected.shape:
        raise RuntimeError(f"{what} gives {actual.shape} numbers where {expected.shape} were expected.")
    difference, largest = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
    if not difference <= tolerance * max(1.0, largest):
        raise RuntimeError(f"{what} answers differently: by {difference:g}, where the largest number is {largest:g}.")
    return difference


@torch.no_grad()
def check_same_logits(model, loaded, shape: tuple[int, int, int], tolerance: float) -> None:
    """
    Args:
        shape: channels, height and width of an image.

    Raises:
        `RuntimeError`: a model that was loaded again from disk answers otherwise than the one that it was made of.
    """
    pixels = noise_of(shape)
    expected, actual = model.eval()(pixels).logits, loaded.eval()(pixels).logits
    check_same_answers(expected, actual, tolerance, "The saved model, loaded again,")


def fingerprint(
    model: str,
    auto_class: str,
    processed: bool,
    shape: tuple[int, int, int],
    revision: str | None = None,
    remote_code: bool = False,
    base_model: str | None = None,
) -> np.ndarray:
    """
    Everything the model gives for one picture of noise, flattened into one array.

    Args:
        model: folder or Hub name.
        auto_class: of `transformers`, by name.
        processed: whether the picture goes through the model's image processor, or is made of its pixels at once.
        shape: channels, height and width of an image.
        base_model: where `model` is a PEFT adapter, of what.
    """
    options = {"revision": revision or "main", "trust_remote_code": remote_code}
    load = getattr(transformers, auto_class).from_pretrained
    if base_model is None:
        network = load(model, **options)
    else:
        network = _adapted(load, model, base_model, revision or "main")
    processor = None
    if processed:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(model, **options)
        except OSError:
            if base_model is None:
                raise
            processor = transformers.AutoImageProcessor.from_pretrained(base_model)  # the adapter has none of its own
    return fingerprint_of(network, processor, shape)


def _adapted(load, adapter: str, base_model: str, revision: str):
    """The base model, with the adapter's labels where it says them, and the adapter in it."""
    from peft import PeftModel

    labels = {}
    try:
        config = transformers.AutoConfig.from_pretrained(adapter, revision=revision)
        labels = {"config": config, "ignore_mismatched_sizes": True}
    except (OSError, ValueError):  # it has no configuration of its own
        pass
    network = load(base_model, **labels)
    return PeftModel.from_pretrained(network, adapter, revision=revision).merge_and_unload()


@torch.no_grad()
def fingerprint_of(network, processor, shape: tuple[int, int, int]) -> np.ndarray:
    """The same of a model and a processor that are loaded already; without a processor the pixels are noise."""
    if processor is not None:
        _, height, width = shape
        generator = torch.Generator().manual_seed(0)
        picture = torch.randint(0, 256, (height + 16, width + 32, 3), generator=generator, dtype=torch.uint8)
        pixels = processor(Image.fromarray(picture.numpy()), return_tensors="pt").pixel_values
    else:
        pixels = noise_of(shape)
    outputs = network.eval()(pixels, return_dict=False)
    tensors = [part for output in outputs for part in (output if isinstance(output, tuple) else (output,))]
    return torch.cat([tensor.float().flatten() for tensor in tensors]).numpy()


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    if question["remote_code"]:
        sys.modules["refiner_hf"] = None  # type: ignore[assignment]  # from here on importing it fails: the model's own code must do
    else:
        import refiner_hf  # noqa: F401
    np.save(sys.argv[2], fingerprint(**question))
