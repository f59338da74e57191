import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedConfig, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from refiner_hf import RefinerConfig, RefinerImageProcessor, RefinerModel
from refiner_hf.commands import main as refiner
from refiner_hf.commands.demo import find_examples, main
from refiner_hf.image_processing_pil_refiner import open_image
from refiner_hf.inspection.attention_views import APPLIED, BEFORE, CLASS_TOKEN, AttentionViews, view_attention
from refiner_hf.inspection.networks import Network

from ..conftest import LAYOUTS, TINY, save_with_processor
from ..images import write_folder


gr = pytest.importorskip("gradio")

from gradio_client import Client, handle_file  # noqa: E402

from refiner_hf.demo.app import _Page, _patch_clicked, build_demo, launch, served  # noqa: E402
from refiner_hf.demo.rendering import (  # noqa: E402
    VisitorState,
    draw_map,
    draw_picture,
    in_words,
    likeliest,
    only_one_map,
    patch_at,
    view_picture,
    which_refine,
)


SIZE = {"height": 16, "width": 24}  # 4 x 6 patches


@pytest.fixture(autouse=True)
def files_go_here(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


@pytest.fixture
def network(tiny_model):
    def make(**overrides) -> Network:
        return Network("tiny", tiny_model(image_size=[16, 24], **overrides).eval(), RefinerImageProcessor(size=SIZE))

    return make


@pytest.fixture
def folder(network, tmp_path):
    """That network, saved."""
    return save_with_processor(network().model, tmp_path / "tiny")


@pytest.fixture
def vit():
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=32,
        attn_implementation="eager",
    )  # fmt: skip
    return Network(
        "vit", ViTForImageClassification(config).eval(), ViTImageProcessorPil(size=dict(height=16, width=16))
    )


@pytest.fixture
def photo(tmp_path):
    return photo_of(tmp_path / "photo.png", 0)


def photo_of(path, seed: int) -> str:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return str(path)


def file(path) -> dict[str, str]:
    """As Gradio hands on what was uploaded."""
    return {"path": str(path)}


def opened(network: Network) -> _Page:
    page = _Page(network)
    with gr.Blocks(analytics_enabled=False):
        page.lay_out(())
        page.connect()
    return page


def map_of(network: Network, photo: str, stage: str, layer: int, head: int | None = None, patches=()) -> np.ndarray:
    maps = view_attention(network, Image.open(photo).convert("RGB"), patches).layers[layer].stages[stage][-1]
    return maps.mean(0) if head is None else maps[head]


def seen_at(query, picture=(30, 40), grid=(3, 4)) -> VisitorState:
    views = AttentionViews(np.full((*picture, 3), 0.5, np.float32), grid, [query])
    return VisitorState(None, views, views)


class TestDrawing:
    def test_red_adds_and_blue_subtracts_on_the_maps_own_scale(self):
        look = seen_at(CLASS_TOKEN)
        weights = np.zeros((3, 4), np.float32)
        weights[0, 0], weights[1, 2], weights[2, 3] = 0.02, -0.04, 0.04
        drawing = draw_map(look, weights).astype(int)
        height, width, _ = drawing.shape
        assert (height, width) == draw_picture(look).shape[:2] and max(height, width) >= 480
        cells = drawing.reshape(3, height // 3, 4, width // 4, 3).swapaxes(1, 2)
        assert (cells == cells[:, :, :1, :1]).all()  # patch by patch
        red, green, blue = np.moveaxis(cells[:, :, 0, 0], -1, 0)
        assert red[2, 3] > red[0, 0] > red[0, 1] == green[0, 1] == blue[0, 1]
        assert blue[1, 2] > 200 > 60 > red[1, 2]
        np.testing.assert_array_equal(draw_map(look, 1000 * weights), drawing)

    def test_zeros_leave_the_picture(self):
        look = seen_at(CLASS_TOKEN)
        np.testing.assert_array_equal(draw_map(look, np.zeros((3, 4))), np.full((480 * 3 // 4, 480, 3), 128))

    @pytest.mark.parametrize("picture, grid", [((30, 40), (3, 4)), ((700, 500), (7, 6)), ((16, 16), (3, 5))])
    def test_the_patch_that_looks_is_framed_where_a_click_finds_it(self, picture, grid):
        patch = 1, grid[1] - 1
        look = seen_at(patch, picture, grid)
        framed = (draw_picture(look) == (0, 200, 0)).all(-1)
        rows, columns = np.nonzero(framed)
        inside = [
            (y, x)
            for y in range(0, framed.shape[0])
            for x in (columns.min(), columns.max())
            if rows.min() <= y <= rows.max()
        ]
        assert {patch_at(look, x, y) for y, x in inside} == {patch}
        outside = [(columns.min() - 1, rows.min()), (columns.min(), rows.min() - 1), (columns.min(), rows.max() + 1)]
        assert patch not in {patch_at(look, x, y) for x, y in outside}
        assert not (draw_picture(seen_at(CLASS_TOKEN, picture, grid)) == (0, 200, 0)).all(-1).any()

    def test_a_click_on_the_last_edge(self):
        assert patch_at(seen_at(CLASS_TOKEN), 480, 360) == (2, 3)


class TestWords:
    def test_of_a_map(self):
        assert (
            in_words(np.array([[0.1, 0.2], [0.4, 0.3]]))
            == "Every patch adds; the weakest counts 25 % of the strongest."
        )
        assert in_words(np.array([[0.1, -0.2], [0.4, 0.3]])) == "3 of 4 patches add, 1 are subtracted."
        assert "0 %" in in_words(np.zeros((2, 2)))

    def test_of_a_layer_that_does_not_refine(self):
        assert only_one_map("vit", [False] * 3, 1).startswith("No layer of vit refines")
        assert only_one_map("a", [False, True], 0).endswith("there is only one; layer 2 does.")
        assert only_one_map("a", [True, False, True, True], 1).endswith("layers 1, 3 and 4 do.")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_which_layers_refine(self, network, layout):
        refining = [kind != "plain" for kind in LAYOUTS[layout]]
        assert which_refine(network(attention_types=LAYOUTS[layout]).model) == refining

    def test_namesakes_among_the_classes(self):
        names = {0: "crane", 1: "gull", 2: "crane", 3: "owl"}
        found = likeliest(torch.tensor([0.0, 3.0, 2.0, 1.0]), PreTrainedConfig(id2label=names))
        assert list(found) == ["gull", "crane (2)", "owl", "crane (0)"]
        assert sum(found.values()) == pytest.approx(1)

    def test_labels_of_which_an_image_may_have_several(self):
        config = PreTrainedConfig(id2label={0: "wet", 1: "cold"}, problem_type="multi_label_classification")
        found = likeliest(torch.tensor([0.0, 100.0]), config)
        assert found == pytest.approx({"cold": 1, "wet": 0.5})


class TestPage:
    def test_classes_are_the_models_own(self, network, photo):
        tiny = network(num_labels=7)
        page = opened(tiny)
        with torch.no_grad():
            pixels = tiny.processor(Image.open(photo), return_tensors="pt").pixel_values
            expected = tiny.model(pixels).logits.softmax(-1)[0]
        found = page.view(file(photo), 4, 0)[page.classes]
        assert list(found) == [f"LABEL_{index}" for index in expected.argsort(descending=True)[:5].tolist()]
        assert list(found.values()) == pytest.approx(sorted(expected.tolist(), reverse=True)[:5], rel=1e-5)
        assert page.classes.visible

    @pytest.mark.parametrize("layer, head", [(2, 0), (4, 0), (4, 1), (4, 4)])
    def test_maps_are_those_of_look_at(self, network, photo, layer, head):
        tiny = network()
        page = opened(tiny)
        found = page.view(file(photo), layer, head)
        chosen = layer - 1, head - 1 if head else None
        before, applied = (map_of(tiny, photo, stage, *chosen) for stage in (BEFORE, APPLIED))
        np.testing.assert_array_equal(found[page.applied], draw_map(found[page.shown], applied))
        np.testing.assert_array_equal(found[page.before], draw_map(found[page.shown], before))
        assert "**The class token** looks" in found[page.who]
        assert in_words(before) in found[page.before_caption] and in_words(applied) in found[page.applied_caption]
        assert (f"head {head}" if head else "average of its heads") in found[page.applied_caption]

    def test_starts_at_the_last_layer_that_refines(self, network, vit):
        page = opened(network(attention_types=["refined", "shared_refined", "plain", "plain"]))
        assert (page.layer.value, page.layer.maximum, page.head.value) == (2, 4, 0) and "1, 2" in page.layer.info
        assert [value for _, value in page.head.choices] == [0, 1, 2, 3, 4]
        assert opened(vit).layer.value == 3

    def test_sliders_do_not_run_the_network(self, network, photo):
        tiny, runs = network(), []
        page = opened(tiny)
        tiny.model.register_forward_pre_hook(lambda *args: runs.append(1))
        look = page.view(file(photo), 4, 0)[page.shown]
        assert len(runs) == 1
        drawings = [page.draw(look, layer, head)[page.applied] for layer in range(1, 5) for head in range(5)]
        assert len({drawing.tobytes() for drawing in drawings}) == 20 and len(runs) == 1

    def test_a_patch_looks_when_it_is_clicked(self, network, photo):
        tiny, runs = network(), []
        page = opened(tiny)
        look = page.view(file(photo), 4, 0)[page.shown]
        expected = map_of(tiny, photo, APPLIED, 3, 1, [(2, 5)])
        tiny.model.register_forward_pre_hook(lambda *args: runs.append(1))
        height, width, _ = draw_picture(look).shape
        click = SimpleNamespace(index=[width - 3, height * 5 // 8])
        found = page.click(file(photo), look, 4, 2, click)
        look = found[page.shown]
        assert look.query == (2, 5) and len(runs) == 1 and look.classes
        np.testing.assert_array_equal(found[page.applied], draw_map(look, expected))
        assert "**Patch 3,6** looks" in found[page.who] and found[page.back]["visible"]
        back = page.go_back(look, 4, 2)
        assert back[page.shown].query is CLASS_TOKEN and len(runs) == 1 and not back[page.back]["visible"]

    def test_a_layer_that_does_not_refine_shows_one_map(self, network, vit, photo):
        page = opened(network())
        found = page.view(file(photo), 1, 0)
        assert found[page.before] is None and found[page.applied].any()
        assert "Layer 1 doesn't refine" in found[page.before_caption]
        page = opened(vit)
        found = page.view(file(photo), 2, 3)
        assert found[page.before] is None and "No layer of vit refines" in found[page.before_caption]
        np.testing.assert_array_equal(
            found[page.applied], draw_map(found[page.shown], map_of(vit, photo, APPLIED, 1, 2))
        )

    def test_a_model_without_classifier_shows_maps(self, photo):
        torch.manual_seed(0)
        model = RefinerModel(RefinerConfig(**TINY)).eval()
        page = opened(Network("bare", model, RefinerImageProcessor(size=dict(height=16, width=16))))
        found = page.view(file(photo), 4, 0)
        assert found[page.classes] is None and not page.classes.visible and found[page.applied].any()

    def test_vits_without_classifier_show_maps(self, vit, photo):
        page = opened(Network("bare", ViTModel(vit.model.config).eval(), vit.processor))
        assert page.view(file(photo), 1, 0)[page.classes] is None

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
    def test_pictures_of_any_mode(self, network, tmp_path, mode):
        path = str(tmp_path / "picture.tiff") if mode in ("CMYK", "I;16") else str(tmp_path / "picture.png")
        pixels = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
        picture = Image.fromarray(257 * pixels.astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels)
        picture.convert(mode).save(path) if mode != "I;16" else picture.save(path)
        page = opened(network())
        seen = page.view(file(path), 4, 0)[page.seen]
        grey = page.view(file(self.saved_grey(pixels, tmp_path)), 4, 0)[page.seen]
        if mode not in ("1", "CMYK"):
            np.testing.assert_allclose(seen.astype(int), grey.astype(int), atol=2)
        assert seen.std() > 10

    @staticmethod
    def saved_grey(pixels, tmp_path) -> str:
        Image.fromarray(pixels).convert("RGB").save(tmp_path / "grey.png")
        return str(tmp_path / "grey.png")

    def test_a_picture_on_its_side(self, network, tmp_path):
        page = opened(network())
        upright = Image.open(photo_of(tmp_path / "upright.png", 0))
        exif = Image.Exif()
        exif[0x0112] = 6
        upright.rotate(90, expand=True).save(tmp_path / "side.png", exif=exif)
        seen = [page.view(file(tmp_path / name), 4, 0)[page.seen] for name in ("upright.png", "side.png")]
        np.testing.assert_array_equal(*seen)

    @pytest.mark.parametrize("content", [b"no", b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
    def test_a_file_that_is_no_picture(self, network, photo, tmp_path, content):
        page = opened(network())
        look = page.view(file(photo), 4, 0)[page.shown]
        (tmp_path / "letter.png").write_bytes(content)
        with pytest.warns(UserWarning, match="The image letter.png can't be read"):
            found = page.view(file(tmp_path / "letter.png"), 4, 0)
        assert found[page.shown] is None and found[page.classes] is None and found[page.seen] is None
        with pytest.warns(UserWarning, match="letter.png"):  # the file was lost meanwhile: what is shown stays
            found = page.click(file(tmp_path / "letter.png"), look, 4, 0, SimpleNamespace(index=[0, 0]))
        assert found[page.shown] is look

    def test_nothing_there(self, network):
        """The picture taken away again, or a look that the server has let go."""
        page = opened(network())
        for found in (page.view(None, 4, 0), page.go_back(None, 4, 0), page.click(None, None, 4, 0, None)):
            assert found[page.shown] is None and found[page.applied] is None and found[page.seen_caption] == ""


def test_visitors_at_the_same_time_do_not_mix(network, tmp_path):
    tiny = network()
    images = [Image.open(photo_of(tmp_path / f"{seed}.png", seed)).convert("RGB") for seed in range(4)]
    alone = [view_attention(tiny, image).layers[3].stages[APPLIED] for image in images]
    looks = {}

    def visit(number: int) -> None:
        for _ in range(5):
            looks.setdefault(number, []).append(view_picture(tiny, images[number]))

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    for number, expected in enumerate(alone):
        assert len(looks[number]) == 5
        for look in looks[number]:
            np.testing.assert_allclose(look.shown.layers[3].stages[APPLIED], expected, atol=1e-6)


class TestServer:
    @pytest.fixture
    def address(self, network, photo):
        with served(network(), [photo]) as address:
            yield address

    def visitor(self, address, folder) -> Client:
        return Client(address, download_files=str(folder), verbose=False, analytics_enabled=False)

    def test_each_visitor_has_a_picture_of_his_own(self, address, network, photo, tmp_path):
        tiny, other = network(), photo_of(tmp_path / "other.png", 1)
        one, two, three = (self.visitor(address, tmp_path / name) for name in ("one", "two", "three"))
        for client, path in ((one, photo), (two, other)):
            classes, *drawn = client.predict(handle_file(path), 4, 0, api_name="/view")
            assert len(classes["confidences"]) == 5 and sum(one["confidence"] for one in classes["confidences"]) > 0.99
        for client, path in ((one, photo), (two, other)):
            drawn = client.predict(2, 3, api_name="/draw")
            look = view_picture(tiny, Image.open(path).convert("RGB"))
            np.testing.assert_array_equal(np.asarray(Image.open(drawn[1])), draw_picture(look))
            expected = draw_map(look, map_of(tiny, path, APPLIED, 1, 2))
            np.testing.assert_allclose(np.asarray(Image.open(drawn[5])).astype(int), expected, atol=1)
        nothing = three.predict(2, 3, api_name="/draw")
        assert nothing[0].startswith("Give it a picture") and nothing[2] == ""

    @pytest.mark.parametrize("layer, head", [(-1, 0), (0, 0), (5, 0), (1.5, 0), (None, 0), ("two", 0), (True, 0),
                                             (float("inf"), 0), (2, -1), (2, 99), (2, None), (2, "x")])  # fmt: skip
    def test_layers_and_heads_that_are_not_there(self, network, photo, layer, head):
        page = opened(network())
        look = view_picture(page.network, open_image(photo))
        with pytest.raises(gr.Error, match="There is no (layer|head) .*give a whole number from"):
            page.draw(look, layer, head)

    @pytest.mark.parametrize("place", [None, [1], "ab", [-1, 0], [0, 10**6], [0.5, 0], [None, 0]])
    def test_clicks_beside_the_picture(self, network, photo, place):
        page = opened(network())
        look = view_picture(page.network, open_image(photo))
        with pytest.raises(gr.Error, match="There is no|A place in a drawing"):
            _patch_clicked(look, place)

    def test_other_hosts_and_other_sites_are_refused(self, address):
        """A name of somebody else's domain for this machine, and a page elsewhere that has a browser ask."""
        own = address.rstrip("/").removeprefix("http://")
        for headers, status in (
            ({}, 200),
            ({"Origin": f"http://{own}"}, 200),
            ({"Host": own.replace("127.0.0.1", "localhost")}, 200),
            ({"Host": "evil.example"}, 400),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403),
            ({"Origin": "null"}, 403),
        ):
            for path in ("", "gradio_api/info"):
                assert httpx.get(address + path, headers=headers).status_code == status, (headers, path)
        posted = httpx.post(
            f"{address}gradio_api/call/draw", json={"data": [1, 0]}, headers={"Origin": "http://evil.example"}
        )
        assert posted.status_code == 403
        assert httpx.post(f"{address}gradio_api/call/draw", json={"data": [1, 0]}).status_code == 200

    def test_a_file_that_is_no_picture(self, address, tmp_path, capfd):
        (tmp_path / "letter.txt").write_text("no")
        classes, who, *_ = self.visitor(address, tmp_path).predict(
            handle_file(tmp_path / "letter.txt"), 4, 0, api_name="/view"
        )
        assert not classes and who.startswith("Give it a picture")
        assert "Traceback" not in "".join(capfd.readouterr())

    @pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
    def test_files_that_were_not_uploaded_stay_unseen(self, address, meta):
        """Pictures elsewhere on the machine, whose path somebody guesses."""
        secret = str(Path(matplotlib.get_data_path()) / "images" / "matplotlib.png")
        assert Path(secret).is_file()
        asked = httpx.post(
            f"{address}gradio_api/call/view", json={"data": [{"path": secret, **meta}, 4, 0]}, timeout=30
        )
        answer = httpx.get(f"{address}gradio_api/call/view/{asked.json()['event_id']}", timeout=30).text
        assert "event: " in answer and "confidences" not in answer


def test_another_host_answers_to_other_names(network, photo):
    """As in a container, whose page is asked for by another machine's name. Other sites' pages still can't use it."""
    with served(network(), [photo], host="0.0.0.0") as address:
        at_home = address.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(at_home, headers={"Host": "photos.example"}, timeout=30).status_code == 200
        refused = httpx.get(at_home, headers={"Host": "photos.example", "Origin": "http://evil.example"}, timeout=30)
        assert refused.status_code == 403


class TestCommand:
    def test_offers_the_examples_of_the_folder(self, folder, monkeypatch):
        write_folder(folder, 2, ("examples",))
        (folder / "examples" / "answers.json").write_text("{}")
        given = {}
        monkeypatch.setattr(
            "refiner_hf.demo.app.launch", lambda *args: given.update(demo=build_demo(*args[:2]), args=args[2:])
        )
        main(["--model", str(folder), "--port", "7999", "--device", "cpu"])
        assert given["args"] == (7999, False, "127.0.0.1") and given["demo"].title == "Where tiny looks"
        assert find_examples(str(folder)) == [folder / "examples" / f"{i}.png" for i in range(2)]
        (offered,) = (block for block in given["demo"].blocks.values() if isinstance(block, gr.Dataset))
        assert len(offered.samples) == 2
        assert find_examples("no/such-model") == []

    @pytest.mark.parametrize(
        "words, says",
        [(["--model", "/nowhere/at/all"], "no folder /nowhere/at/all"), (["--device", "cuda:7"], "no cuda:7 here")],
    )
    def test_errors_are_said(self, folder, words, says, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit, match=f"Error: .*{says}"):
            main(["--model", str(folder), *words])

    @pytest.mark.parametrize("port", ["taken", 99999])
    def test_a_port_that_can_not_be_had(self, network, port):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            number = taken.getsockname()[1] if port == "taken" else port
            with pytest.raises(OSError, match=f"Port {number} can't be opened"):
                launch(network(), port=number)

    def test_without_gradio(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "refiner_hf.demo.app")
        monkeypatch.delattr("refiner_hf.demo.app")
        monkeypatch.delitem(sys.modules, "refiner_hf.commands.demo")
        with pytest.raises(SystemExit, match=r"needs gradio\. Install it with: pip install 'refiner_hf\[demo\]'"):
            refiner(["demo", "--model", "/nowhere/at/all"])


PROGRAM = """
import sys
from PIL import Image
from refiner_hf.commands.demo import main
main(["--model", sys.argv[1], "--port", sys.argv[2], "--device", "cpu"])
"""


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 0), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_uploads_are_gone_when_it_ends(number, code, folder, tmp_path, photo):
    """An upload that is named like a folder ended the cleaning in a traceback, and the others stayed."""
    place = tmp_path / "temporary"
    place.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    environment.pop("GRADIO_TEMP_DIR")
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert "in a browser" in server.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        client = Client(address, download_files=str(tmp_path / "down"), verbose=False, analytics_enabled=False)
        client.predict(handle_file(photo), 4, 0, api_name="/view")
        client.predict(2, 1, api_name="/draw")
        files = [path for path in place.rglob("*") if path.is_file()]
        assert files
        httpx.post(f"{address}/gradio_api/call/view", json={"data": [{"path": str(files[0].parent)}, 4, 0]})
        httpx.post(f"{address}/gradio_api/upload", files={"files": ("..", b"x")})
        time.sleep(0.5)
        server.send_signal(number)
        _, errors = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode == code and "Traceback" not in errors, errors
    assert not [path for path in place.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no browser")
class TestBrowser:
    @pytest.fixture
    def address(self, folder, tmp_path):
        """The command at work in a process of its own."""
        write_folder(folder, 2, ("examples",))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["-m", "refiner_hf", "demo", "--model", folder, "--port", str(port), "--device", "cpu"]
        log = tmp_path / "log.txt"
        with log.open("w") as output:
            server = subprocess.Popen([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT)
        try:
            begun = time.monotonic()
            while "in a browser" not in log.read_text():
                assert server.poll() is None and time.monotonic() - begun < 120, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
            assert "Traceback" not in log.read_text()
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            server.kill()

    @pytest.fixture
    def page(self, tmp_path):
        playwright = pytest.importorskip("playwright.sync_api")
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.set_default_timeout(60_000)
            yield page
            browser.close()

    def test_a_visit(self, address, page, photo, network, tmp_path):
        asked, mistakes = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: mistakes.append(error))
        page.goto(address)
        page.get_by_role("heading", name="tiny").wait_for()
        assert page.title() == "Where tiny looks"
        assert page.locator("a", has_text="2106.03714").get_attribute("href") == "https://arxiv.org/abs/2106.03714"
        drawings = page.locator(".drawing img")

        def wait_for(text: str, instead_of: list[str]) -> list[str]:
            """The drawings' addresses, once the page says this and the last drawing is a new one."""
            page.get_by_text(text).first.wait_for()
            last = "[...document.querySelectorAll('.drawing img')].at(-1)?.getAttribute('src')"
            page.wait_for_function(f"old => ({last} ?? old) !== old", arg=instead_of[-1] if instead_of else "")
            return [drawing.get_attribute("src") for drawing in drawings.all()]

        page.locator("input[type=file]").set_input_files(photo)
        first = wait_for("The map that layer 4 looks with, the average of its heads.", [])
        answer = next(iter(view_picture(network(), Image.open(photo).convert("RGB")).classes))
        assert page.get_by_test_id("label-output-value").inner_text().strip() == answer
        assert len(set(first)) == 3 and page.locator(".uploaded img").is_visible()

        page.get_by_role("radio", name="2", exact=True).check()
        head = wait_for("The map that layer 4 looks with, head 2.", first)
        assert head[0] == first[0] and not set(head[1:]) & set(first)

        box = drawings.nth(2).bounding_box()
        drawings.nth(2).click(position={"x": box["width"] * 4.5 / 6, "y": box["height"] * 2.5 / 4})
        clicked = wait_for("Patch 3,5 looks.", head)
        assert len(set(clicked)) == 3 and not set(clicked) & set(head)
        page.screenshot(path=tmp_path / "page.png")

        page.get_by_role("button", name="Back to the class token").click()
        assert wait_for("The class token looks.", clicked) == head

        page.get_by_role("spinbutton").fill("3")
        page.get_by_role("spinbutton").press("Enter")
        plain = wait_for("Layer 3 doesn't refine its map", head)
        assert len(plain) == 2

        page.locator(".gallery-item").first.click()
        example = wait_for("The class token looks.", plain)
        assert example[0] != first[0]

        (tmp_path / "letter.png").write_text("no")
        page.get_by_role("button", name="Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.get_by_text("Give it a picture").wait_for()
        drawings.first.wait_for(state="detached")
        page.locator("input[type=file]").set_input_files(tmp_path / "letter.png")
        page.get_by_text("The image letter.png can't be read").first.wait_for()
        assert drawings.count() == 0 and not mistakes
        assert all(url.startswith((address, "data:", "blob:")) for url in asked)
