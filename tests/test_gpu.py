"""The golden numbers on a GPU, in float32 without TF32. Run with `make test-gpu`; skipped where there is no GPU."""

import pytest
import torch

from refiner_hf import REFINE_IMPLEMENTATIONS
from refiner_hf.conversion.weights import rename_state_dict

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
