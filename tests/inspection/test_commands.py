import json

import numpy as np
import pytest
from PIL import Image
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from refiner_hf.commands.analyze import main as analyze
from refiner_hf.commands.visualize import main as visualize

from ..conftest import LAYOUTS, save_with_processor
from ..images import write_folder


@pytest.fixture
def refiner(tiny_model, tmp_path):
    def save(name="refiner", **overrides) -> str:
        return str(save_with_processor(tiny_model(image_size=[16, 24], **overrides), tmp_path / name))

    return save


@pytest.fixture
def vit(tmp_path):
    size = dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
    ViTForImageClassification(ViTConfig(intermediate_size=32, **size)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def photos(tmp_path):
    return str(write_folder(tmp_path / "photos", per_label=3))


class TestVisualize:
    def run(self, model, photo, folder, *words):
        visualize(["--model", model, "--image", photo, "--output_dir", str(folder), *words])
        return {path.name for path in folder.iterdir()}

    def test_writes_what_it_says(self, refiner, photo, tmp_path, capsys):
        written = self.run(refiner(), photo, tmp_path / "out")
        assert written == {"layers_class_token.png", "layer_4_class_token.png", "layer_4_weights.png"}
        assert capsys.readouterr().out.count("Wrote") == 3
        assert all(min(Image.open(tmp_path / "out" / name).size) > 200 for name in written)

    def test_layers_heads_patches_and_page(self, refiner, photo, tmp_path):
        words = ["--layer", "1", "2", "--head", "2", "--patch", "1,6", "4,1", "--html"]
        written = self.run(refiner(), photo, tmp_path / "out", *words)
        tokens = {"class_token", "patch_1_6", "patch_4_1"}
        expected = {f"layers_{who}.png" for who in tokens} | {f"layer_{i}_{who}.png" for i in (1, 2) for who in tokens}
        assert written == expected | {"layer_2_weights.png", "maps.html"}  # layer 1 refines nothing
        assert (tmp_path / "out" / "maps.html").read_text().count('"patch 3,3"') == 1  # small: all patches are in it

    def test_a_large_page_holds_the_chosen_patches(self, refiner, photo, tmp_path, monkeypatch):
        monkeypatch.setattr("refiner_hf.commands.visualize._LARGEST_PAGE", 10_000)
        self.run(refiner(), photo, tmp_path / "out", "--patch", "1,6", "--html")
        text = (tmp_path / "out" / "maps.html").read_text()
        assert '"patch 1,6"' in text and '"patch 3,3"' not in text

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout(self, refiner, photo, tmp_path, layout):
        written = self.run(refiner(attention_types=LAYOUTS[layout]), photo, tmp_path / "out")
        last = max((i for i, kind in enumerate(LAYOUTS[layout]) if kind != "plain"), default=3) + 1
        assert f"layer_{last}_class_token.png" in written
        assert (f"layer_{last}_weights.png" in written) == (layout != "plain")

    def test_a_vit_and_a_grey_picture(self, vit, tmp_path):
        Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
        written = self.run(vit, str(tmp_path / "grey.png"), tmp_path / "out", "--html")
        assert written == {"layers_class_token.png", "layer_3_class_token.png", "maps.html"}

    @pytest.mark.parametrize(
        "words, message",
        [
            (["--layer", "5"], "no layer 5; there are 4"),
            (["--layer", "0"], "no layer 0"),
            (["--head", "5"], "no head 5; there are 4"),
            (["--patch", "5,1"], "no patch 5,1; there are 4 rows and 6 columns"),
            (["--patch", "7"], "ROW,COLUMN such as 3,5, got '7'"),
            (["--model", "/nowhere/at/all"], "no folder /nowhere/at/all"),
            (["--device", "cuda:7"], "(?i)cuda"),
        ],
    )
    def test_bad_choices(self, refiner, photo, tmp_path, words, message):
        with pytest.raises(SystemExit, match=message):
            self.run(refiner(), photo, tmp_path / "out", *words)
        assert not list((tmp_path / "out").glob("*"))

    def test_bad_files(self, refiner, photo, tmp_path):
        model = refiner()
        (tmp_path / "broken.png").write_text("no")
        with pytest.raises(SystemExit, match="broken.png"):
            self.run(model, str(tmp_path / "broken.png"), tmp_path / "out")
        with pytest.raises(SystemExit, match="broken.png"):  # where a folder should be
            self.run(model, photo, tmp_path / "broken.png")

    def test_damaged_weights(self, refiner, photo, tmp_path):
        model = refiner()
        weights = tmp_path / "refiner" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(SystemExit, match="damaged"):
            self.run(model, photo, tmp_path / "out")

    def test_a_picture_with_transparency_and_a_network_in_half_precision(self, tiny_model, tmp_path):
        save_with_processor(tiny_model().bfloat16(), tmp_path / "half")
        Image.new("RGBA", (20, 30), (200, 30, 30, 90)).save(tmp_path / "clear.png")
        assert self.run(str(tmp_path / "half"), str(tmp_path / "clear.png"), tmp_path / "out", "--html")

    def test_a_network_of_another_kind(self, photo, tmp_path):
        config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
        SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "swin")
        with pytest.raises(SystemExit, match="SwinForImageClassification"):
            self.run(str(tmp_path / "swin"), photo, tmp_path / "out")


class TestAnalyze:
    def run(self, *words):
        analyze([str(word) for word in words])

    def test_several_networks(self, refiner, vit, photos, tmp_path, capsys):
        """--model may come once or several times; networks of one name are told apart."""
        twin = tmp_path / "twin"
        twin.mkdir()
        models = ["--model", refiner(), vit, "--model", refiner("twin/refiner", attention_types=LAYOUTS["plain"])]
        self.run(*models, "--data", photos, "--max_examples", 6, "--batch_size", 4, "--output_dir", tmp_path / "out")
        found = json.loads((tmp_path / "out" / "analysis.json").read_text())
        names = [network["name"] for network in found["networks"]]
        assert names == [f"{tmp_path.name}/refiner", "vit", "twin/refiner"]
        assert [network["images"] for network in found["networks"]] == [6, 6, 6] and found["data"] == "photos"
        assert ["before" in network for network in found["networks"]] == [True, False, False]
        output = capsys.readouterr().out
        assert all(f"| {name} |" in output for name in names) and "6 images of photos" in output
        assert str(tmp_path) not in (tmp_path / "out" / "analysis.json").read_text()

    def test_digits_by_default(self, refiner, tmp_path):
        self.run("--model", refiner(), "--max_examples", 4, "--output_dir", tmp_path / "out")
        found = json.loads((tmp_path / "out" / "analysis.json").read_text())
        assert found["data"] == "scikit-learn digits"

    @pytest.mark.parametrize(
        "words, message",
        [
            (["--max_examples", "0"], "max_examples must be at least 1"),
            (["--batch_size", "3"], "at least 4 images"),
            (["--data", "/nowhere/at/all"], "no folder /nowhere/at/all"),
            (["--model", "/nowhere/at/all"], "no folder /nowhere/at/all"),
        ],
    )
    def test_bad_choices(self, refiner, tmp_path, words, message):
        with pytest.raises(SystemExit, match=message):
            self.run("--model", refiner(), "--max_examples", 4, "--output_dir", tmp_path / "out", *words)

    def test_an_unreadable_image_is_named(self, refiner, photos, tmp_path):
        (tmp_path / "photos" / "red" / "0.png").write_text("no")
        with pytest.raises(SystemExit, match="0.png can't be read"):
            self.run("--model", refiner(), "--data", photos, "--output_dir", tmp_path / "out")
