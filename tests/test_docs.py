"""README and docs: every code block runs, in order, in a folder as the pages assume it; or says why it can't."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from sybil import Document, Example, Region
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer
from sybil.region import Lexeme
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from scripts.make_notebook import make_notebook

from .conftest import GOLDEN, assert_close
from .images import write_folder


ROOT = Path(__file__).parents[1]
# The tables in docs/benchmarks are written by programs, with the command lines that made them.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = Path(sys.executable).parent
REFINER = f"""#!/bin/bash
# The command as a page says it; trainings are shortened by the options in the page's <!-- tested-with: ... -->.
[ "$1" = train ] && set -- "$@" --use_cpu --report_to none $TESTED_WITH
exec "{sys.executable}" -m refiner_hf "$@"
"""


class Shortened:
    """`<!-- tested-with: OPTIONS -->`: what the next block's trainings get in addition, so that they are short."""

    lexer = DirectiveInHTMLCommentLexer("tested-with")

    def __call__(self, document: Document):
        for found in self.lexer(document):
            yield Region(found.start, found.end, found.lexemes["arguments"], self.note)

    def note(self, example: Example) -> None:
        example.namespace["tested_with"] = example.parsed


def run_bash(example: Example) -> None:
    options = example.namespace.pop("tested_with", "")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.parsed],
        env={**os.environ, "TESTED_WITH": options},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, f"{example.parsed}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"


def parse(page: Path) -> Document:
    return Document.parse(
        str(page), PythonCodeBlockParser(), CodeBlockParser("bash", run_bash), SkipParser(), Shortened()
    )


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What `make demo` leaves, trained for a moment."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    words = ["digits", "--output_dir", str(folder), "--num_train_epochs", "1", "--example_pictures", "4"]
    subprocess.run(
        [sys.executable, "-m", "refiner_hf", "train", *words, "--use_cpu", "--report_to", "none"], check=True
    )
    return folder


@pytest.fixture
def workplace(demo, hub, tmp_path, monkeypatch):
    """The folder in which the pages' reader works."""
    place = tmp_path / "workplace"
    shutil.copytree(demo, place / "outputs" / "demo")
    write_folder(place / "photos", per_label=8, labels=("bird", "cat", "dog"), side=40)
    for picture in (place / "photos").glob("*/*.png"):
        picture.rename(picture.with_suffix(".jpg"))  # PIL looks at the content
    shutil.copy(GOLDEN / "released_checkpoint.pth.tar", place / "model_best.pth.tar")
    torch.manual_seed(0)
    size = dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
    names = dict(enumerate(("bird", "cat", "dog")))
    vit = ViTConfig(**size, intermediate_size=96, id2label=names, label2id={n: i for i, n in names.items()})
    ViTForImageClassification(vit).save_pretrained(place / "my-vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place / "my-vit")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "very", "good", "bad", "film"]
    size = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    bert = BertConfig(**size, vocab_size=len(words), initializer_range=0.2)
    BertForSequenceClassification(bert).save_pretrained(place / "my-bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(place / "my-bert")
    (place / "scripts").symlink_to(ROOT / "scripts")

    wrappers = tmp_path / "bin"
    wrappers.mkdir()
    (wrappers / "refiner").write_text(REFINER)
    (wrappers / "refiner").chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrappers}:{COMMANDS}:{os.environ['PATH']}")
    hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", hub.add_token("alice"))
    monkeypatch.chdir(place)
    return place


def check_export(names: dict) -> None:
    """The label is the pipeline's. (That the pixels are the processor's the page asserts itself.)"""
    expected = pipeline("image-classification", model="outputs/demo")("outputs/demo/examples/0.png")[0]["label"]
    labels = json.loads(Path("exported/config.json").read_text())["id2label"]
    assert labels[str(names["logits"][0].argmax())] == expected
    in_8_bits = names["compiled"]({"pixel_values": names["pixel_values"]})["logits"]
    assert np.abs(in_8_bits - names["logits"]).max() < 0.1 * np.abs(names["logits"]).max()


def check_look_inside(names: dict) -> None:
    """Grad-CAM: a number for each patch, and not nothing. Texts: before training, refinement changes no number."""
    assert names["cam"].shape == names["model"].config.patch_grid and names["gradient"][0, 1:].abs().max() > 0
    refined, plain = json.loads(Path("read/analysis.json").read_text())["networks"]
    assert refined["texts"] == plain["texts"] == 4 and "before" in refined and "before" not in plain
    entropies = (torch.tensor(each["applied"]["entropy"]["mean"]) for each in (refined, plain))
    assert_close(*entropies, 1e-4)


def check_refine(names: dict) -> None:
    """Images and texts have the same answers before and after, and a text alone has that of its batch."""
    assert_close(names["after"], names["before"], 1e-5)
    assert_close(names["read_after"], names["read_before"], 1e-5)
    assert_close(names["alone"], names["read_after"][:1], 1e-5)
    assert type(names["reader"]).__name__ == "RefinedBertForSequenceClassification"
    assert_close(names["adapted_logits"], names["before"], 1e-5)
    assert_close(names["whole_logits"], names["before"], 1e-5)
    assert type(names["whole"]).__name__ == "RefinedViTForImageClassification"
    best = names["classify"](names["pictures"][0])[0]
    assert abs(best["score"] - names["after"][0].softmax(-1).max().item()) < 1e-4


def check_serving(names: dict) -> None:
    """The endpoint and the handler answer as the pipeline does."""
    expected = pipeline("image-classification", model="outputs/demo")("outputs/demo/examples/0.png", top_k=2)
    for answers in (json.loads(Path("answer.json").read_text()), names["answers"]):
        assert [each["label"] for each in answers] == [each["label"] for each in expected[: len(answers)]]
        assert answers[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)


# By page, what its blocks' answers must be.
ANSWERS = {"export": check_export, "look_inside": check_look_inside, "refine": check_refine, "serving": check_serving}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, workplace):
    document = parse(page)
    for example in document.examples():
        with suppress(SkipTest):  # the page says why
            example.evaluate()
    if page.stem in ANSWERS:
        ANSWERS[page.stem](document.namespace)


class TestNotebook:
    """docs/quick_start.ipynb, which is made of the page."""

    FILE = ROOT / "docs" / "quick_start.ipynb"

    def test_is_of_the_page(self):
        page = (ROOT / "docs" / "quick_start.md").read_text()
        written = nbformat.read(self.FILE, as_version=4)
        assert written == nbformat.from_dict(make_notebook(page)), "make notebook"
        cells = [cell.source for cell in written.cells if cell.cell_type == "code"]
        assert len(cells) >= 6 and any(source.startswith("%%bash") for source in cells)

    @pytest.mark.slow
    def test_runs(self, workplace, monkeypatch):
        monkeypatch.setenv("TESTED_WITH", "--time_budget 5s")
        notebook = nbformat.read(self.FILE, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(workplace)}}).execute()
        assert (workplace / "first" / "model.safetensors").exists()
        assert (workplace / "answers.csv").read_text().count("\n") == 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_overlooked(page):
    """Each is Python, bash or what a command says, or has a reason not to run; nothing hides as an indented block."""
    text = page.read_text()
    languages = re.findall(r"^```(.+)$", text, re.MULTILINE)
    others = [language for language in languages if language not in ("python", "bash")]
    reasons = re.findall(r'^<!-- skip: next "[^"]{10,}" -->\n```(.+)$', text, re.MULTILINE)
    assert len(reasons) == text.count("<!-- skip:") and set(others) - {"text"} <= set(reasons)
    blocks = [example for example in parse(page).examples() if isinstance(example.region.parsed, Lexeme)]
    assert len(blocks) == len(languages) - len(others)
    fenced_or_lists = r"^```(?s:.*?)^```$|^[-*] .*(?:\n(?: .*)?)*"
    assert not re.search(r"^[A-Z]+$", text, re.MULTILINE), "a place that was to be filled"
    assert not re.search(r"^ {4}\S", re.sub(fenced_or_lists, "", text, flags=re.MULTILINE), re.MULTILINE)


def anchors_in(page: Path) -> set[str]:
    """What GitHub and MkDocs call the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    """Within the project, also where they name its address on the web, as PyPI needs it."""
    home = re.search(r"^url = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1] + "/blob/main/"
    followed = 0
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            place, _, anchor = target.partition("#")
            if place.startswith(home):
                place = str(ROOT / place.removeprefix(home))
            elif "://" in place:
                continue
            file = page.parent / place if place else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_in(file), f"{page.name}: {target}"
            followed += bool(anchor)
    assert followed > 5


@pytest.mark.slow
def test_the_site_is_rendered_without_a_warning(tmp_path):
    words = ["build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", tmp_path / "site"]
    run = subprocess.run([COMMANDS / "mkdocs", *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "Fine-tune on a folder" in home and "fonts.googleapis" not in home
    assert "num_hidden_layers" in (tmp_path / "site" / "api" / "index.html").read_text()
