import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)

from refiner_hf.commands.predict import main
from refiner_hf.export import engines
from refiner_hf.prediction import predict as prediction
from refiner_hf.prediction.classifiers import TorchClassifier, open_classifier
from refiner_hf.prediction.predict import predict
from refiner_hf.prediction.scores import probabilities
from refiner_hf.prediction.table import AnswerTable, part_of, whole_rows
from refiner_hf.prepacking_refiner import prepacked
from refiner_hf.utils import machine
from refiner_hf.utils.image_files import find_images

from ..conftest import save_with_processor
from ..images import write_folder
from ..test_native import needs_compiler


ROOT = Path(__file__).parents[2]


def vit_config(**overrides) -> ViTConfig:
    labels = ["cat, tabby", 'a "dog"', "bird", "fish"]
    size = dict(image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
    usual = dict(intermediate_size=32, initializer_range=0.2, id2label=dict(enumerate(labels)), **size)
    torch.manual_seed(0)
    return ViTConfig(**usual | overrides)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


def save_vit(folder: Path, kind=ViTForImageClassification, **overrides) -> str:
    kind(vit_config(**overrides)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def refiner(tiny_model, tmp_path):
    model = tiny_model(layerscale_value=1.0)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return str(save_with_processor(model, tmp_path / "refiner"))


def export(network: torch.nn.Module, file: Path, output: str = "logits") -> None:
    torch.onnx.export(
        network.eval(),
        (torch.zeros(2, 3, 16, 16),),
        str(file),
        input_names=["pixel_values"],
        output_names=[output],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )


class Logits(torch.nn.Module):
    def __init__(self, model: ViTForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


@pytest.fixture(scope="module")
def exported(vit, tmp_path_factory):
    """The same ViT as a graph."""
    folder = tmp_path_factory.mktemp("models") / "onnx"
    folder.mkdir()
    export(Logits(ViTForImageClassification.from_pretrained(vit)), folder / "model.onnx")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(Path(vit) / name, folder)
    return folder


@pytest.fixture
def onnx(exported, tmp_path):
    return str(shutil.copytree(exported, tmp_path / "onnx"))


@pytest.fixture
def photos(tmp_path):
    return str(write_folder(tmp_path / "photos", per_label=4))


@pytest.fixture
def table(tmp_path):
    return tmp_path / "answers" / "answers.csv"


@pytest.fixture
def asked(monkeypatch):
    """How many images models were asked about."""
    batches = []
    scores = TorchClassifier.scores

    def count(classifier, pixel_values):
        batches.append(len(pixel_values))
        return scores(classifier, pixel_values)

    monkeypatch.setattr(TorchClassifier, "scores", count)
    return batches


def rows_of(table: Path) -> list[list[str]]:
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def assert_same_answers(rows, others, tolerance=2e-6):
    assert [row[::2][:1] + row[1::2] for row in rows] == [row[::2][:1] + row[1::2] for row in others]
    for row, other in zip(rows[1:], others[1:]):
        np.testing.assert_allclose(np.array(row[2::2], float), np.array(other[2::2], float), atol=tolerance)


def run(model, images, table, *words) -> None:
    images = [images] if isinstance(images, str) else images
    main(["--model", model, "--images", *images, "--output_file", str(table), "--num_workers", "0", *words])


class TestAnswers:
    @pytest.mark.parametrize("kind", ["vit", "refiner"])
    def test_are_those_of_the_pipeline(self, kind, photos, table, request):
        model = request.getfixturevalue(kind)
        result = predict(model, photos, table, top_k=3, batch_size=5, num_workers=2)
        rows = rows_of(table)
        assert rows[0] == ["file", "label", "score", "label_2", "score_2", "label_3", "score_3"]
        files = sorted(str(file) for file in Path(photos).rglob("*.png"))
        assert [row[0] for row in rows[1:]] == files and len(files) == 12
        for row, expected in zip(rows[1:], pipeline("image-classification", model, device="cpu")(files, top_k=3)):
            assert row[1::2] == [answer["label"] for answer in expected]
            np.testing.assert_allclose(
                [float(score) for score in row[2::2]], [answer["score"] for answer in expected], atol=2e-6
            )
            assert all(len(score.split(".")[1]) == 6 for score in row[2::2])
        assert result.labels.total() == 12 and set(result.labels) == {row[1] for row in rows[1:]}
        assert os.listdir(table.parent) == ["answers.csv"]

    def test_do_not_depend_on_the_batch(self, refiner, photos, tmp_path):
        for size in (1, 12):
            predict(refiner, photos, tmp_path / f"{size}.csv", top_k=5, batch_size=size, num_workers=0)
        assert_same_answers(rows_of(tmp_path / "1.csv"), rows_of(tmp_path / "12.csv"))

    def test_all_labels_where_more_are_asked_for(self, vit, photos, table):
        predict(vit, photos, table, top_k=100, num_workers=0)
        rows = rows_of(table)
        assert rows[0][-1] == "score_4" and {len(row) for row in rows} == {9}
        for row in rows[1:]:
            scores = [float(score) for score in row[2::2]]
            assert sum(scores) == pytest.approx(1, abs=1e-5) and scores == sorted(scores, reverse=True)
            assert set(row[1::2]) == set(vit_config().id2label.values())

    def test_several_labels_at_once(self, photos, tmp_path, table):
        model = save_vit(tmp_path / "multi", problem_type="multi_label_classification")
        predict(model, photos, table, top_k=4, num_workers=0)
        expected = pipeline("image-classification", model, device="cpu")(f"{photos}/blue/0.png", top_k=4)
        row = rows_of(table)[1]
        assert row[1::2] == [answer["label"] for answer in expected]
        np.testing.assert_allclose(np.array(row[2::2], float), [each["score"] for each in expected], atol=2e-6)
        assert abs(sum(float(score) for score in row[2::2]) - 1) > 0.01

    def test_of_half_precision_are_computed_in_float32(self, tmp_path, photos, table):
        model = ViTForImageClassification(vit_config()).bfloat16()
        model.save_pretrained(tmp_path / "half")
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "half")
        assert open_classifier(str(tmp_path / "half")).logits(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
        predict(str(tmp_path / "half"), photos, table, num_workers=0)

    @needs_compiler
    def test_of_a_refiner_are_computed_with_packed_weights(self, refiner):
        classifier = open_classifier(refiner)
        assert prepacked(classifier._model.refiner.layers[0].mlp.fc1.weight.detach()) is not None
        half = open_classifier(refiner, precision="bfloat16") if machine.computes_bfloat16("cpu") else None
        assert half is None or half.logits(torch.zeros(1, 3, 16, 16)).dtype == torch.bfloat16

    def test_in_bfloat16(self, vit, photos, tmp_path, monkeypatch):
        if not machine.computes_bfloat16("cpu"):
            pytest.skip("this CPU has no bfloat16")
        run(vit, photos, tmp_path / "full.csv")
        run(vit, photos, tmp_path / "half.csv", "--precision", "bfloat16")
        exact, rough = rows_of(tmp_path / "full.csv"), rows_of(tmp_path / "half.csv")
        assert exact != rough
        assert_same_answers(rough, exact, 0.05)
        monkeypatch.setattr(machine, "_cpu_lines", lambda: ["model name : old", "flags : sse2 avx2 avx512f"])
        with pytest.raises(SystemExit, match="cpu can't compute in bfloat16, or only slowly: drop --precision"):
            run(vit, photos, tmp_path / "other.csv", "--precision", "bfloat16")
        assert not (tmp_path / "other.csv").exists()


class TestParquet:
    def test_has_the_same_answers(self, vit, photos, table):
        predict(vit, photos, table, top_k=2, num_workers=0)
        run(vit, photos, table.with_suffix(".parquet"), "--top_k", "2")
        assert sorted(os.listdir(table.parent)) == ["answers.csv", "answers.parquet"]
        found, rows = load_dataset("parquet", data_files=str(table.with_suffix(".parquet")))["train"], rows_of(table)
        assert found.column_names == rows[0]
        for row, expected in zip(found, rows[1:], strict=True):
            assert [row["file"], row["label"], row["label_2"]] == [expected[0], expected[1], expected[3]]
            assert (row["score"], row["score_2"]) == pytest.approx((float(expected[2]), float(expected[4])), abs=1e-6)

    @pytest.mark.parametrize("kind", ["vit", "refiner"])
    def test_features(self, kind, photos, table, request, monkeypatch):
        """They are what the head gets; more rows than are written at a time, too."""
        monkeypatch.setattr("refiner_hf.prediction.parquet._AT_A_TIME", 5)
        name, file = request.getfixturevalue(kind), table.with_suffix(".parquet")
        predict(name, photos, file, features=True, batch_size=5, num_workers=0)
        found = load_dataset("parquet", data_files=str(file))["train"]
        classifier = open_classifier(name)
        for row in found:
            pixels = classifier.processor(Image.open(row["file"]).convert("RGB"), return_tensors="pt").pixel_values
            with torch.no_grad():
                tokens = classifier._model.base_model(pixels).last_hidden_state[0, 0]
            np.testing.assert_allclose(row["features"], tokens, atol=1e-5)
            head = classifier._model.classifier(tokens)
            assert classifier.labels[head.argmax()] == row["label"] or kind == "refiner"  # which has a dense head, too
        assert len(found) == 12

    def test_goes_on(self, vit, photos, table, asked):
        file = table.with_suffix(".parquet")
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(prediction.AnswerTable, "finish", lambda self, convert: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                predict(vit, photos, file, features=True, num_workers=0)
        asked.clear()
        with pytest.raises(ValueError, match="features was True and is now False"):
            predict(vit, photos, file, num_workers=0)
        predict(vit, photos, file, features=True, num_workers=0)
        assert asked == [] and os.listdir(table.parent) == ["answers.parquet"]
        assert len(load_dataset("parquet", data_files=str(file))["train"][0]["features"]) == 24

    def test_refused(self, vit, onnx, photos, table, monkeypatch):
        with pytest.raises(ValueError, match="let its name end in .parquet"):
            predict(vit, photos, table, features=True)
        with pytest.raises(ValueError, match="model.onnx gives no features, only answers"):
            predict(onnx, photos, table.with_suffix(".parquet"), features=True)
        monkeypatch.setattr(prediction, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="pip install pyarrow"):
            predict(vit, photos, table.with_suffix(".parquet"))


class TestSeveralProcesses:
    def start(self, model, photos, table, *words, count=2):
        """As torchrun does; returns what was printed."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += ["-m", "refiner_hf", "predict", "--model", model, "--images", photos, "--output_file", str(table)]
        command += ["--num_workers", "0", "--batch_size", "2", "--device", "cpu", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    def test_make_one_table(self, vit, photos, table):
        """Also of what others, who were interrupted, have left; unreadable files are listed once."""
        predict(vit, photos, table, num_workers=0)
        expected = rows_of(table)
        Path(photos, "blue", "broken.png").write_text("no")
        together = table.with_name("together.csv")
        facts = {"model": open_classifier(vit).digest(), "top_k": 1, "features": False, "precision": "float32"}
        for part, row in ((together, expected[3]), (part_of(together, 5), expected[2])):
            with AnswerTable(part, expected[0], facts) as left:
                left.add([row[:1] + ["left over", "0.5"]])
        run = self.start(vit, photos, together)
        assert run.returncode == 0, run.stderr
        rows = rows_of(together)
        assert [row[0] for row in rows] == [row[0] for row in expected]
        assert [row[1] for row in rows[2:4]] == ["left over"] * 2
        assert_same_answers(rows[:2] + rows[4:], expected[:2] + expected[4:])
        assert run.stdout.count("12 images:") == 1 and run.stderr.count("Images that can't be read: 1") == 1
        assert sorted(os.listdir(table.parent)) == ["answers.csv", "together.csv"]

    def test_one_goes_on_where_several_were(self, vit, photos, table, asked):
        predict(vit, photos, table, num_workers=0)
        facts = {"model": open_classifier(vit).digest(), "top_k": 1, "features": False, "precision": "float32"}
        again, rows = table.with_name("b.csv"), rows_of(table)
        for number in (0, 1):
            with AnswerTable(part_of(again, number), rows[0], facts) as left:
                left.add(rows[1 + 3 * number : 4 + 3 * number])
        asked.clear()
        predict(vit, photos, again, num_workers=0)
        assert sum(asked) == 6
        assert sorted(rows_of(again)) == sorted(rows) and sorted(os.listdir(table.parent)) == ["answers.csv", "b.csv"]

    def test_parts_of_another_model(self, vit, photos, table):
        table.parent.mkdir()
        with AnswerTable(part_of(table, 1), ["file", "label", "score"], {"model": "another"}) as left:
            left.add([["a", "b", "0.5"]])
        with pytest.raises(ValueError, match="model was 'another'"):
            predict(vit, photos, table, num_workers=0)


class TestExported:
    @pytest.mark.parametrize("words", [[], ["--engine", "onnxruntime"], ["--engine", "openvino"]])
    def test_answers_as_the_model_does(self, vit, onnx, photos, tmp_path, words):
        """Batches of other sizes among them."""
        usual = ["--top_k", "4", "--batch_size", "5"]
        run(vit, photos, tmp_path / "torch.csv", *usual)
        for name, model in (("folder", onnx), ("file", f"{onnx}/model.onnx")):
            run(model, photos, tmp_path / f"{name}.csv", *usual, *words)
            assert_same_answers(rows_of(tmp_path / f"{name}.csv"), rows_of(tmp_path / "torch.csv"), 1e-5)

    def test_in_bfloat16(self, vit, onnx, photos, tmp_path):
        """The scores differ a little, and a table isn't continued with those."""
        if not engines.has_bfloat16("openvino"):
            pytest.skip("this CPU has no bfloat16")
        words = ["--engine", "openvino", "--precision", "bfloat16"]
        run(vit, photos, tmp_path / "torch.csv")
        run(onnx, photos, tmp_path / "half.csv", *words)
        exact, rough = rows_of(tmp_path / "torch.csv"), rows_of(tmp_path / "half.csv")
        assert exact != rough
        assert_same_answers(rough, exact, 0.05)
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(prediction.AnswerTable, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                predict(onnx, photos, tmp_path / "begun.csv", num_workers=0)
        with pytest.raises(SystemExit, match="precision was 'float32' and is now 'bfloat16'"):
            run(onnx, photos, tmp_path / "begun.csv", *words)

    def test_engines_are_for_exported_ones(self, vit, onnx, photos, table, monkeypatch):
        with pytest.raises(SystemExit, match=f"--engine is for exported models .* and {vit} is none"):
            run(vit, photos, table, "--engine", "openvino")
        with pytest.raises(SystemExit, match="give --engine openvino"):
            run(onnx, photos, table, "--precision", "bfloat16")
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(SystemExit, match=r"needs openvino. Install it with: pip install 'refiner_hf\[export\]'"):
            run(onnx, photos, table, "--engine", "openvino")
        assert not table.exists()

    def test_a_folder_with_both_is_transformers(self, vit, onnx, photos, tmp_path, table, asked):
        shutil.copytree(vit, onnx, dirs_exist_ok=True)
        predict(onnx, photos, table, num_workers=0)
        assert asked == [12]

    def test_what_is_wrong_is_said(self, onnx, vit, photos, table, tmp_path, monkeypatch):
        def message(model) -> str:
            with pytest.raises(SystemExit) as error:
                run(model, photos, table)
            assert not table.exists()
            return str(error.value)

        file = Path(onnx) / "model.onnx"
        assert "no file nothing.onnx" in message("nothing.onnx")
        config = json.loads((Path(onnx) / "config.json").read_text())
        config["id2label"] = {"0": "one", "1": "two"}
        (Path(onnx) / "config.json").write_text(json.dumps(config))
        assert "2 labels" in message(onnx)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert "model.onnx is damaged" in message(onnx)
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert "pip install 'refiner_hf[export]'" in message(onnx)

    def test_another_kind_of_graph(self, onnx, photos, table):
        export(torch.nn.Flatten(), Path(onnx) / "model.onnx", "features")
        with pytest.raises(SystemExit, match="takes pixel_values and gives features"):
            run(onnx, photos, table)


class TestFiles:
    @pytest.fixture
    def tree(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in (
            "a/2.png", "a/1.JPG", "a/deep/er/3.webp", "a/.hidden.png", "a/.cache/4.png", "a/notes.txt", "b/odd[1].png",
            "b/without_extension", "empty/notes.txt",
        ):  # fmt: skip
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    @pytest.mark.parametrize(
        "given, found",
        [
            (["a"], ["a/1.JPG", "a/2.png", "a/deep/er/3.webp"]),
            (["./a/"], ["./a/1.JPG", "./a/2.png", "./a/deep/er/3.webp"]),
            (["a/**/*.webp"], ["a/deep/er/3.webp"]),
            (["a/**"], ["a/1.JPG", "a/2.png", "a/deep/er/3.webp", "a/notes.txt"]),
            (["*/?.png"], ["a/2.png"]),
            (["b/odd[1].png", "b/without_extension"], ["b/odd[1].png", "b/without_extension"]),
            (["b", "a/2.png", "a/deep", "a/*.png", "./a/2.png"], ["./a/2.png", "a/deep/er/3.webp", "b/odd[1].png"]),
            (["a/.cache"], ["a/.cache/4.png"]),
        ],
    )
    def test_are_found(self, tree, given, found):
        assert find_images(given) == found

    @pytest.mark.parametrize(
        "given, message",
        [
            ("empty", "no images in the folder empty"),
            ("c/*.png", r"c/\*.png"),
            ("a/9.png", "no file or folder a/9.png"),
        ],
    )
    def test_that_are_not_there(self, tree, given, message):
        with pytest.raises(SystemExit, match=message):
            run("no model is asked for", ["a", given], "answers.csv")

    def test_names_of_all_kinds(self, vit, photos, tmp_path, table):
        folder = os.fsencode(tmp_path / "names")
        os.mkdir(folder)
        names = [
            b"a,b.png",
            b'quo"ted".png',
            b"two\r\nlines.png",
            b"cr\r.png",
            b"caf\xe9.png",
            "schön 猫.png".encode(),
        ]
        for name in names:
            shutil.copy(f"{photos}/red/0.png", os.path.join(folder, name))
        predict(vit, os.fsdecode(folder), table, num_workers=2, batch_size=2)
        rows = rows_of(table)
        shown = {os.path.basename(row[0]).encode() for row in rows[1:]}
        assert shown == {*names} - {b"caf\xe9.png"} | {rb"caf\xe9.png"}
        assert {tuple(row[1:]) for row in rows[1:]} == {tuple(rows[1][1:])}  # the same picture


class TestImages:
    def test_of_every_mode(self, vit, tmp_path, table):
        """They answer as the RGB image that they show."""
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
        colours = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        grey, rgb = Image.fromarray(pixels), Image.fromarray(colours)
        folder = tmp_path / "modes"
        folder.mkdir()
        grey.save(folder / "grey_8.png")
        grey.convert("RGB").save(folder / "grey_as_rgb.png")
        Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / "grey_16.png")
        rgb.save(folder / "rgb.png")
        alpha = Image.fromarray(pixels)
        Image.merge("RGBA", (*rgb.split(), alpha)).save(folder / "rgb_transparent.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees to see it upright
        rgb.transpose(Image.Transpose.ROTATE_90).save(folder / "rgb_turned.png", exif=exif)
        predict(vit, folder, table, top_k=4, num_workers=0, batch_size=4)
        answers = {Path(row[0]).stem: row[1:] for row in rows_of(table)[1:]}
        assert answers["grey_8"] == answers["grey_16"] == answers["grey_as_rgb"] != answers["rgb"]
        assert answers["rgb"] == answers["rgb_transparent"] == answers["rgb_turned"]

    @pytest.fixture
    def damaged(self, photos):
        whole = Path(photos, "blue/1.png").read_bytes()
        Path(photos, "blue/1.png").write_bytes(whole[: len(whole) // 2])
        Path(photos, "green/text.jpg").write_text("no picture")
        Image.fromarray(np.zeros((9, 9), np.float32)).save(f"{photos}/red/floats.tiff")
        os.symlink("nowhere", f"{photos}/red/lost.png")
        return {
            f"{photos}/blue/1.png",
            f"{photos}/green/text.jpg",
            f"{photos}/red/floats.tiff",
            f"{photos}/red/lost.png",
        }

    @pytest.mark.parametrize("words", [[], ["--num_workers", "2", "--batch_size", "3"]])
    def test_that_are_damaged_are_listed(self, vit, photos, damaged, table, capsys, words):
        run(vit, photos, table, *words)
        files = [row[0] for row in rows_of(table)[1:]]
        assert len(files) == 11 and files == sorted(files) and not damaged & set(files)
        out, err = capsys.readouterr()
        assert "11 images" in out and str(table) in out
        listed = err[err.index("Images that can't be read: 4") :].splitlines()[1:]
        assert {line.split(": ")[0].strip() for line in listed} == damaged
        assert all(len(line.split(": ", 1)[1]) > 10 for line in listed)

    def test_a_whole_batch_of_damaged_ones(self, vit, photos, damaged, table):
        predict(vit, photos, table, batch_size=1, num_workers=0)
        assert len(rows_of(table)) == 12

    def test_none_that_can_be_read(self, vit, photos, damaged, table):
        with pytest.raises(SystemExit, match=r"(?s)None of the images.*text.jpg: "):
            run(vit, [f"{photos}/green/text.jpg", f"{photos}/blue/1.png"], table)
        assert os.listdir(table.parent) == []


class Stop(BaseException):
    """As if the process had ended here."""


class TestGoingOn:
    @pytest.fixture
    def break_off(self, photos, table, monkeypatch):
        """A run that ends before its third batch of five."""

        def broken_run(model, **options):
            with monkeypatch.context() as patch:
                read_ahead = prediction._read_ahead

                def two_batches(*args):
                    for i, batch in enumerate(read_ahead(*args)):
                        if i == 2:
                            raise Stop
                        yield batch

                patch.setattr(prediction, "_read_ahead", two_batches)
                with pytest.raises(Stop):
                    predict(model, photos, table, batch_size=5, num_workers=0, **options)
            assert not table.exists()
            return table.with_name("answers.csv.partial")

        return broken_run

    @pytest.mark.parametrize("cut", [0, 1, 2, 9])
    def test_gives_the_same_file(self, vit, photos, table, tmp_path, break_off, asked, cut):
        """Also where the last row was cut off within the line's end, or earlier; and asks for no finished image."""
        predict(vit, photos, tmp_path / "whole.csv", batch_size=5, num_workers=0, top_k=2)
        partial = break_off(vit, top_k=2)
        partial.write_bytes(partial.read_bytes()[: -cut or None])
        asked.clear()
        result = predict(vit, photos, table, batch_size=5, num_workers=0, top_k=2)
        assert sum(asked) == (2 if cut == 0 else 3)
        assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()
        assert result.labels.total() == 12
        assert os.listdir(table.parent) == ["answers.csv"]

    def test_at_every_byte(self, vit, table, photos, tmp_path):
        """Of names and labels that need quotes, whole rows are kept, and nothing else."""
        folder = tmp_path / "names"
        folder.mkdir()
        for name in ('a "b",\r\nc.png', "d\né.png", "e.png"):
            shutil.copy(f"{photos}/red/0.png", folder / name)
        predict(vit, folder, table, num_workers=0, top_k=4)
        content, rows = table.read_bytes(), rows_of(table)
        kept = set()
        for length in range(len(content) + 1):
            table.write_bytes(content[:length])
            found, used = whole_rows(table)
            assert found == rows[: len(found)] and used <= length
            assert used in (0, *kept) or used == length
            kept.add(used)
        assert len(kept) == len(rows) + 1

    def test_unreadable_ones_are_listed_again(self, vit, photos, table, break_off):
        Path(photos, "blue/1.png").write_text("no picture")
        break_off(vit)
        result = predict(vit, photos, table, num_workers=0)
        assert list(result.unreadable) == [f"{photos}/blue/1.png"] and len(rows_of(table)) == 12

    @pytest.mark.parametrize("change", ["weights", "top_k", "labels", "processor", "images", "facts"])
    def test_not_with_something_else(self, vit, photos, table, tmp_path, break_off, change):
        partial = break_off(vit)
        content = partial.read_bytes()
        model, images, words = str(shutil.copytree(vit, tmp_path / "other")), photos, []
        if change == "weights":
            other = ViTForImageClassification.from_pretrained(model)
            with torch.no_grad():
                other.classifier.bias[0] += 1
            other.save_pretrained(model)
        elif change == "top_k":
            words = ["--top_k", "2"]
        elif change == "labels":
            other = ViTForImageClassification.from_pretrained(model)
            other.config.id2label[0] = "dog, tabby"
            other.save_pretrained(model)
        elif change == "processor":
            ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0, 0, 0]).save_pretrained(model)
        elif change == "images":
            images = f"{photos}/red"
        elif change == "facts":
            partial.with_name(partial.name + ".json").unlink()
        with pytest.raises(
            SystemExit, match=r"answers\.csv\.partial holds answers|answers\.csv\.partial holds the"
        ) as e:
            run(model, images, table, *words)
        expected = {"top_k": "top_k", "images": "blue/0.png"}.get(change, "model")
        assert expected in str(e.value) and ("model" in str(e.value)) == (expected == "model")
        assert partial.read_bytes() == content and not table.exists()

    def test_with_the_same_model_elsewhere(self, vit, photos, table, tmp_path, break_off, asked):
        break_off(vit)
        asked.clear()
        run(str(shutil.copytree(vit, tmp_path / "moved")), photos, table, "--batch_size", "1")
        assert asked == [1, 1]

    def test_after_the_last_row(self, vit, photos, table, asked):
        """Killed between the last row and the table's name."""
        predict(vit, photos, table, num_workers=0)
        content = table.read_bytes()
        table.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prediction.AnswerTable, "finish", lambda self: None)
            predict(vit, photos, table, num_workers=0)
        assert not table.exists()
        asked.clear()
        predict(vit, photos, table, num_workers=0)
        assert not asked and table.read_bytes() == content


class TestPlace:
    def test_is_never_overwritten(self, photos, table):
        table.parent.mkdir()
        table.write_text("mine")
        with pytest.raises(SystemExit, match="answers.csv exists already"):
            run("no model is asked for", photos, table)
        assert table.read_text() == "mine"

    def test_nor_what_comes_there_meanwhile(self, vit, photos, table, monkeypatch):
        scores = TorchClassifier.scores

        def slow(classifier, pixel_values):
            table.write_text("mine")
            return scores(classifier, pixel_values)

        monkeypatch.setattr(TorchClassifier, "scores", slow)
        with pytest.raises(SystemExit, match="answers.csv exists already"):
            run(vit, photos, table)
        assert table.read_text() == "mine" and len(rows_of(table.with_name("answers.csv.partial"))) == 13

    def test_that_can_not_be_written(self, photos, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(SystemExit, match="file can't be written"):
            run("no model is asked for", photos, tmp_path / "file" / "answers.csv")

    @pytest.mark.parametrize("words", [["--top_k", "0"], ["--batch_size", "0"], ["--num_workers", "-1"]])
    def test_options_that_make_no_sense(self, photos, table, words):
        with pytest.raises(SystemExit, match=f"{words[0][2:]} must be at least"):
            run("no model is asked for", photos, table, *words)


class TestModels:
    def refused(self, model, photos, table) -> str:
        with pytest.raises(SystemExit) as error:
            run(str(model), photos, table)
        assert str(error.value).startswith("Error: ") and not any(table.parent.glob("*"))
        return str(error.value)

    def test_a_backbone(self, photos, table, tmp_path):
        model = save_vit(tmp_path / "backbone", ViTModel)
        assert "they lack classifier.bias, classifier.weight. Is" in self.refused(model, photos, table)

    def test_of_another_kind(self, photos, table, tmp_path):
        size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
        BertModel(BertConfig(**size)).save_pretrained(tmp_path / "bert")
        assert "'bert' model, which isn't an image" in self.refused(tmp_path / "bert", photos, table)

    def test_damaged_weights(self, vit, photos, table, tmp_path):
        weights = shutil.copytree(vit, tmp_path / "damaged") / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        assert "damaged" in self.refused(tmp_path / "damaged", photos, table)

    def test_weights_of_another_size(self, vit, photos, table, tmp_path):
        folder = shutil.copytree(vit, tmp_path / "other")
        vit_config(intermediate_size=48).save_pretrained(folder)
        assert "don't fit its network (ViTForImageClassification): they have another shape" in self.refused(
            folder, photos, table
        )

    def test_not_finite(self, photos, tmp_path, table):
        model = ViTForImageClassification(vit_config())
        with torch.no_grad():
            model.classifier.bias[1] = torch.nan
        model.save_pretrained(tmp_path / "nan")
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "nan")
        with pytest.raises(SystemExit, match="NaN or infinity in classifier.bias"):
            run(str(tmp_path / "nan"), photos, table)
        assert not list(table.parent.glob("*.partial*"))  # nothing stands in another model's way

    def test_without_a_processor_or_at_all(self, vit, photos, table, tmp_path):
        folder = shutil.copytree(vit, tmp_path / "bare")
        (folder / "preprocessor_config.json").unlink()
        self.refused(folder, photos, table)
        self.refused(tmp_path / "nothing", photos, table)


class TestCommand:
    def test_tells_what_it_saw(self, vit, photos, table, capsys):
        run(vit, photos, table)
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines[0] == "12 images:" and lines[-1] == f"Wrote {table}"
        counts = [int(line.rsplit(": ", 1)[1]) for line in lines[1:-1]]
        assert sum(counts) == 12 and counts == sorted(counts, reverse=True)
        assert "12/12" in err and "can't be read" not in err

    def test_interrupted_and_given_again(self, vit, photos, table, tmp_path, capsys):
        """In a process of its own. Its last image is a pipe into which nobody writes, so Ctrl-C finds it waiting."""
        words = ["--model", vit, "--images", photos, "--output_file", str(table)]
        words += ["--batch_size", "1", "--num_workers", "2"]
        os.mkfifo(f"{photos}/waiting.png")
        partial = table.with_name("answers.csv.partial")
        process = subprocess.Popen(
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.default_int_handler
            ),  # whoever runs the tests may ignore it
            args=[sys.executable, "-m", "refiner_hf", "predict", *words],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and not (partial.exists() and len(rows_of(partial)) == 13):
            assert time.monotonic() < deadline, "the rows don't come"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to its workers, too
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err
        assert f"{partial} keeps 12 answers; the same command continues after them." in err

        os.unlink(f"{photos}/waiting.png")
        shutil.copy(f"{photos}/red/0.png", f"{photos}/waiting.png")
        main(words)
        assert "13 images:" in capsys.readouterr().out
        predict(vit, photos, tmp_path / "whole.csv", batch_size=1, num_workers=0)
        assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_answers_that_are_not_finite_are_no_answers(vit, photos, table, monkeypatch):
    """Of pictures, though the network was tried out when it was opened."""
    monkeypatch.setattr(TorchClassifier, "logits", lambda self, pixels: torch.full((len(pixels), 4), torch.nan))
    with pytest.raises(SystemExit, match="answers with numbers that aren't finite"):
        run(vit, photos, table)
    assert not table.exists()


@pytest.mark.parametrize(
    "problem, logits, expected",
    [
        (None, [0.0, 0.0], [0.5, 0.5]),
        ("multi_label_classification", [0.0, 100.0], [0.5, 1.0]),
        (None, [0.0], [0.5]),  # a single label: whether the image has it
    ],
)
def test_probabilities(problem, logits, expected):
    config = ViTConfig(problem_type=problem)
    assert probabilities(torch.tensor([logits]), config).tolist() == [expected]
