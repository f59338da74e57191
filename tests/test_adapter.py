"""Refinements as a PEFT adapter."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from refiner_hf import RefinementAdapterConfig, refine
from refiner_hf.attention_refiner import RefinerMapRefinement

from .conftest import assert_close
from .encoders import ENCODERS, disturb, inputs_of, make_encoder, padded_texts, real_tokens


def has_head(family: str) -> bool:
    return "For" in (ENCODERS[family][3] or "")


def answers(family: str, model) -> torch.Tensor:
    inputs = inputs_of(family)
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if has_head(family) else output.last_hidden_state[real_tokens(inputs)]


def adapted(family: str, model=None, **options) -> PeftModel:
    if has_head(family):
        options = {"modules_to_save": ["classifier"]} | options
    model = make_encoder(family, head=has_head(family)) if model is None else model
    return get_peft_model(model, RefinementAdapterConfig(inputs=inputs_of(family), **options))


def train(family: str, model) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    inputs = inputs_of(family)
    for _ in range(2):
        output = model(**inputs)
        (output.logits if has_head(family) else output.last_hidden_state).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("family", ENCODERS)
def test_from_the_start_to_another_process_adapter_name_and_back(family, tmp_path):
    base = make_encoder(family, head=has_head(family))
    base.save_pretrained(tmp_path / "base")
    kind, expected = type(base), answers(family, base)
    model = adapted(family, base)
    assert_close(answers(family, model), expected, 1e-5)
    train(family, model)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned and all(".refinement." in name or ".modules_to_save." in name for name in learned)
    trained = answers(family, model)
    assert (trained - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert_close(answers(family, model), expected, 1e-5)

    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    for options in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter", **options)
        assert torch.equal(answers(family, again.eval()), trained), options
    if not has_head(family):  # a trained head stays, as PEFT has it
        model.unload()
        assert_close(answers(family, base), expected, 1e-5)
    assert not any(isinstance(module, RefinerMapRefinement) for module in model.unload().modules())


def test_running_statistics_are_part_of_it(tmp_path):
    model = adapted("bert")
    train("bert", model)
    saved = get_peft_model_state_dict(model)
    assert sum("running" in name for name in saved) == 2 * 2 * 4
    for name, buffer in model.named_buffers():
        if "running" in name:
            assert torch.equal(saved[name.replace(".adapters.default.", ".adapters.")], buffer)


def test_a_model_of_its_own(tmp_path):
    """`merge_and_unload` gives what `refine` makes: it is saved and loaded without PEFT."""
    model = adapted("bert", layers_to_transform=[1], refinement="convolution")
    disturb(model)
    expected = answers("bert", model)
    with pytest.raises(ValueError, match="can't be merged into weights"):
        model.merge_adapter()
    whole = model.merge_and_unload()
    assert type(whole).__name__ == "RefinedBertForSequenceClassification"
    whole.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and torch.equal(answers("bert", loaded), expected)
    assert loaded.config.refinement_config["modules"]["bert.encoder.layer.0.attention.self"] is None


def test_two_refinements_of_one_model(tmp_path):
    model = adapted("bert", modules_to_save=None)
    disturb(model)
    first = answers("bert", model)
    config = RefinementAdapterConfig(inputs=inputs_of("bert"), layers_to_transform=[0], refinement="expansion")
    model.add_adapter("second", config)
    assert torch.equal(answers("bert", model), first), "it isn't active yet"
    model.set_adapter("second")
    with model.disable_adapter():
        plain = answers("bert", model)
    assert_close(answers("bert", model), plain, 1e-5)
    model.base_model.set_adapter(["default", "second"])
    assert_close(answers("bert", model), first, 1e-5)
    with pytest.raises(ValueError, match="one refinement, not 2"):
        model.merge_and_unload()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(answers("bert", model), first)


def test_beside_lora():
    """As transformers' `add_adapter` does it."""
    model = make_encoder("bert", head=True)
    expected = answers("bert", model)
    lora = LoraConfig(target_modules=["query", "value"], r=2)
    inject_adapter_in_model(lora, model, "low_rank")
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(RefinementAdapterConfig(inputs=inputs_of("bert")), model, "maps")
    assert_close(answers("bert", model), expected, 1e-5)
    train("bert", model)
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {"lora_A" in name for name in learned} == {True, False}
    sizes = {name: len(get_peft_model_state_dict(model, adapter_name=name)) for name in ("low_rank", "maps")}
    assert sizes == {"low_rank": 8, "maps": 2 * (3 + 4 * 5)}


def test_by_transformers_own_functions(tmp_path):
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip("this version of transformers wants a newer PEFT")
    base = make_encoder("bert", head=True)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["query", "value"], r=2), "low_rank")
    model.add_adapter(RefinementAdapterConfig(inputs=inputs_of("bert")), "maps")
    model.set_adapter(["low_rank", "maps"])
    train("bert", model)
    expected = answers("bert", model)
    for name in ("low_rank", "maps"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    again = type(base).from_pretrained(tmp_path / "base")
    for name in ("low_rank", "maps"):
        again.load_adapter(str(tmp_path / name), name)
    again.set_adapter(["low_rank", "maps"])
    assert torch.equal(answers("bert", again.eval()), expected)
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "maps")
    model.set_adapter("maps")
    assert torch.equal(answers("bert", alone), answers("bert", model))


def test_the_stock_trainer(tmp_path):
    model = adapted("vit")
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True,
        report_to="none", gradient_checkpointing=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()
    again = PeftModel.from_pretrained(make_encoder("vit", head=True), tmp_path / "checkpoint-2").eval()
    assert torch.equal(answers("vit", again), answers("vit", model.eval()))
    tracked = [b for name, b in again.named_buffers() if name.endswith("output_norm.num_batches_tracked")]
    assert tracked == [2, 2]


@pytest.mark.parametrize("training", [False, True])
def test_modes_types_and_implementations(training):
    base = make_encoder("vit", head=True).train(training).to(torch.bfloat16)
    inputs = inputs_of("vit", torch.bfloat16)
    model = get_peft_model(base, RefinementAdapterConfig(inputs=inputs))
    refinements = [m for m in model.modules() if isinstance(m, RefinerMapRefinement)]
    assert {m.training for each in refinements for m in each.modules()} == {training}
    assert {p.dtype for each in refinements for p in each.parameters()} == {torch.float32}, "as PEFT trains adapters"
    assert model(**inputs).logits.dtype == torch.bfloat16
    model.set_refine_implementation("eager")
    assert {each.config.refine_implementation for each in refinements} == {"eager"}


def test_padding(tmp_path):
    """An example's answer is the same alone and padded."""
    model = adapted("bert").double()
    disturb(model)
    model.eval()
    alone = model(**padded_texts(4, numbers=(1,))).logits
    assert_close(model(**padded_texts(17)).logits[1:2], alone, 1e-12)


def test_a_copy_is_whole():
    model = adapted("vit")
    disturb(model)
    twin = copy.deepcopy(model)
    disturb(model.base_model)
    assert not torch.equal(answers("vit", twin), answers("vit", model))


class TestRefused:
    def test_without_inputs(self):
        model = make_encoder("vit")
        with pytest.raises(ValueError, match="give RefinementAdapterConfig some as inputs"):
            get_peft_model(model, RefinementAdapterConfig())
        assert model.config._attn_implementation == "sdpa"

    def test_what_goes_wrong_leaves_the_model_as_it_was(self):
        model = make_encoder("vit")
        with pytest.raises(ValueError, match="aren't finite"):
            get_peft_model(
                model, RefinementAdapterConfig(inputs={"pixel_values": torch.full((1, 3, 32, 32), torch.inf)})
            )
        assert model.config._attn_implementation == "sdpa"
        assert not any(hasattr(module, "refinement") for module in model.modules())
        with pytest.raises(ValueError, match="there is no layer 5"):
            get_peft_model(model, RefinementAdapterConfig(inputs=inputs_of("vit"), layers_to_transform=[5]))
        with pytest.raises(ValueError, match="refinement is 'blur'"):
            get_peft_model(model, RefinementAdapterConfig(inputs=inputs_of("vit"), refinement="blur"))

    def test_on_another_class(self, tmp_path):
        adapted("bert", modules_to_save=None).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="refines bert.encoder.*a BertModel doesn't have.*auto_mapping"):
            PeftModel.from_pretrained(make_encoder("bert"), tmp_path)

    def test_a_refined_model(self):
        model = refine(make_encoder("vit"), inputs_of("vit"))
        with pytest.raises(ValueError, match="refined already"):
            get_peft_model(model, RefinementAdapterConfig(inputs=inputs_of("vit")))

    def test_a_file_that_lacks_a_statistic(self, tmp_path):
        """PEFT itself warns only; commands of this package refuse it."""
        from safetensors.torch import load_file, save_file

        from refiner_hf.utils.loading import load_classifier

        make_encoder("vit", head=True).save_pretrained(tmp_path / "base")
        base = type(make_encoder("vit", head=True)).from_pretrained(tmp_path / "base")
        adapted("vit", base).save_pretrained(tmp_path / "adapter")
        assert type(load_classifier(str(tmp_path / "adapter"))).__name__ == "RefinedViTForImageClassification"
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors[next(name for name in tensors if name.endswith("output_norm.running_var"))]
        save_file(tensors, file)
        with pytest.raises(ValueError, match="missing or left over are .*running_var"):
            load_classifier(str(tmp_path / "adapter"))


class TestOtherProcesses:
    @pytest.fixture
    def folder(self, tmp_path):
        make_encoder("bert", head=True).save_pretrained(tmp_path / "base")
        model = adapted("bert", type(make_encoder("bert", head=True)).from_pretrained(tmp_path / "base"))
        disturb(model)
        model.save_pretrained(tmp_path / "adapter")
        torch.save(inputs_of("bert"), tmp_path / "inputs.pt")
        self.expected = answers("bert", model)
        return tmp_path

    @pytest.mark.parametrize("knows", [True, False])
    def test_loads_it_or_stops(self, folder, knows):
        code = (
            f"import sys, torch{', refiner_hf' if knows else ''}\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForSequenceClassification\n"
            "folder = sys.argv[1]\n"
            "base = AutoModelForSequenceClassification.from_pretrained(folder + '/base')\n"
            "model = PeftModel.from_pretrained(base, folder + '/adapter').eval()\n"
            "torch.save(model(**torch.load(folder + '/inputs.pt')).logits.detach(), folder + '/answer.pt')\n"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if knows:
            assert done.returncode == 0, done.stderr
            assert torch.equal(torch.load(folder / "answer.pt"), self.expected)
        else:
            assert done.returncode != 0 and "REFINEMENT" in done.stderr

    def test_what_is_saved(self, folder):
        content = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert content["peft_type"] == "REFINEMENT" and content["modules_to_save"] == ["classifier"]
        sizes = {"num_attention_heads": 4, "hidden_size": 32}
        assert content["modules"] == {f"bert.encoder.layer.{i}.attention.self": sizes for i in (0, 1)}
        assert not {"inputs", "processing_class"} & content.keys()
