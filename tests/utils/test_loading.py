"""Networks with adapters, quantized ones, and revisions. (Broken folders are in tests/commands.)"""

import json
import logging
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, TorchAoConfig, ViTConfig, ViTForImageClassification, pipeline

from refiner_hf import (
    RefinerForImageClassification,
    RefinerForMaskedImageModeling,
    RefinerModel,
)
from refiner_hf.commands.train import main as train
from refiner_hf.export.exported_folder import load_for_export
from refiner_hf.inspection.networks import open_network
from refiner_hf.prediction.classifiers import open_classifier
from refiner_hf.utils.loading import load_classifier, load_config, load_image_processor, load_network

from ..conftest import assert_close, save_with_processor
from ..images import write_folder


IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tiny_model, tmp_path):
    return save_with_processor(tiny_model(), tmp_path / "base")


@pytest.fixture
def adapter(folder, tmp_path):
    """A trained LoRA with a classifier of its own, and the logits that the two give."""
    torch.manual_seed(1)
    options = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(RefinerForImageClassification.from_pretrained(folder), options).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
        logits = adapted(IMAGES).logits
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits


def test_an_adapter_is_its_base_model_with_it(adapter, folder):
    place, logits = adapter
    network = load_classifier(str(place))
    assert type(network) is RefinerForImageClassification and not hasattr(network, "peft_config")
    with torch.no_grad():
        assert_close(network(IMAGES).logits, logits)
        if Version(transformers.__version__) >= Version(
            "5.24"
        ):  # 5.17 leaves out the classifier that the adapter holds
            assert_close(pipeline("image-classification", model=str(place)).model(IMAGES).logits, logits)
        assert_close(load_for_export(str(place))[0](IMAGES).logits, logits)
        assert_close(open_network(str(place)).model(IMAGES).logits, logits)
    with_adapter, alone = open_classifier(str(place)), open_classifier(str(folder))
    assert_close(with_adapter.scores(IMAGES), logits.softmax(-1))
    assert with_adapter.digest() != alone.digest()


def test_an_adapter_with_a_configuration_of_its_own(adapter, folder):
    """The labels that were trained are beside the adapter, if anywhere."""
    place, _ = adapter
    config = load_config(str(folder))
    config.id2label = dict(enumerate("vwxyz"))
    config.save_pretrained(place)
    assert open_classifier(str(place)).labels == list("vwxyz")


def test_the_base_model_needs_no_classifier_where_the_adapter_has_one(adapter, tiny_model, folder):
    place, logits = adapter
    tiny_model().refiner.save_pretrained(folder)
    config = tiny_model().config
    config.save_pretrained(place)
    with torch.no_grad():
        assert_close(load_classifier(str(place))(IMAGES).logits, logits)


def test_damaged_adapters(adapter, folder):
    place, _ = adapter
    tensors = load_file(place / "adapter_model.safetensors")
    for missing, says in (("lora_A", "missing or left over are base_model"), ("classifier", "classifier")):
        name = next(name for name in tensors if missing in name)
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, place / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"doesn't fit its base model: .*{says}"):
            load_classifier(str(place))
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_classifier(str(place))
    content = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="doesn't say which model it adapts"):
        load_classifier(str(place))
    (place / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is damaged"):
        load_classifier(str(place))


def test_quantized_weights_answer_and_are_not_exported(folder, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    options = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = AutoModelForImageClassification.from_pretrained(folder, quantization_config=options)
    quantized.save_pretrained(tmp_path / "int8")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "int8")
    classifier = open_classifier(str(tmp_path / "int8"))
    with torch.no_grad():
        expected = quantized.eval()(IMAGES).logits.softmax(-1)
    assert_close(classifier.scores(IMAGES), expected, 1e-3)
    assert classifier.digest() == open_classifier(str(tmp_path / "int8")).digest()
    assert classifier.digest() != open_classifier(str(folder)).digest()
    with pytest.raises(ValueError, match="is quantized, which ONNX"):
        load_for_export(str(tmp_path / "int8"))


def test_a_base_model_from_weights_with_a_head(folder, tmp_path):
    """What lies outside of the base model may be left over, what lies in it may not."""
    load_network(str(folder), RefinerModel)
    tensors = load_file(folder / "model.safetensors")
    tensors["refiner.layers.7.mlp.fc1.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="don't belong to the network: .*layers.7"):
        load_network(str(folder), RefinerModel)


def test_a_published_vit_may_have_a_pooler_that_its_classifier_never_uses(tmp_path):
    size = dict(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ViTForImageClassification(ViTConfig(**size, intermediate_size=8)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"vit.pooler.dense.weight": torch.zeros(8, 8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_classifier(str(tmp_path)).config.model_type == "vit"


def test_offline_a_name_that_is_not_there():
    for load in (load_config, load_image_processor):
        with pytest.raises(OSError, match="couldn't find them in the cached files|nobody/nothing"):
            load("nobody/nothing")


class TestTraining:
    """Only a training that replaces a head may miss that head's tensors."""

    def train(self, folder, tmp_path, *words):
        photos = write_folder(tmp_path / "photos", per_label=4)
        options = f"--train_dir {photos} --train_val_split 0.4 --output_dir {tmp_path / 'out'}"
        options += " --max_steps 1 --report_to none --use_cpu"
        return train(["--model_name_or_path", str(folder), *options.split(), *words])

    def test_a_base_model_gets_a_new_head(self, tiny_model, tmp_path, caplog):
        logging.getLogger("transformers").propagate = True
        folder = save_with_processor(tiny_model().refiner, tmp_path / "base")
        assert self.train(folder, tmp_path).trained

    def test_after_masked_image_modelling(self, tiny_config, tmp_path):
        folder = save_with_processor(RefinerForMaskedImageModeling(tiny_config()), tmp_path / "base")
        assert self.train(folder, tmp_path).trained

    def test_a_new_dense_head(self, folder, tmp_path):
        assert self.train(folder, tmp_path, "--config_overrides", '{"use_dense_head": true}').trained

    def test_the_same_labels_need_the_head(self, tiny_model, tmp_path):
        model = tiny_model(id2label={0: "blue", 1: "green", 2: "red"}, num_labels=3)
        folder = save_with_processor(model, tmp_path / "base")
        tensors = load_file(folder / "model.safetensors")
        del tensors["classifier.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SystemExit, match="they lack classifier.weight"):
            self.train(folder, tmp_path)
