import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from refiner_hf.inspection.attention_views import (
    APPLIED,
    BEFORE,
    CLASS_TOKEN,
    AttentionViews,
    LayerAttention,
    coloured,
)
from refiner_hf.inspection.page import query_bytes, write_page
from refiner_hf.inspection.pictures import _mosaic, plot_heads, plot_overview, plot_weights
from refiner_hf.refinements_refiner import make_refinement


EXPANDED, LOCAL = "after attention expansion", "after distributed local attention"


def made_up(layers: int = 2, heads: int = 3, expanded: int = 6, grid: tuple[int, int] = (3, 4)) -> AttentionViews:
    """Two queries, the second layer refines; as applied the first query's head 1 subtracts at patch 2,3."""
    rng = np.random.default_rng(0)
    views = AttentionViews(np.full((30, 40, 3), 0.5, np.float32), grid, [CLASS_TOKEN, (1, 2)])
    for layer in range(layers):
        sizes = {APPLIED: heads} if layer % 2 == 0 else {BEFORE: heads, LOCAL: expanded, APPLIED: heads}
        stages = {name: rng.random((2, count, *grid)).astype(np.float32) for name, count in sizes.items()}
        views.layers.append(
            LayerAttention(stages, rng.random((2, *grid)).astype(np.float32), object() if layer % 2 else None)
        )
    views.layers[1].stages[APPLIED][0] = 0
    views.layers[1].stages[APPLIED][0, 0, 1, 2] = -0.5
    return views


def colours_in(path) -> tuple[int, int]:
    """How many pixels are distinctly red, and blue."""
    red, green, blue = (np.asarray(Image.open(path).convert("RGB")).astype(int)[..., i] for i in range(3))
    return int(((red > green + 90) & (red > blue + 90)).sum()), int(((blue > red + 90) & (blue > green + 60)).sum())


def test_red_adds_and_blue_subtracts(tmp_path):
    views = made_up()
    plot_heads(views, 1, 0, tmp_path / "one.png", heads=[0])
    before = colours_in(tmp_path / "one.png")
    views.layers[1].stages[APPLIED][0, 0] *= -1
    plot_heads(views, 1, 0, tmp_path / "other.png", heads=[0])
    after = colours_in(tmp_path / "other.png")
    patch = before[1] - after[1]  # one of twelve of a panel
    assert before[1] > 0 and patch > 50 and after[0] - before[0] > 50


def maps_in(figure: Figure) -> list[np.ndarray]:
    """The maps that are laid over the picture, panel by panel."""
    return [axis.images[1].get_array() for axis in figure.axes if len(axis.images) == 2]


def same_maps(figure: Figure, expected: list[np.ndarray]) -> None:
    for shown, weights in zip(maps_in(figure), expected, strict=True):
        np.testing.assert_allclose(shown, coloured(weights))


def test_heads_show_the_querys_maps(tmp_path, drawn):
    sight = made_up()
    plot_heads(sight, 1, 1, tmp_path / "a.png")
    before, local, applied = (maps[1] for maps in sight.layers[1].stages.values())
    # Each stage's mean, and then its heads; expanded heads take two rows.
    same_maps(drawn[0], [before.mean(0), *before, local.mean(0), *local, applied.mean(0), *applied])
    (frame,) = drawn[0].axes[0].patches  # around the second row's third patch, of 10 x 10 pixels
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((19.5, 9.5), 10, 10)


@pytest.mark.parametrize("layers", [3, 18])
def test_overview_shows_the_querys_maps(tmp_path, drawn, layers):
    sight, expected = made_up(layers), []
    plot_overview(sight, 1, tmp_path / "a.png")
    for layer in sight.layers:
        expected += [layer.stages[name][1].mean(0) for name in (BEFORE, APPLIED) if name in layer.stages]
        expected.append(layer.rollout[1])
    same_maps(drawn[0], expected)
    titled = [axis for axis in drawn[0].axes if axis.get_title().startswith("layer")]
    places = [(axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start) for axis in titled]
    assert [axis.get_title() for axis in titled] == [f"layer {i + 1}" for i in range(layers)]
    assert places == [(3 * (i // 16), 1 + i % 16) for i in range(layers)]


def test_heads_can_be_chosen(tmp_path, drawn):
    views = made_up()
    for name, heads in (("all", None), ("two", [0, 2])):
        plot_heads(views, 1, 1, tmp_path / f"{name}.png", heads)
    titles = [axis.get_title() for axis in drawn[-1].axes]
    assert [title for title in titles if title] == [
        "mean", "head 1", "head 3", "expanded 1", "expanded 3", "expanded 4", "expanded 6", "head 1", "head 3",
    ]  # fmt: skip
    plot_heads(views, 0, 0, tmp_path / "plain.png")
    assert Image.open(tmp_path / "plain.png").size[1] < Image.open(tmp_path / "all.png").size[1]


@pytest.mark.parametrize(
    "layer, heads, message", [(2, None, "no layer 3; there are 2"), (-1, None, "no layer 0"), (1, [3], "no head 4")]
)
def test_what_is_not_there(tmp_path, layer, heads, message):
    with pytest.raises(ValueError, match=message):
        plot_heads(made_up(), layer, 0, tmp_path / "a.png", heads)
    assert not list(tmp_path.iterdir())


def test_many_layers_take_several_rows(tmp_path):
    for layers in (16, 18):
        plot_overview(made_up(layers), 1, tmp_path / f"{layers}.png")
    short, tall = (Image.open(tmp_path / f"{layers}.png").size for layers in (16, 18))
    assert tall[0] == short[0] and tall[1] > 1.5 * short[1]


@pytest.mark.parametrize("refinement", ["expansion_convolution", "expansion", "convolution"])
@pytest.mark.parametrize("ratio", [1, 3])
def test_weights(tiny_config, tmp_path, drawn, refinement, ratio):
    module = make_refinement(tiny_config(refinement=refinement, expansion_ratio=ratio))
    plot_weights(module, 0, tmp_path / "weights.png")
    shown = {axis.get_title(): axis.images[0].get_array() for axis in drawn[-1].axes if axis.get_title()}
    if refinement == "convolution":
        assert list(shown) == ["kernels"]
        kernel = module.convolution.weight[2, 1].detach()  # to head 3, from head 2: third row, second column
        np.testing.assert_array_equal(shown["kernels"][8:11, 4:7], kernel)
        return
    if ratio > 1:  # expanded heads down, heads across
        np.testing.assert_array_equal(shown["attention expansion"], module.expansion.weight[:, :, 0, 0].detach())
    np.testing.assert_array_equal(shown["attention reduction"], module.reduction.weight[:, :, 0, 0].detach().T)
    if refinement == "expansion_convolution":
        last = module.local_attention.weight[-1, 0].detach()
        np.testing.assert_array_equal(shown["distributed local attention, by expanded head"][-3:, -3:], last)
    assert len(shown) == 1 + (ratio > 1) + (refinement == "expansion_convolution")


def test_mosaic():
    kernels = np.arange(24.0).reshape(2, 3, 2, 2)
    plane = _mosaic(kernels)
    assert plane.shape == (5, 8)
    np.testing.assert_array_equal(plane[3:5, 6:8], kernels[1, 2])
    assert np.isnan(plane[2]).all() and np.isnan(plane[:, [2, 5]]).all()


class TestPage:
    @pytest.fixture
    def page(self, tmp_path):
        write_page(made_up(), "Where </script> looks", 1, tmp_path / "maps.html")
        return tmp_path / "maps.html"

    @pytest.fixture
    def content(self, page):
        (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
        return json.loads(text)

    def test_holds_the_maps(self, content):
        views = made_up()
        assert content["title"] == "Where </script> looks" and content["layer"] == 2
        assert content["queries"][1] == {"name": "patch 2,3", "patch": [1, 2]}
        assert [name for name in content["layers"][0] if name != "rollout"] == [APPLIED]
        for name, maps in views.layers[1].stages.items():
            stage = content["layers"][1][name]
            packed = np.frombuffer(base64.b64decode(stage["maps"]), np.int8).reshape(2, maps.shape[1] + 1, 3, 4)
            expected = np.concatenate((maps.mean(1, keepdims=True), maps), 1)
            expected = expected / np.abs(expected).max((-2, -1), keepdims=True).clip(1e-9)
            np.testing.assert_allclose(packed / 127, expected, atol=0.5 / 127 + 1e-6)
            assert stage["heads"] == maps.shape[1]

    def test_needs_nothing_else(self, page):
        text = page.read_text()
        assert not re.search(r"https?://|src=\"|href=|@import|fetch\(", text)
        assert "data:image/png;base64," in text

    def test_size_is_foreseen(self, page):
        views = made_up()
        alone = AttentionViews(views.picture, views.grid, [CLASS_TOKEN])
        alone.layers = [
            LayerAttention({name: maps[:1] for name, maps in layer.stages.items()}, layer.rollout[:1])
            for layer in views.layers
        ]
        write_page(alone, "Where </script> looks", 1, page.with_name("alone.html"))
        added = page.stat().st_size - page.with_name("alone.html").stat().st_size
        assert added == pytest.approx(query_bytes(views), abs=60)  # a name, and base64's padding

    def test_of_zeros(self, tmp_path):
        views = made_up()
        for stage in views.layers[1].stages.values():
            stage[:] = 0
        write_page(views, "nothing", 0, tmp_path / "zeros.html")
        zeros = base64.b64encode(bytes(2 * 4 * 12)).decode()  # queries, heads and their mean, patches
        assert f'"{BEFORE}": {{"heads": 3, "maps": "{zeros}"}}' in (tmp_path / "zeros.html").read_text()
        plot_heads(views, 1, 0, tmp_path / "zeros.png")
        assert colours_in(tmp_path / "zeros.png") == (0, 0)

    @pytest.mark.skipif(not shutil.which("chromium"), reason="there is no browser")
    def test_in_a_browser(self, page, tmp_path):
        """The page's own script runs, and its sliders and patches do something."""
        drive = """
          const captions = () => [...document.querySelectorAll("figcaption")].map(each => each.textContent);
          const pictures = () => [...document.querySelectorAll("canvas")].map(each => each.toDataURL());
          window.addEventListener("load", () => setTimeout(() => {
            const notes = [[element("head").max, element("expanded").max], captions(), new Set(pictures()).size];
            element("head").value = 2; element("expanded").value = 6;
            document.querySelector("form").dispatchEvent(new Event("input"));
            notes.push(captions());
            element("layer").value = 1;
            document.querySelector("form").dispatchEvent(new Event("input"));
            notes.push(captions());
            const canvas = document.querySelectorAll("canvas")[0], box = canvas.getBoundingClientRect();
            canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + box.width * 2.5 / 4,
                                                           clientY: box.top + box.height * 1.5 / 3}));
            notes.push(element("query").value);
            document.body.innerHTML = "<pre id=notes></pre>";
            document.getElementById("notes").textContent = JSON.stringify(notes);
          }, 200));
        """
        driven = tmp_path / "driven.html"
        driven.write_text(page.read_text().replace("</html>", f"<script>{drive}</script></html>"))
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000", "--dump-dom",
        ]  # fmt: skip
        run = subprocess.run(
            ["chromium", *options, driven.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        largest, first, drawn, moved, plain, chosen = json.loads(
            re.search(r'<pre id="notes">(.*?)</pre>', run.stdout).group(1)
        )
        assert largest == ["3", "6"]
        assert first[1:] == [
            f"{BEFORE}: mean of all heads", f"{LOCAL}: mean of all heads", f"{APPLIED}: mean of all heads",
            "rollout: layers 1 to 2",
        ]  # fmt: skip
        assert drawn == 5  # each canvas has another picture
        assert moved[1:4] == [f"{BEFORE}: head 2", f"{LOCAL}: expanded head 6", f"{APPLIED}: head 2"]
        assert plain[1] == f"{BEFORE}: nothing, this layer doesn't refine" and plain[4] == "rollout: layers 1 to 1"
        assert chosen == "1"
