"""Code that a saved configuration names is beside it, or isn't named, whichever way it was saved."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

from refiner_hf import RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.hub.code import AUTO_MAP, CODE_FILES, PROCESSOR_AUTO_MAP, add_code
from refiner_hf.hub.publish import publish_folder


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model with its code."""
    path = tmp_path / "with_code"
    tiny_model().save_pretrained(path)
    RefinerImageProcessor(size={"height": 16, "width": 16}, crop_pct=0.8).save_pretrained(path)
    add_code(path)
    return path


def maps_in(folder) -> list[dict]:
    files = [folder / name for name in ("config.json", "preprocessor_config.json")]
    return [json.loads(file.read_text()).get("auto_map") for file in files if file.exists()]


class TestWithThisPackage:
    """The classes are this package's own: others install it, and the names go."""

    def test_saved(self, folder, tmp_path):
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(model) is RefinerForImageClassification and type(processor) is RefinerImageProcessor
        assert model.config.auto_map and processor.auto_map
        model.save_pretrained(tmp_path / "other")
        processor.save_pretrained(tmp_path / "other")
        AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "config")
        assert maps_in(tmp_path / "other") == [None, None] and maps_in(tmp_path / "config") == [None]
        AutoModelForImageClassification.from_pretrained(tmp_path / "other")
        assert model.config.auto_map, "what is in memory stays"

    def test_saved_where_the_code_is(self, folder):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)
        assert maps_in(folder) == [AUTO_MAP, PROCESSOR_AUTO_MAP]

    def test_the_stock_trainer(self, folder, tmp_path):
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        data = [{"pixel_values": torch.rand(3, 16, 16), "labels": 1}] * 4
        args = TrainingArguments(tmp_path / "out", max_steps=1, use_cpu=True, report_to="none")
        trainer = Trainer(model, args, train_dataset=data, processing_class=processor)
        trainer.train()
        trainer.save_model(tmp_path / "trained")
        assert maps_in(tmp_path / "trained") == [None, None]

    def test_a_merged_lora(self, folder, tmp_path):
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        merged = get_peft_model(model, LoraConfig(target_modules=["v_proj"])).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert maps_in(tmp_path / "merged") == [None]

    def test_on_the_hub(self, hub, folder):
        hub.add_user("alice", {})
        token = hub.add_token("alice")
        publish_folder(folder, "alice/with-code", token=token)
        model = AutoModelForImageClassification.from_pretrained("alice/with-code", trust_remote_code=True)
        model.push_to_hub("alice/other", token=token)
        assert "auto_map" not in json.loads(hub.repositories["alice/other"].files()["config.json"])
        assert type(AutoModelForImageClassification.from_pretrained("alice/other")) is RefinerForImageClassification


WITHOUT = """
import sys
sys.modules["refiner_hf"] = None  # from here on it can't be imported
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
source, out = sys.argv[1:]
"""
SAVE = """
model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
model.save_pretrained(out)
processor.save_pretrained(out)
torch.save(model.eval()(torch.ones(1, 3, 16, 16)).logits, out + "/logits.pt")
"""
LOAD = """
model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
picture = Image.new("RGB", (50, 30), (10, 200, 30))
picture.putpixel((20, 10), (255, 255, 255))
pixels = {}
for backend in ("torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True, backend=backend)
    print(backend, type(processor).__name__)
    pixels[backend] = torch.as_tensor(processor(picture, return_tensors="pt").pixel_values)
print("default", type(AutoImageProcessor.from_pretrained(source, trust_remote_code=True)).__name__)
torch.save((model.eval()(torch.ones(1, 3, 16, 16)).logits, pixels), out)
"""
SAVE_CONFIG = "AutoConfig.from_pretrained(source, trust_remote_code=True).save_pretrained(out)"
LOAD_CONFIG = "print(type(AutoConfig.from_pretrained(source, trust_remote_code=True)).__name__)"


def run(program: str, *words, cwd) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT + program, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestWithoutThisPackage:
    """The classes are of the repository's code, which is copied along: others can load what they save."""

    def test_saved_and_loaded_by_others(self, folder, tmp_path):
        saved, answer = tmp_path / "saved", tmp_path / "answer.pt"
        run(SAVE, folder, saved, cwd=tmp_path)
        assert {file.name for file in saved.glob("*.py")} == set(CODE_FILES)
        assert maps_in(saved) == [AUTO_MAP, PROCESSOR_AUTO_MAP]
        for file in folder.glob("*.py"):  # nothing is taken from where it came
            file.unlink()
        (folder / "config.json").unlink()
        said = run(LOAD, saved, answer, cwd=tmp_path)
        assert "torchvision RefinerImageProcessor\n" in said and "pil RefinerImageProcessorPil\n" in said
        assert "default RefinerImageProcessor\n" in said
        logits, pixels = torch.load(answer)
        assert torch.equal(logits, torch.load(saved / "logits.pt"))

        picture = Image.new("RGB", (50, 30), (10, 200, 30))
        picture.putpixel((20, 10), (255, 255, 255))
        for backend in ("torchvision", "pil"):
            ours = AutoImageProcessor.from_pretrained(saved, backend=backend)
            assert torch.equal(torch.as_tensor(ours(picture, return_tensors="pt").pixel_values), pixels[backend])
        assert not torch.equal(pixels["torchvision"], pixels["pil"]), "else it would not show which one it was"

    def test_a_configuration_alone(self, folder, tmp_path):
        run(SAVE_CONFIG, folder, tmp_path / "saved", cwd=tmp_path)
        assert "RefinerConfig" in run(LOAD_CONFIG, tmp_path / "saved", "-", cwd=tmp_path)
        (named,) = maps_in(tmp_path / "saved")
        assert named["AutoConfig"] == AUTO_MAP["AutoConfig"]
        for name in named.values():
            assert (tmp_path / "saved" / f"{name.split('.')[0]}.py").exists()
