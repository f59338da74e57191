"""
The output of a model for one fixed picture. `verification.py` runs this file as a program, in a process without this
package, for a model on the Hub:

    python -P fingerprint.py QUESTION_AS_JSON FILE
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image


def fingerprint(
    model: str,
    auto_class: str,
    processed: bool,
    revision: str | None = None,
    remote_code: bool = False,
    base_model: str | None = None,
):
    """
    Everything the model gives for one picture of noise, flattened into one array.

    Args:
        model: folder or Hub name.
        auto_class: of `transformers`, by name.
        processed: whether the picture goes through the model's image processor, or is made of its pixels at once.
        base_model: where `model` is a PEFT adapter, of what.
    """
    options = {"revision": revision or "main", "trust_remote_code": remote_code}
    load = getattr(transformers, auto_class).from_pretrained
    if base_model is None:
        network = load(model, **options)
    else:  # given the adapter's name alone, transformers would look for the base model at the adapter's revision
        network = load(base_model)
        network.load_adapter(model, adapter_kwargs={"revision": options["revision"]})
    processor = None
    if processed:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(model, **options)
        except OSError:
            if base_model is None:
                raise
            processor = transformers.AutoImageProcessor.from_pretrained(base_model)  # the adapter has none of its own
    return fingerprint_of(network, processor)


@torch.no_grad()
def fingerprint_of(network: torch.nn.Module, processor) -> np.ndarray:
    """The same of a model and a processor that are loaded already; without a processor the pixels are noise."""
    config = network.config
    height, width = config.image_height_width
    generator = torch.Generator().manual_seed(0)
    if processor is not None:
        noise = torch.randint(0, 256, (height + 16, width + 32, 3), generator=generator, dtype=torch.uint8)
        pixels = processor(Image.fromarray(noise.numpy()), return_tensors="pt").pixel_values
    else:
        pixels = torch.randn(1, config.num_channels, height, width, generator=generator)
    outputs = network.eval()(pixels, return_dict=False)
    tensors = [part for output in outputs for part in (output if isinstance(output, tuple) else (output,))]
    return torch.cat([tensor.float().flatten() for tensor in tensors]).numpy()


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    if question["remote_code"]:
        sys.modules["refiner_hf"] = None  # from here on importing it fails: the model's own code must do
    else:
        import refiner_hf  # noqa: F401
    np.save(sys.argv[2], fingerprint(**question))
