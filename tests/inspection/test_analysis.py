"""An analysis beside the same numbers from all maps and tokens at once; what is written of it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from refiner_hf import RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.inspection import analysis, figures
from refiner_hf.inspection.analysis import analyze
from refiner_hf.inspection.cka import gram_matrix, unbiased_hsic
from refiner_hf.inspection.map_metrics import (
    attention_distance,
    effective_rank,
    head_similarity,
    layer_similarity,
    map_entropy,
    token_similarity,
)
from refiner_hf.inspection.networks import Network, open_network
from refiner_hf.inspection.report import summary_table, write_analyses

from ..conftest import LAYOUTS, load_json


SIZE, GRID = {"height": 16, "width": 24}, (4, 6)
OF_MAPS = {
    "head_similarity": head_similarity,
    "head_correlation": lambda maps: head_similarity(maps, centred=True),
    "entropy": map_entropy,
    "effective_rank": effective_rank,
    "effective_rank_centred": lambda maps: effective_rank(maps, centred=True),
    "distance": lambda maps: attention_distance(maps, GRID),
}


def photos(count: int) -> list[Image.Image]:
    """Noise of different colours, so that images differ in more than their noise."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(40, 215, (count, 1, 1, 3)) + rng.normal(0, 20, (count, 20, 30, 3))
    return [Image.fromarray(image) for image in pixels.clip(0, 255).astype(np.uint8)]


@pytest.fixture
def refiner(tiny_config):
    def make(name: str = "tiny", **fields) -> Network:
        torch.manual_seed(0)
        # Maps that are far from even ones, and tokens from each other.
        config = tiny_config(image_size=[16, 24], initializer_range=0.3, **fields)
        return Network(name, RefinerForImageClassification(config).eval(), RefinerImageProcessor(size=SIZE))

    return make


def vit(name: str = "vit", **fields) -> Network:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=[16, 24], patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.3, **fields,
    )  # fmt: skip
    model = ViTForImageClassification._from_config(config, attn_implementation="eager")
    return Network(name, model.eval(), ViTImageProcessor(size=SIZE))


def all_at_once(network: Network, images: list[Image.Image]):
    with torch.no_grad():
        pixel_values = network.processor(images, return_tensors="pt").pixel_values
        return network.model(pixel_values, output_attentions=True, output_hidden_states=True)


def same(actual, expected) -> None:
    """Numbers for JSON, with six digits, `None` for NaN, and what they should be."""
    expected = np.asarray(expected, dtype=float)
    np.testing.assert_allclose(np.array(actual, dtype=float), expected, rtol=2e-4, atol=2e-5, equal_nan=True)


def same_spread(actual: dict, values: list) -> None:
    """Mean and standard deviation over images; `values` (images, ...)."""
    values = np.array(values, dtype=float)
    assert list(actual) == ["mean", "std"]
    same(actual["mean"], values.mean(0))
    same(actual["std"], np.sqrt(((values - values.mean(0)) ** 2).sum(0) / (len(values) - 1)))


def numbers(content: dict | list | float | None) -> list[float]:
    """All that are in it, in their order."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for each in content for number in numbers(each)]
    return [math.nan if content is None else content]


def cka_of(minibatches: list[list[torch.Tensor]]) -> torch.Tensor:
    """From each minibatch's features, layer by layer."""
    hsic = sum(unbiased_hsic(torch.stack([gram_matrix(layer) for layer in layers])) for layers in minibatches)
    return hsic / (hsic.diagonal()[:, None] * hsic.diagonal()).sqrt()


class TestNumbers:
    @pytest.mark.parametrize("layout", [*LAYOUTS, None])
    def test_equal_those_of_everything_at_once(self, refiner, layout):
        network = vit() if layout is None else refiner(attention_types=LAYOUTS[layout])
        images = photos(10)
        found, expected = analyze(network, images, batch_size=4), all_at_once(network, images)
        assert found["images"] == 10
        for name, metric in OF_MAPS.items():
            same_spread(found["applied"][name], torch.stack([metric(m) for m in expected.attentions], 1).tolist())
        tokens = [token_similarity(states, GRID) for states in expected.hidden_states]
        same_spread(found["tokens"]["similarity"], torch.stack(tokens, 1).tolist())
        for name, similarity in zip(("cosine", "correlation"), layer_similarity(list(expected.attentions))):
            same_spread(found["layers"][name], similarity.tolist())
        # Of the ten, eight are in whole batches.
        same(found["cka"]["mean"], cka_of([[s[i : i + 4] for s in expected.hidden_states] for i in (0, 4)]))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_before_refinement(self, refiner, layout):
        network, images, types = refiner(attention_types=LAYOUTS[layout]), photos(4), LAYOUTS[layout]
        before = {}
        hooks = [
            layer.attention.refinement.register_forward_hook(lambda m, args, _, i=i: before.update({i: args[0]}))
            for i, layer in enumerate(network.model.refiner.layers)
            if types[i] != "plain"
        ]
        all_at_once(network, images)
        for hook in hooks:
            hook.remove()
        found = analyze(network, images, batch_size=4)
        if layout == "plain":
            assert "before" not in found
            return
        for name, metric in OF_MAPS.items():
            for layer, kind in enumerate(types):
                spread = {each: found["before"][name][each][layer : layer + 1] for each in ("mean", "std")}
                if kind == "plain":
                    assert spread == {"mean": [None], "std": [None]}
                else:
                    same_spread(spread, metric(before[layer])[:, None].tolist())

    def test_facts(self, refiner):
        found = analyze(refiner("mine"), photos(4), batch_size=4)
        facts = dict(name="mine", model_type="refiner", images=4, num_heads=4, num_tokens=25, grid=[4, 6])
        assert found.items() >= dict(facts, attention_types=LAYOUTS["released"]).items()
        found = analyze(vit(), photos(4), batch_size=4)
        facts = dict(name="vit", model_type="vit", images=4, num_heads=4, num_tokens=25, grid=[4, 6])
        assert found.items() >= dict(facts, attention_types=None).items()
        assert "before" not in found

    def test_is_ready_for_json(self, refiner):
        # One image, one head: much is undefined.
        found = analyze(refiner(num_attention_heads=1), photos(1), batch_size=4)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["applied"]["head_similarity"] == {"mean": [None] * 4, "std": [None] * 4}
        assert None not in found["applied"]["entropy"]["mean"]
        assert found["applied"]["entropy"]["std"] == [None] * 4

    def test_mean_and_spread_over_images(self, refiner):
        network, images = refiner(), photos(3)
        single = [analyze(network, [image], batch_size=4) for image in images]
        together = analyze(network, images, batch_size=4)
        for stage, name in (("applied", "entropy"), ("tokens", "similarity"), ("layers", "cosine")):
            same_spread(together[stage][name], [each[stage][name]["mean"] for each in single])

    def test_half_precision(self, refiner):
        network, images = refiner(), photos(8)
        expected = analyze(network, images, batch_size=4)
        network.model.bfloat16()
        found = analyze(network, images, batch_size=4)
        for stage, name in (("applied", "entropy"), ("before", "distance"), ("tokens", "similarity")):
            for actual, value in zip(found[stage][name]["mean"], expected[stage][name]["mean"]):
                assert actual == value or actual == pytest.approx(value, rel=0.05)
        assert np.isfinite(np.array(found["cka"]["mean"], dtype=float)).all()

    @pytest.mark.parametrize(
        "model_class, config_class", [(ViTModel, ViTConfig), (BeitModel, BeitConfig)], ids=["ViT", "BEiT"]
    )
    def test_networks_saved_in_half_precision(self, tmp_path, model_class, config_class):
        config = config_class(
            image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48,
        )  # fmt: skip
        model_class(config).bfloat16().save_pretrained(tmp_path)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
        found = analyze(open_network(str(tmp_path)), photos(4), batch_size=4)
        assert len(found["applied"]["entropy"]["mean"]) == 2 and None not in found["applied"]["entropy"]["mean"]


class TestBatches:
    def test_images_go_through_in_turns_where_maps_would_fill_memory(self, refiner, monkeypatch):
        network, images, sizes = refiner(), photos(6), []
        count = lambda module, args, inputs: sizes.append(len(inputs["pixel_values"]))  # noqa: E731
        network.model.register_forward_pre_hook(count, with_kwargs=True)
        whole = analyze(network, images, batch_size=4)
        assert sizes == [4, 2]
        sizes.clear()
        monkeypatch.setattr(analysis, "_KEPT", 1)
        in_turns = analyze(network, images, batch_size=4)
        assert sizes == [1] * 6
        assert in_turns.keys() == whole.keys()
        for stage in ("applied", "before", "tokens", "layers", "cka"):
            assert len(numbers(whole[stage])) > 4
            same(numbers(in_turns[stage]), numbers(whole[stage]))

    def test_all_maps_of_a_turn_fit(self, refiner, monkeypatch):
        network, sizes = refiner(), []
        count = lambda module, args, inputs: sizes.append(len(inputs["pixel_values"]))  # noqa: E731
        network.model.register_forward_pre_hook(count, with_kwargs=True)
        monkeypatch.setattr(analysis, "_KEPT", 3 * 4 * 4 * 25**2 * 4)  # of three images: layers, heads, map, bytes
        analyze(network, photos(8), batch_size=8)
        assert sizes == [3, 3, 2]

    def test_batches_change_nothing_but_cka(self, refiner):
        network, images = refiner(), photos(9)
        one, other = (analyze(network, images, batch_size=size) for size in (4, 9))
        for name in OF_MAPS:
            for each in ("mean", "std"):
                same(one["applied"][name][each], other["applied"][name][each])
        same(one["tokens"]["similarity"]["mean"], other["tokens"]["similarity"]["mean"])
        assert one["cka"] != other["cka"]

    def test_few_images_have_no_cka(self, refiner):
        assert analyze(refiner(), photos(3), batch_size=4)["cka"] is None
        assert analyze(refiner(), photos(3))["cka"] is None

    @pytest.mark.parametrize("count, batch_size, used", [(4, 4, 1), (5, 8, 1), (7, 4, 1), (9, 4, 2), (11, 6, 1)])
    def test_which_images_count_for_cka(self, refiner, count, batch_size, used):
        network, images = refiner(), photos(count)
        found, states = analyze(network, images, batch_size=batch_size), all_at_once(network, images).hidden_states
        minibatches = [[s[i * batch_size : (i + 1) * batch_size] for s in states] for i in range(used)]
        assert found["images"] == count
        same(found["cka"]["mean"], cka_of(minibatches))
        # A single minibatch says nothing of the error.
        assert all(error is None for row in found["cka"]["error"] for error in row) == (used == 1)

    def test_images_may_come_from_a_generator(self, refiner):
        network, images = refiner(), photos(5)
        assert analyze(network, (image for image in images), 5, 4) == analyze(network, images, batch_size=4)

    @pytest.mark.parametrize("batch_size", [0, 1, 3])
    def test_batches_too_small(self, refiner, batch_size):
        with pytest.raises(ValueError, match=f"at least 4 images, got {batch_size}"):
            analyze(refiner(), photos(4), batch_size=batch_size)

    def test_no_images(self, refiner):
        with pytest.raises(ValueError, match="no images"):
            analyze(refiner(), [])

    def test_tokens_that_stand_for_no_patch(self):
        config = ViTMAEConfig(
            image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=48, mask_ratio=0.5,
        )  # fmt: skip
        model = ViTMAEModel._from_config(config, attn_implementation="eager").eval()
        network = Network("masked", model, ViTImageProcessor(size={"height": 16, "width": 16}))
        with pytest.raises(ValueError, match="fewer tokens than patches"):
            analyze(network, photos(4), batch_size=4)


@pytest.fixture
def analyses(refiner):
    """Networks of different depth, a ViT among them; of one image only in the last."""
    found = [analyze(network, photos(8), batch_size=4) for network in (refiner("mine"), vit())]
    return [*found, analyze(refiner("deep | wide", num_hidden_layers=6), photos(1))]


class TestReport:
    def test_files(self, analyses, tmp_path):
        folder = tmp_path / "a" / "b"
        analyses = analyses[1:]  # enough to draw: what is in the figures is tested below
        write_analyses(analyses, {"data": "noise", "seed": 3}, folder)
        names = ["analysis.json", *(f"analysis_{of}.{kind}" for of in ("curves", "layers") for kind in ("pdf", "png"))]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert load_json(folder / "analysis.json") == {"data": "noise", "seed": 3, "networks": analyses}
        for path in folder.glob("*.png"):
            pixels = np.asarray(Image.open(path).convert("L"))
            assert min(pixels.shape) > 300 and pixels.std() > 10
        for path in folder.glob("*.pdf"):
            assert path.read_bytes().startswith(b"%PDF")

    def test_table(self, analyses):
        head, line, *rows = summary_table(analyses).splitlines()
        assert [row.split(" | ")[0] for row in rows] == ["| mine", "| vit", r"| deep \| wide"]
        assert all(row.replace(r"\|", "").count("|") == head.count("|") == line.count("|") == 11 for row in rows)

    def test_table_holds_means_over_layers(self):
        metrics = zip(OF_MAPS, ([0.1, 0.3], [None, 0.5], [0.25, 0.5], [10, 13], [5, 6], [2, 4]))
        made_up = {
            "name": "mine",
            "num_tokens": 17,
            "applied": {name: {"mean": mean} for name, mean in metrics},
            "tokens": {"similarity": {"mean": [0.1, 0.2, 0.9]}},
            "layers": {"cosine": {"mean": [[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]]}},
        }
        row = summary_table([made_up]).splitlines()[-1]
        assert row == "| mine | 17 | 0.2 | 0.5 | 0.375 | 11.5 | 5.5 | 3 | 0.4 | 0.4 |"

    def test_table_of_a_network_with_one_head_or_layer(self, refiner):
        one_head = analyze(refiner(num_attention_heads=1), photos(4))
        one_layer = analyze(refiner(num_hidden_layers=1), photos(4))
        rows = [row.split(" | ") for row in summary_table([one_head, one_layer]).splitlines()[2:]]
        assert rows[0][2:4] == ["", ""] and float(rows[0][4]) > 0
        assert rows[1][-1].strip(" |") == "" and float(rows[1][2]) > 0


class TestFigures:
    @pytest.fixture
    def figure(self, monkeypatch):
        """What was drawn last."""
        drawn = []
        monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **options: drawn.append(self))
        return lambda: drawn[-1]

    def test_curves_show_the_numbers(self, analyses, figure, tmp_path):
        figures.plot_curves(analyses, tmp_path / "a.png")
        assert len(figure().axes) == 10
        panels = {panel.get_title(): panel for panel in figure().axes}
        mine = analyses[0]
        for name in OF_MAPS:
            panel = panels[figures._PANELS[name][0]]
            line, dots = panel.lines[:2]
            assert line.get_xdata().tolist() == dots.get_xdata().tolist() == [1, 2, 3, 4]
            same(line.get_ydata(), mine["applied"][name]["mean"])
            same(dots.get_ydata(), np.array(mine["before"][name]["mean"], dtype=float))
            assert len(panel.lines) == 3 + 2  # a ViT has no maps before refinement
        for name in ("cosine", "correlation"):
            maps = panels[figures._PANELS[name][0]].lines[0]
            assert maps.get_xdata().tolist() == [2, 3, 4]
            same(maps.get_ydata(), [mine["layers"][name]["mean"][i][i - 1] for i in (1, 2, 3)])
        tokens, features = (panels[figures._PANELS[name][0]].lines[0] for name in ("tokens", "cka"))
        assert tokens.get_xdata().tolist() == features.get_xdata().tolist() == [0, 1, 2, 3, 4]
        same(tokens.get_ydata(), mine["tokens"]["similarity"]["mean"])
        same(features.get_ydata(), mine["cka"]["mean"][-1])
        assert len(panels[figures._PANELS["cka"][0]].lines) == 2  # of one image there is no CKA
        names = [text.get_text() for text in figure().legends[0].get_texts()]
        assert [name.split(" (")[0] for name in names] == ["mine", "vit", "deep | wide", "before refinement"]
        assert names[0] == f"mine ({mine['num_tokens']} tokens)"

    def test_no_dots_where_nothing_is_refined(self, figure, tmp_path):
        figures.plot_curves([analyze(vit(), photos(4), batch_size=4)], tmp_path / "a.png")
        assert [text.get_text() for text in figure().legends[0].get_texts()] == ["vit (25 tokens)"]
        assert [len(panel.lines) for panel in figure().axes] == [1] * 10

    def test_layers_show_the_squares(self, analyses, figure, tmp_path):
        figures.plot_layers(analyses, tmp_path / "a.png")
        panels = [axis for axis in figure().axes if axis.get_title()]
        assert len(panels) == 3 * len(analyses)
        for i, each in enumerate(analyses):
            cosine, correlation, cka = panels[3 * i : 3 * i + 3]
            assert each["name"] in cosine.get_ylabel()
            depth = len(each["layers"]["cosine"]["mean"])
            for panel, values in ((cosine, each["layers"]["cosine"]), (correlation, each["layers"]["correlation"])):
                same(panel.images[0].get_array(), values["mean"])
                assert panel.images[0].get_extent() == [0.5, depth + 0.5, 0.5, depth + 0.5]
            if each["cka"] is None:
                assert not cka.images and cka.texts[0].get_text() == "too few examples"
            else:
                same(cka.images[0].get_array(), each["cka"]["mean"])
                assert cka.images[0].get_extent() == [-0.5, depth + 0.5, -0.5, depth + 0.5]
