"""The golden numbers, and looking inside, on a GPU (`make test-gpu`), in float32 without TF32."""

import numpy as np
import pytest
import torch
from PIL import Image

from refiner_hf import REFINE_IMPLEMENTATIONS, RefinerImageProcessor
from refiner_hf.conversion.weights import rename_state_dict
from refiner_hf.inspection.analysis import analyze
from refiner_hf.inspection.attention_views import view_attention
from refiner_hf.inspection.networks import Network

from .conftest import GOLDEN_MODELS, assert_close


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("implementation", ["auto", *REFINE_IMPLEMENTATIONS])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
class TestGoldenOnGpu:
    def test_evaluation(self, golden, name, implementation):
        golden = golden(name)
        model = golden.model().eval().cuda()
        model.set_refine_implementation(implementation)
        with torch.no_grad():
            assert_close(model(golden["pixel_values"].cuda()).logits.cpu(), golden["eval.logits"], 5e-5)

    def test_training(self, golden, name, implementation):
        golden = golden(name)
        target = golden["train.dense_target"] if "train.dense_target" in golden else golden["train.soft_target"]
        model = golden.model().train().cuda()
        model.set_refine_implementation(implementation)
        loss = model(golden["pixel_values"].cuda(), labels=target.cuda()).loss
        loss.backward()
        assert_close(loss.cpu(), golden["train.loss"], 5e-5)
        reference = golden.under("train.grad.")
        largest = max(gradient.abs().max().item() for gradient in reference.values())
        gradients = {key: parameter.grad.cpu() for key, parameter in model.named_parameters()}
        for key, gradient in rename_state_dict(reference).items():
            difference = (gradients[key] - gradient).abs().max().item()
            assert difference <= 2e-4 * gradient.abs().max().item() + 5e-6 * largest, key


def test_looking_inside_on_gpu(tiny_model):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(6)]
    processor = RefinerImageProcessor(size={"height": 16, "width": 16})
    found, sights = {}, {}
    for device in ("cpu", "cuda"):
        network = Network("tiny", tiny_model().eval().to(device), processor)
        found[device] = analyze(network, images, batch_size=4)
        sights[device] = view_attention(network, images[0], [(1, 2)])
    for stage in ("applied", "tokens"):
        for metric, values in found["cpu"][stage].items():
            np.testing.assert_allclose(found["cuda"][stage][metric]["mean"], values["mean"], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found["cuda"]["cka"]["mean"], found["cpu"]["cka"]["mean"], rtol=2e-3, atol=1e-4)
    for ours, theirs in zip(sights["cuda"].layers, sights["cpu"].layers):
        for name, maps in theirs.stages.items():
            np.testing.assert_allclose(ours.stages[name], maps, atol=1e-3 * np.abs(maps).max())
