"""What records a forward (torch.jit.trace, both ONNX exporters, torch.export) must do for other inputs, too."""

import io

import onnxruntime
import pytest
import torch
from torch import nn

from refiner_hf import RefinerBackbone, RefinerForImageClassification, RefinerForMaskedImageModeling

from .conftest import LAYOUTS, assert_close


class Logits(nn.Module):
    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, pixel_values):
        outputs = self.model(pixel_values, return_dict=True, **self.options)
        return (
            outputs.logits if hasattr(outputs, "logits") else outputs[0][0] if outputs[0] is not None else outputs[1]
        )


def images(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))


NETWORKS = {
    "released": {},
    "every layer": {"attention_types": LAYOUTS["refine_every_layer"]},
    "mixed": {"attention_types": LAYOUTS["mixed"]},
    "patch projection, dense head": {"use_conv_stem": False, "use_dense_head": True},
    "convolution": {"refinement": "convolution"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_batches_of_another_size(network, gradients, tiny_model):
    """torch.jit.trace checks its record by a second one under other gradients: a branch on them is refused."""
    model = Logits(tiny_model(**NETWORKS[network])).eval()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, images(2))
        file = io.BytesIO()
        names = dict(input_names=["pixels"], output_names=["logits"], dynamic_axes={"pixels": {0: "batch"}})
        torch.onnx.export(model, (images(2),), file, dynamo=False, **names)
        exported = torch.export.export(
            model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ).module()  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for count in (1, 2, 5):
            expected = model(images(count))
            assert_close(traced(images(count)), expected, 1e-5, f"traced, {count}")
            assert_close(exported(images(count)), expected, 1e-5, f"exported, {count}")
            (logits,) = session.run(None, {"pixels": images(count).numpy()})
            assert_close(torch.from_numpy(logits), expected, 1e-5, f"TorchScript's ONNX, {count}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [RefinerForImageClassification, RefinerForMaskedImageModeling, RefinerBackbone])
@pytest.mark.parametrize("example", [(16, 16), (24, 16)])
def test_images_of_another_size(example, kind, tiny_config):
    """Also where the example has the model's own size, at which positions needn't be interpolated."""
    torch.manual_seed(0)
    model = Logits(kind(tiny_config()), interpolate_pos_encoding=True).eval()
    rows, columns = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("columns", min=1, max=64)
    dynamic = ({0: torch.export.Dim("batch"), 2: 4 * rows, 3: 4 * columns},)
    exported = torch.export.export(model, (images(2, *example),), dynamic_shapes=dynamic).module()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, *example))
        for size in ((16, 16), (24, 32), (8, 20)):
            expected = model(images(3, *size))
            assert_close(exported(images(3, *size)), expected, 1e-5, f"exported at {size}")
            if kind is not RefinerForMaskedImageModeling:  # its view into patches is recorded for one size
                assert_close(traced(images(3, *size)), expected, 1e-5, f"traced at {size}")


def test_at_its_own_size_a_model_takes_the_very_positions(tiny_model):
    model = tiny_model().eval()
    with torch.no_grad():
        assert torch.equal(model(images(2)).logits, model(images(2), interpolate_pos_encoding=True).logits)
