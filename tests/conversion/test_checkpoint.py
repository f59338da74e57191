"""Reference checkpoints: what converts gives the reference's logits; what doesn't is named, and leaves nothing."""

import argparse
import copy
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModelForImageClassification

from refiner_hf import RefinerConfig, RefinerForImageClassification
from refiner_hf.cards.paper import published_network
from refiner_hf.commands.convert import main
from refiner_hf.conversion.checkpoint import convert_checkpoint, load_reference_file, select_state_dict
from refiner_hf.conversion.weights import read_config, rename_state_dict
from refiner_hf.hub.code import CODE_FILES

from ..conftest import GOLDEN, GOLDEN_MODELS, assert_close, load_json
from ..naive_reference import naive_logits, random_reference
from ..parsed_card import Card


CHECKPOINT = GOLDEN / "released_checkpoint.pth.tar"


@pytest.fixture
def save(tmp_path):
    def save(content, name="checkpoint.pth.tar"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def assert_nothing_left(folder):
    assert [p.name for p in folder.iterdir() if "out" in p.name] == []


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_naive_reference_equals_golden(golden, name):
    golden = golden(name)
    heads = int(golden.settings["heads"])
    assert_close(naive_logits(golden.under("state_dict."), golden["pixel_values"], heads), golden["eval.logits"])


@pytest.mark.parametrize("use_ema", [False, True])
def test_golden_checkpoint(golden, tmp_path, use_ema):
    golden = golden("released")
    convert_checkpoint(CHECKPOINT, tmp_path / "out", use_ema=use_ema, with_code=use_ema)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(golden["pixel_values"]).logits
    if not use_ema:
        assert_close(logits, golden["eval.logits"])
    else:
        averaged = load_reference_file(CHECKPOINT)["state_dict_ema"]
        assert_close(logits, naive_logits(averaged, golden["pixel_values"], 4))
        assert not torch.allclose(logits, golden["eval.logits"], atol=1e-3)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": 48, "width": 48}
    card = Card((tmp_path / "out" / "README.md").read_bytes())
    said = card.sections["How it was made"]
    assert "released_checkpoint.pth.tar" in said and ("averaged" in said, "raw" in said) == (use_ema, not use_ema)
    assert list(card.sections) == [
        "Summary", "How to use it", "The network", "How it was made", "Limits", "Citation"
    ], "no results: this is none of the paper's networks"  # fmt: skip
    assert ("custom_code" in card.data["tags"]) == ("trust_remote_code=True" in card.code) == use_ema
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(CODE_FILES) & there == (set(CODE_FILES) if use_ema else set())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


VARIANTS = {
    "small network": dict(layers=4, width=48, heads=4, image_size=32, patch_size=8, labels=10),
    "own maps, ratio 6": dict(
        layers=2, width=48, heads=4, image_size=32, patch_size=8, labels=10, types=("own",), ratio=6
    ),
    "ratio 1": dict(layers=2, width=48, heads=4, image_size=32, patch_size=8, labels=10, ratio=1),
    "convolution only": dict(
        layers=2, width=48, heads=4, image_size=32, patch_size=8, labels=10, convolution_only=True
    ),
    "no stem, no dense head": dict(
        layers=2, width=48, heads=4, image_size=32, patch_size=8, labels=10, stem=False, dense=False
    ),
    "another patch size": dict(layers=2, width=24, heads=2, image_size=42, patch_size=14, labels=3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_read_from_names_and_shapes(variant, save, tmp_path):
    settings = VARIANTS[variant]
    reference = random_reference(**settings)
    model = convert_checkpoint(save(reference), tmp_path / "out")
    images = torch.randn(2, 3, settings["image_size"], settings["image_size"])
    with torch.no_grad():
        assert_close(model(images).logits, naive_logits(reference, images, settings["heads"]), 1e-5)
    config = model.config
    assert config.image_size == settings["image_size"] and config.patch_size == settings["patch_size"]
    assert config.num_labels == settings["labels"] and config.num_attention_heads == settings["heads"]
    assert config.use_dense_head == settings.get("dense", True)
    assert config.use_conv_stem == settings.get("stem", True)


SMALL = dict(layers=16, width=384, heads=12)
MEDIUM = dict(layers=32, width=420, heads=12)
LARGE = dict(layers=32, width=512, heads=16)


@pytest.mark.parametrize(
    "size, image_size, crop_pct",
    [
        (SMALL, 224, 0.9),
        pytest.param(SMALL, 384, 0.9, marks=pytest.mark.slow),
        pytest.param(MEDIUM, 224, 1.0, marks=pytest.mark.slow),
        pytest.param(MEDIUM, 384, 1.0, marks=pytest.mark.slow),
        pytest.param(LARGE, 224, 1.13, marks=pytest.mark.slow),
        pytest.param(LARGE, 384, 1.13, marks=pytest.mark.slow),
        pytest.param(LARGE, 448, 1.13, marks=pytest.mark.slow),
    ],
    ids=["S-224", "S-384", "M-224", "M-384", "L-224", "L-384", "L-448"],
)
def test_published_sizes(size, image_size, crop_pct, save, tmp_path):
    reference = random_reference(**size, image_size=image_size)
    wrapped = {
        "state_dict": {f"module.{k}": v for k, v in reference.items()},
        "args": argparse.Namespace(drop_path=0.2),
    }
    model = convert_checkpoint(save(wrapped), tmp_path / "out")
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(images).logits - naive_logits(reference, images, size["heads"])).abs().max().item()
    print(f"largest difference of the logits: {difference:.2e}")
    assert difference < 1e-4
    assert model.config.drop_path_rate == 0.2
    assert model.config.id2label[0] == "tench, Tinca tinca" and len(set(model.config.id2label.values())) == 1000
    assert load_json(tmp_path / "out" / "preprocessor_config.json")["crop_pct"] == crop_pct
    card = ModelCard.load(tmp_path / "out" / "README.md")
    letter, published = {384: ("S", "83.6"), 420: ("M", "84.6"), 512: ("L", "84.9")}[model.config.hidden_size]
    assert f"The network is Refiner-{letter}'s." in card.text and f"| 224 x 224 | {published} |" in card.text
    assert "**as published**" in card.text and "Accuracy was not measured after the conversion" in card.text
    assert card.data.eval_results is None  # a published number is no result of these weights


class TestWhatDoesNotConvert:
    def convert(self, content, save, tmp_path, **kwargs):
        checkpoint = save(content)
        with pytest.raises((ValueError, OSError)) as error:
            convert_checkpoint(checkpoint, tmp_path / "out", **kwargs)
        assert_nothing_left(tmp_path)
        return str(error.value)

    @pytest.fixture
    def reference(self):
        return random_reference(**VARIANTS["small network"])

    def test_missing(self, reference, save, tmp_path):
        del reference["blocks.2.norm2.bias"], reference["patch_embed.bn2.running_var"]
        said = self.convert(reference, save, tmp_path)
        assert "layers.2.layernorm_after.bias" in said and "convolution2_norm.running_var" in said

    def test_missing_where_the_architecture_is_read(self, reference, save, tmp_path):
        del reference["pos_embed"]
        assert "pos_embed" in self.convert(reference, save, tmp_path)

    def test_missing_layer(self, reference, save, tmp_path):
        reference = {k: v for k, v in reference.items() if not k.startswith("blocks.1.")}
        assert "layers [1]" in self.convert(reference, save, tmp_path)

    def test_unknown(self, reference, save, tmp_path):
        reference["blocks.0.attn.relative_bias"] = torch.zeros(3)
        assert "blocks.0.attn.relative_bias" in self.convert(reference, save, tmp_path)

    def test_misshapen(self, reference, save, tmp_path):
        reference["blocks.3.mlp.fc2.weight"] = torch.zeros(48, 100)
        assert "layers.3.mlp.fc2.weight has shape (48, 100), expected (48, 144)" in self.convert(
            reference, save, tmp_path
        )

    def test_misshapen_projection(self, reference, save, tmp_path):
        reference["blocks.0.attn.qkv.weight"] = torch.zeros(100, 48)
        assert "blocks.0.attn.qkv.weight" in self.convert(reference, save, tmp_path)

    def test_not_a_square_grid(self, reference, save, tmp_path):
        reference["pos_embed"] = torch.zeros(1, 1 + 15, 48)
        assert "15 patches" in self.convert(reference, save, tmp_path)

    def test_heads_of_a_network_without_refinement_are_asked_for(self, save, tmp_path):
        reference = random_reference(**{**VARIANTS["small network"], "types": ("plain",)})
        assert "--num_attention_heads" in self.convert(reference, save, tmp_path)
        images = torch.randn(1, 3, 32, 32)
        model = convert_checkpoint(save(reference), tmp_path / "out", num_attention_heads=4)
        with torch.no_grad():
            assert_close(model(images).logits, naive_logits(reference, images, 4))

    def test_heads_that_contradict_the_file(self, reference, save, tmp_path):
        assert "4 attention heads, not 6" in self.convert(reference, save, tmp_path, num_attention_heads=6)

    def test_no_averaged_weights(self, reference, save, tmp_path):
        assert "state_dict_ema" in self.convert({"state_dict": reference}, save, tmp_path, use_ema=True)

    def test_another_networks_weights(self, save, tmp_path):
        assert "isn't a reference Refiner" in self.convert(
            {"blocks.0.weight": torch.zeros(2), "fc.weight": torch.zeros(2)}, save, tmp_path
        )

    def test_not_a_state_dict(self, save, tmp_path):
        assert "no 'state_dict'" in self.convert({"epoch": 3}, save, tmp_path)
        assert "list" in self.convert([1, 2], save, tmp_path)

    def test_truncated_file(self, tmp_path):
        data = CHECKPOINT.read_bytes()
        (tmp_path / "half.pth.tar").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="half.pth.tar"):
            convert_checkpoint(tmp_path / "half.pth.tar", tmp_path / "out")
        assert_nothing_left(tmp_path)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(ValueError, match="no file"):
            convert_checkpoint(tmp_path / "none.pth", tmp_path / "out")

    def test_a_file_that_would_run_code(self, tmp_path, save):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        said = self.convert({"state_dict": {}, "args": Evil()}, save, tmp_path)
        assert "safety" in said and "system" in said and not (tmp_path / "ran").exists()

    def test_output_folder_in_use(self, reference, save, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("dear")
        with pytest.raises(FileExistsError, match="out"):
            convert_checkpoint(save(reference), tmp_path / "out")
        assert (tmp_path / "out" / "thesis.txt").read_text() == "dear"

    def test_failure_while_writing(self, reference, save, tmp_path, monkeypatch):
        from refiner_hf.conversion import checkpoint

        def fail(*args):
            raise OSError("disk full")

        monkeypatch.setattr(checkpoint, "check_same_logits", fail)
        assert "disk full" in self.convert(reference, save, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth.tar"]

    def test_what_was_saved_answers_otherwise(self, reference, save, tmp_path, monkeypatch):
        write = RefinerForImageClassification.save_pretrained

        def spoil(model, folder):
            model = copy.deepcopy(model)
            torch.nn.init.constant_(model.classifier.bias, 0.1)
            write(model, folder)

        monkeypatch.setattr(RefinerForImageClassification, "save_pretrained", spoil)
        with pytest.raises(RuntimeError, match="The saved model, loaded again, answers differently: by 0"):
            convert_checkpoint(save(reference), tmp_path / "out")
        assert_nothing_left(tmp_path)


def test_crop_of_a_published_network(tmp_path, monkeypatch):
    """As of Refiner-L, whose own conversion takes minutes."""
    published = published_network(RefinerConfig.large())
    for module in ("conversion.checkpoint", "cards.conversion"):
        monkeypatch.setattr(f"refiner_hf.{module}.published_network", lambda config: published)
    convert_checkpoint(CHECKPOINT, tmp_path / "out")
    assert load_json(tmp_path / "out" / "preprocessor_config.json")["crop_pct"] == 1.13
    assert "**as published**" in Card((tmp_path / "out" / "README.md").read_bytes()).sections["Results"]


def test_state_dict_choices():
    weights, averaged = {"module.a": torch.zeros(1)}, {"a": torch.ones(1)}
    content = {"state_dict": weights, "state_dict_ema": averaged}
    assert select_state_dict(content, False) == {"a": weights["module.a"]}
    assert select_state_dict(content, True) == averaged
    assert select_state_dict(weights, False) == {"a": weights["module.a"]}


def test_reading_is_deterministic():
    reference = random_reference(**VARIANTS["ratio 1"])
    assert read_config(reference).expansion_ratio == 1
    assert rename_state_dict(reference).keys() == rename_state_dict(dict(reversed(reference.items()))).keys()


def test_command_line(tmp_path, capsys):
    main(["--checkpoint", str(CHECKPOINT), "--output_dir", str(tmp_path / "out"), "--crop_pct", "1.0"])
    assert "4 layers of width 48, 4 heads, 48x48 pixels, 10 labels, dense head: yes" in capsys.readouterr().out
    assert load_json(tmp_path / "out" / "preprocessor_config.json")["crop_pct"] == 1.0
    with pytest.raises(SystemExit, match="Error: .*out"):
        main(["--checkpoint", str(CHECKPOINT), "--output_dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "refiner_hf", "convert", "--checkpoint", str(CHECKPOINT)]
    subprocess.run([*command, "--output_dir", str(tmp_path / "out")], check=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
