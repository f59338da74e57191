"""Cards, pictures and code."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import refiner_hf
from refiner_hf import RefinerConfig, RefinerForImageClassification, RefinerModel
from refiner_hf.cards.architecture import describe_network
from refiner_hf.cards.card import CardContent, basic_card, make_card
from refiner_hf.cards.plots import plot_confusion_matrix, plot_learning_curve, plot_predictions
from refiner_hf.cards.usage import for_repository, usage_example
from refiner_hf.hub.code import AUTO_MAP, CODE_FILES, PROCESSOR_AUTO_MAP, add_code
from refiner_hf.utils.flops import count_flops
from refiner_hf.utils.markdown import markdown_table

from ..conftest import LAYOUTS, load_json
from ..parsed_card import Card


ROOT = Path(__file__).parents[2]
PACKAGE = Path(refiner_hf.__file__).parent


class TestCode:
    def test_the_flat_files_need_each_other_only(self):
        """What `save_pretrained` and the Hub demand: one folder, `from .name import ...`, no import of the package."""
        for name in CODE_FILES:
            for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and node.module and f"{node.module}.py" in CODE_FILES, (name, node.module)
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not any(module.split(".")[0] == "refiner_hf" for module in modules), name

    def test_the_map_names_classes_that_exist(self):
        for target in [*AUTO_MAP.values(), *PROCESSOR_AUTO_MAP["AutoImageProcessor"].values()]:
            module, name = target.split(".")
            assert f"{module}.py" in CODE_FILES and hasattr(refiner_hf, name)

    def test_every_registered_class_is_in_it(self):
        heads = {name for name in refiner_hf.__all__ if name.startswith("Refiner") and hasattr(refiner_hf, name)}
        heads = {name for name in heads if issubclass(getattr(refiner_hf, name), refiner_hf.RefinerPreTrainedModel)}
        assert {target.split(".")[1] for target in AUTO_MAP.values()} >= heads - {"RefinerPreTrainedModel"}

    def test_added_to_a_folder(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        add_code(tmp_path)
        assert load_json(tmp_path / "config.json")["auto_map"] == AUTO_MAP
        assert set(CODE_FILES) <= {path.name for path in tmp_path.iterdir()}


class TestCards:
    FACTS = CardContent(title="a", summary="A model.", usage="```python\nprint(1)\n```", limits="Many.")

    def test_empty_sections_are_left_out(self):
        texts = dict(results="Good.", architecture="Small.", data="Photos.", training="Long.")
        whole, bare = (make_card(facts).content for facts in (replace(self.FACTS, **texts), self.FACTS))
        sections = Card(whole).sections
        headings = "Summary, Results, How to use it, The network, Data, How it was made, Limits, Citation"
        assert ", ".join(sections) == headings and sections["Data"] == "Photos."
        left = ("Summary", "How to use it", "Limits", "Citation")
        assert Card(bare).sections == {heading: sections[heading] for heading in left}
        assert "\n\n\n" not in whole and "\n\n\n" not in bare

    def test_metrics_become_a_model_index(self, tmp_path):
        facts = CardContent(
            title="a", summary="A.", usage="", limits="", dataset_name="My photos", dataset_split="test",
            metrics={"accuracy": ("Top-1 accuracy", 0.5)},
        )  # fmt: skip
        make_card(facts).save(tmp_path / "README.md")
        (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
        assert (result.metric_value, result.dataset_name, result.dataset_type) == (0.5, "My photos", "my-photos")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_network(self, tiny_model, layout):
        model = tiny_model(attention_types=LAYOUTS[layout])
        table = Card(make_card(replace(self.FACTS, architecture=describe_network(model))).content).table("The network")
        refined = {"refinement": "expansion convolution, expansion ratio 3, kernel 3 x 3"}
        kinds = {"plain": "4 plain", "released": "2 plain, 2 shared refined", "refine_every_layer": "4 refined",
                 "mixed": "1 refined, 2 shared refined, 1 plain"}  # fmt: skip
        assert table == {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "cost of an image": f"{count_flops(model) / 1e9:.3g} GFLOP (2 per multiply-add)",
            "images": "16 x 16 pixels, 3 channels, patches of 4 x 4",
            "layers": f"4 ({kinds[layout]})", "width, MLP width": "24, 72", "attention heads": "4",
            "embedding": "convolutional stem", "dense head": "no", "labels": "5",
            **(refined if layout != "plain" else {}),
        }  # fmt: skip

    # Multiply-adds of the published networks, counted on the reference implementation's own description of them.
    @pytest.mark.parametrize(
        "size, image_size, giga_multiply_adds",
        [("small", 224, 6.82), ("small", 384, 24.09), ("medium", 224, 13.50), ("large", 448, 102.36)],
    )
    def test_cost(self, size, image_size, giga_multiply_adds):
        with torch.device("meta"):
            model = RefinerForImageClassification(getattr(RefinerConfig, size)(image_size=image_size))
        assert count_flops(model) / 2e9 == pytest.approx(giga_multiply_adds, abs=0.005)

    def test_counting_changes_nothing(self, tiny_model):
        """A card is written in the middle of a training, too."""
        model, state = tiny_model().train(), torch.get_rng_state()
        count_flops(model)
        assert model.training and torch.equal(state, torch.get_rng_state())

    def test_numbers_without_data_are_no_result(self):
        facts = replace(self.FACTS, metrics={"accuracy": ("Top-1 accuracy", 0.5)})
        assert make_card(facts).data.eval_results is None

    @pytest.mark.parametrize("head", [RefinerForImageClassification, RefinerModel])
    def test_of_a_model_that_came_without(self, tiny_config, head):
        card = Card(basic_card(head(tiny_config()), "alice/model").content)
        task = {"RefinerModel": "image-feature-extraction"}.get(head.__name__, "image-classification")
        tags = ["refiner", "vision", task]
        assert card.data == {"library_name": "transformers", "pipeline_tag": task, "tags": tags}
        assert list(card.sections) == ["Summary", "How to use it", "The network", "Limits", "Citation"]
        assert f'pipeline("{task}", model="alice/model")' in card.code

    def test_usage_for_another_place(self):
        card = make_card(replace(self.FACTS, usage=usage_example("out", False)))
        there = for_repository(card, "alice/model", remote_code=True, revision="trial")
        assert 'model="alice/model", revision="trial", trust_remote_code=True)' in there.text
        assert "import refiner_hf" not in there.text and '"out"' not in there.text
        back = for_repository(there, "out", remote_code=False)
        assert back.text == card.text and back.data.tags == card.data.tags != there.data.tags
        other = make_card(self.FACTS)
        assert for_repository(other, "alice/model", remote_code=False).text == other.text

    def test_the_hubs_validator_takes_them(self, hub):
        """The check of huggingface_hub, which asks the Hub; here the tests' own one answers."""
        facts = replace(
            self.FACTS, dataset_name="My photos", dataset_split="test", license="mit", language="en", tags=["mine"],
            metrics={"accuracy": ("Top-1 accuracy", 0.5)}, co2={"emissions": 1.5, "source": "codecarbon"},
        )  # fmt: skip
        make_card(facts).validate(repo_type="model")
        for path in sorted((ROOT / "model_cards").glob("refiner-*.md")):
            ModelCard.load(path).validate(repo_type="model")
        assert hub.requests == [("POST", "/api/validate-yaml")] * 4
        broken = make_card(facts)
        broken.data.license = ["MIT!"]
        with pytest.raises(ValueError, match="license"):
            broken.validate(repo_type="model")

    def test_table_cells_keep_to_themselves(self):
        assert markdown_table(["a"], [("x|y\nz",)]).splitlines()[-1] == "| x\\|y z |"

    def test_published_cards_are_up_to_date(self, tmp_path):
        subprocess.run([sys.executable, "scripts/write_cards.py", "--output_dir", str(tmp_path)], check=True, cwd=ROOT)
        for size in ("small", "medium", "large"):
            name = f"refiner-{size}.md"
            assert (tmp_path / name).read_text() == (ROOT / "model_cards" / name).read_text(), "run `make cards`"


class TestPictures:
    def test_learning_curve(self, tmp_path, drawn):
        def curves(history):
            plot_learning_curve(history, tmp_path / "a.png")
            return [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in drawn[-1].axes]

        training = [{"epoch": i, "loss": 1 / (i + 1)} for i in range(3)]
        points = [[0, 1], [1, 1 / 2], [2, 1 / 3]]
        assert curves([]) == [{}, {}]
        assert curves(training) == [{"training": points}, {}]
        measured = [{"epoch": 2, "eval_loss": 4, "eval_accuracy": 0.5}, {"epoch": 3, "eval_top5_accuracy": 0.75}]
        assert curves([*training, *measured, {"loss": 7}]) == [
            {"training": points, "evaluation": [[2, 4]]}, {"top-1": [[2, 50]], "top-5": [[3, 75]]}
        ]  # fmt: skip
        assert Image.open(tmp_path / "a.png").size[0] > 600

    @pytest.mark.parametrize("labels", [2, 30, 200])
    def test_confusion_matrix(self, tmp_path, drawn, labels):
        """True labels down, predicted ones across; with their names where these can be read."""
        counts, names = np.arange(labels**2).reshape(labels, labels), [f"label {i}" for i in range(labels)]
        plot_confusion_matrix(counts.tolist(), names, tmp_path / "a.png")
        axis = drawn[0].axes[0]
        assert np.array_equal(axis.images[0].get_array(), counts)
        assert axis.get_ylabel().lower().startswith("true") and axis.get_xlabel().lower().startswith("predicted")
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            assert [text.get_text() for text in ticks] == (names if labels < 200 else [])
        assert 300 < Image.open(tmp_path / "a.png").size[0] < 2000

    @pytest.mark.parametrize("count, places", [(1, 1), (3, 3), (5, 8), (8, 8)])
    def test_predictions(self, tmp_path, drawn, count, places):
        images = [Image.new("RGB", (8, 8), (200, i, 0)) for i in range(count)]
        plot_predictions(images, [f"title {i}" for i in range(count)], tmp_path / "a.png")
        shown = [(axis.get_title(), tuple(axis.images[0].get_array()[0, 0])) for axis in drawn[0].axes if axis.images]
        assert shown == [(f"title {i}", (200, i, 0)) for i in range(count)] and len(drawn[0].axes) == places
        assert Image.open(tmp_path / "a.png").size[0] > 100
