"""The package computes the reference's numbers: outputs, maps, gradients, buffers, in evaluation and training."""

import pytest
import torch

from refiner_hf import REFINE_IMPLEMENTATIONS, RefinerConfig, modeling_refiner
from refiner_hf.conversion.weights import rename_state_dict
from refiner_hf.modeling_refiner import RefinerAttention
from refiner_hf.refinements_refiner import make_refinement

from .conftest import GOLDEN_MODELS, assert_close


def run(model, images, **kwargs):
    """The model's outputs, and the map that each layer passes on."""
    passed_on = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: passed_on.append(output[2]))
        for module in model.modules()
        if isinstance(module, RefinerAttention)
    ]
    outputs = model(images, output_hidden_states=True, output_attentions=True, **kwargs)
    for hook in hooks:
        hook.remove()
    return outputs, passed_on


def target(golden):
    return golden["train.dense_target"] if "train.dense_target" in golden else golden["train.soft_target"]


def assert_layers(golden, phase, outputs, passed_on):
    for layer, attention_map in enumerate(passed_on):
        assert_close(outputs.hidden_states[layer + 1], golden[f"{phase}.hidden_states.{layer}"], what=f"state {layer}")
        assert_close(attention_map, golden[f"{phase}.attention_maps_passed_on.{layer}"], what=f"map {layer}")


@pytest.mark.parametrize("implementation", ["auto", *REFINE_IMPLEMENTATIONS])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
class TestModels:
    def test_evaluation(self, golden, name, implementation):
        golden = golden(name)
        model = golden.model().eval()
        model.set_refine_implementation(implementation)
        with torch.no_grad():
            outputs, passed_on = run(model, golden["pixel_values"])
        assert_close(outputs.logits, golden["eval.logits"])
        assert_layers(golden, "eval", outputs, passed_on)
        assert len(outputs.attentions) == len(passed_on)

    def test_training(self, golden, name, implementation):
        golden = golden(name)
        model = golden.model().train()
        model.set_refine_implementation(implementation)
        outputs, passed_on = run(model, golden["pixel_values"], labels=target(golden))
        assert_close(outputs.logits, golden["train.cls_logits"])
        assert_layers(golden, "train", outputs, passed_on)
        assert_close(outputs.loss, golden["train.loss"])
        if "train.patch_logits" in golden:
            assert_close(outputs.patch_logits, golden["train.patch_logits"])
        else:
            assert outputs.patch_logits is None

        outputs.loss.backward()
        reference = golden.under("train.grad.")
        expected = rename_state_dict(reference)
        largest = max(gradient.abs().max().item() for gradient in reference.values())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            difference = (gradients[key] - gradient).abs().max().item()
            assert difference <= 5e-5 * gradient.abs().max().item() + 1e-6 * largest, key

        buffers = golden.under("train.buffers_after_one_forward.")
        if buffers:
            # The names need the class token's width to be read.
            expected = rename_state_dict({"cls_token": golden["state_dict.cls_token"], **buffers})
            expected.pop("refiner.embeddings.cls_token")
            actual = dict(model.named_buffers())
            assert actual.keys() == expected.keys()
            for key, buffer in expected.items():
                assert_close(actual[key], buffer, what=key)

    def test_cosine_regularizer(self, golden, name, implementation):
        golden = golden(name)
        model = golden.model(cosine_regularizer_weight=0.1, cosine_regularizer_repeated_pairs=True).train()
        model.set_refine_implementation(implementation)
        loss = model(golden["pixel_values"], labels=target(golden)).loss
        assert_close(loss, golden["cos_reg.loss_classification_plus_0.1_cosine"])


@pytest.mark.parametrize("name", ["released", "refine_every_layer"])
def test_token_mixing(golden, name, monkeypatch):
    golden = golden(name)
    top, left, bottom, right = golden["mix_token.box_row0_col0_row1_col1"].tolist()
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    assert mask.any() and not mask.all()
    monkeypatch.setattr(modeling_refiner, "sample_mixing_mask", lambda grid, device: mask)
    model = golden.model(token_mixing=True).train()
    outputs = model(golden["pixel_values"], labels=golden["train.dense_target"])
    assert_close(outputs.logits, golden["mix_token.cls_logits"])
    assert_close(outputs.patch_logits, golden["mix_token.patch_logits"])
    assert_close(outputs.loss, golden["mix_token.loss"])


OPS = {
    "conv_expand_r1_k3": dict(expansion_ratio=1),
    "conv_expand_r2_k5": dict(expansion_ratio=2, refinement_kernel_size=5),
    "conv_expand_r3_k3": dict(expansion_ratio=3),
    "conv_expand_r6_k3": dict(expansion_ratio=6),
    "conv_only_k3": dict(refinement="convolution"),
}
OP_NAMES = {
    "conv_exp": "expansion",
    "bn1": "expansion_norm",
    "depth_sep_conv": "local_attention",
    "bn2": "local_attention_norm",
    "conv_pro": "reduction",
    "bn3": "reduction_norm",
    "conv": "convolution",
}


def op_names(tensors):
    return {f"{OP_NAMES[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", OPS)
class TestRefinementAlone:
    """The op without its output norm."""

    def module(self, golden, name):
        golden = golden("distributed_local_attention")
        config = RefinerConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=4, **OPS[name])
        module = make_refinement(config)
        result = module.load_state_dict(op_names(golden.under(f"{name}.state_dict.")), strict=False)
        assert not result.unexpected_keys
        assert all(key.startswith("output_norm.") for key in result.missing_keys)
        return golden, module

    def test_evaluation(self, golden, name):
        golden, module = self.module(golden, name)
        output = module.eval().refine(golden[f"{name}.maps"])
        assert_close(output, golden[f"{name}.eval.output"])

    def test_training(self, golden, name):
        golden, module = self.module(golden, name)
        maps = golden[f"{name}.maps"].clone().requires_grad_()
        output = module.train().refine(maps)
        assert_close(output, golden[f"{name}.train.output"])
        output.backward(golden[f"{name}.train.output_grad"])
        assert_close(maps.grad, golden[f"{name}.train.maps_grad"], 5e-5)
        gradients = {key: p.grad for key, p in module.named_parameters() if not key.startswith("output_norm")}
        expected = op_names(golden.under(f"{name}.train.grad."))
        assert gradients.keys() == expected.keys()
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        for key, gradient in expected.items():
            difference = (gradients[key] - gradient).abs().max().item()
            assert difference <= 5e-5 * gradient.abs().max().item() + 1e-6 * largest, key
        buffers = {key: b for key, b in module.named_buffers() if not key.startswith("output_norm")}
        expected = op_names(golden.under(f"{name}.train.buffers_after_one_forward."))
        assert buffers.keys() == expected.keys()
        for key, buffer in expected.items():
            assert_close(buffers[key], buffer, what=key)
