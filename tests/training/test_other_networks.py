"""Image classifiers of transformers, trained, continued, evaluated and used as Refiners are; with adapters, too."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTImageProcessorPil,
)

from refiner_hf import predict
from refiner_hf.commands import main
from refiner_hf.utils.heads import head_modules
from refiner_hf.utils.loading import load_classifier

from ..conftest import assert_close
from ..encoders import IMAGE, make_encoder
from ..images import write_folder


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos")


def saved(family: str, folder):
    """An encoder without a head, as the Hub has many."""
    make_encoder(family).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def train(model, photos, out, *words: str) -> None:
    begin = ["--model_name_or_path", str(model), "--train_dir", str(photos), "--output_dir", str(out)]
    rest = (
        "--max_steps 6 --per_device_train_batch_size 4 --learning_rate 0.01 --use_cpu --report_to none "
        "--disable_tqdm true --dataloader_num_workers 0"
    )
    main(["train", "fine_tune", *begin, *rest.split(), *words])


def metrics(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_an_encoder_gets_a_head(family, photos, tmp_path):
    train(saved(family, tmp_path / "model"), photos, tmp_path / "out")
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert sorted(trained.config.label2id) == ["blue", "green", "red"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "refiner" not in card.data.tags and "Zhou" not in card.text and card.data.eval_results
    main(
        ["train", "--model_name_or_path", str(tmp_path / "out"), "--validation_dir", str(photos), "--do_eval",
         "--output_dir", str(tmp_path / "again"), "--report_to", "none", "--use_cpu"]
    )  # fmt: skip
    assert metrics(tmp_path / "again")["eval_accuracy"] > 0.9


@pytest.mark.parametrize("labels", [3, 7])
@pytest.mark.parametrize("family", ["vit", "dinov2", "deit"])
def test_a_classifier_of_other_labels(family, labels, photos, tmp_path):
    """As many or not: its head begins anew."""
    model = make_encoder(family, head=True, num_labels=labels)
    with torch.no_grad():
        model.classifier.weight.fill_(100.0)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    train(tmp_path / "model", photos, tmp_path / "out")
    trained = load_classifier(str(tmp_path / "out"))
    assert trained.classifier.weight.shape[0] == 3 and trained.classifier.weight.abs().max() < 10


def test_two_towers_in_one_configuration(photos, tmp_path):
    """SigLIP's classifier has no module for the whole encoder; what its head is shows in what labels change."""
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=100)
    config = SiglipConfig(vision_config=IMAGE, text_config=size, num_labels=5)
    assert head_modules(config) == ["classifier"]
    SiglipForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    train(tmp_path / "model", photos, tmp_path / "out", "--adapter", "refinement")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights[next(name for name in weights if "vision_model" in name and "fc1.weight" in name)]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="they lack vision_model.*fc1.weight"):
        train(tmp_path / "model", photos, tmp_path / "other")


@pytest.mark.parametrize("adapter", ["refinement", "lora"])
def test_adapters(adapter, photos, tmp_path):
    base = saved("vit", tmp_path / "model")
    train(base, photos, tmp_path / "out", "--adapter", adapter, "--max_steps", "20")
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").stat().st_size < 40_000 and not (out / "model.safetensors").exists()
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert metrics(out)["eval_accuracy"] > 0.9
    answers = predict(str(out), [str(photos)], tmp_path / "answers.csv", num_workers=0)
    assert set(answers.labels) == {"red", "green", "blue"}
    # As the card says.
    config = AutoConfig.from_pretrained(out)
    network = AutoModelForImageClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        by_card = PeftModel.from_pretrained(network, out).merge_and_unload().eval()(pixels).logits
        assert_close(load_classifier(str(out))(pixels).logits, by_card, 1e-6)
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and f'"{base}"' in card
    assert ("Zhou" in card) == (adapter == "refinement")


@pytest.mark.parametrize("words", [[], ["--adapter", "refinement"]], ids=["whole", "adapter"])
def test_continues_as_if_it_had_not_stopped(words, photos, tmp_path):
    base = saved("vit", tmp_path / "model")
    save = ["--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "no", "--load_best_model_at_end",
            "false", *words]  # fmt: skip
    train(base, photos, tmp_path / "whole", *save)
    train(base, photos, tmp_path / "parts", *save)
    for file in (tmp_path / "parts").glob("*"):  # as a killed run leaves it
        if file.is_file() and file.name not in ("_data.json", "training_arguments.json"):
            file.unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    train(base, photos, tmp_path / "parts", *save)
    whole, parts = (load_classifier(str(tmp_path / name)).state_dict() for name in ("whole", "parts"))
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_a_refined_model(photos, tmp_path):
    """From the command that refines it to the trained one, its maps, its graph."""
    main(
        ["refine", "--model", str(saved("dinov2", tmp_path / "model")), "--data", str(photos), "--layers", "2",
         "--output_dir", str(tmp_path / "refined")]
    )  # fmt: skip
    train(tmp_path / "refined", photos, tmp_path / "out", "--analysis_images", "4")
    trained = load_classifier(str(tmp_path / "out"))
    assert type(trained).__name__ == "RefinedDinov2ForImageClassification"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2, of which 1 refine their map" in card and "A refined Dinov2 image classifier with 3 labels" in card
    assert (tmp_path / "out" / "analysis").is_dir()
    main(["export", "--model", str(tmp_path / "out"), "--output_dir", str(tmp_path / "graph")])
    labels = []
    for name in ("out", "graph/model.onnx"):
        predict(str(tmp_path / name), [str(photos)], tmp_path / "answers.csv", num_workers=0)
        labels.append([line.rsplit(",", 1)[0] for line in (tmp_path / "answers.csv").read_text().splitlines()])
        (tmp_path / "answers.csv").unlink()
    assert labels[0] == labels[1]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--adapter_options", "{}", "--adapter", "lora", "--adapter_options", '{"rank": 3}'], "rank"),
        (["--adapter", "refinement", "--adapter_options", '{"layers_to_transform": [7]}'], "there is no layer 7"),
        (["--adapter_options", '{"r": 2}'], "without --adapter have no effect"),
        (["--config_overrides", '{"use_dense_head": true}'], "has use_dense_head, which the configuration of"),
    ],
)
def test_refused(words, says, photos, tmp_path, capsys):
    base = saved("vit", tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        train(base, photos, tmp_path / "out", *words)
    assert says in str(stopped.value.code) + capsys.readouterr().err
