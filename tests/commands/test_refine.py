"""`refiner refine`: an encoder's folder to that of a refined one, for images and texts."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizer,
    DeiTForImageClassificationWithTeacher,
    ViTImageProcessorPil,
    pipeline,
)

from refiner_hf.commands import main
from refiner_hf.hub.code import REFINED_CODE_FILES

from ..conftest import assert_close
from ..encoders import make_encoder
from ..images import write_folder


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos")


def saved(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=2).save_pretrained(folder)
    return folder


def refine(model, data, out, *words) -> None:
    main(["refine", "--model", str(model), "--data", str(data), "--output_dir", str(out), *words])


@pytest.mark.parametrize("family", ["vit", "dinov2", "beit"])
def test_a_classifier_of_images(family, photos, tmp_path, capsys):
    source = saved(make_encoder(family, head=True, num_labels=3), tmp_path / "source")
    refine(source, photos, tmp_path / "out", "--layers", "2", "--expansion_ratio", "2")
    said = capsys.readouterr().out
    assert "1 of 2 layers refine their map" in said and "refiner train fine_tune" in said
    picture = Image.effect_noise((40, 50), 90).convert("RGB")
    answers = [
        pipeline("image-classification", model=str(f), device="cpu")(picture) for f in (source, tmp_path / "out")
    ]
    for ours, theirs in zip(*answers, strict=True):
        assert ours["label"] == theirs["label"] and abs(ours["score"] - theirs["score"]) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["refinement_config"]["expansion_ratio"] == 2
    modules = list(config["refinement_config"]["modules"].values())
    assert modules[0] is None and modules[1]["num_attention_heads"] == 4
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "refiner" in card.data.tags
    assert "with refined attention maps" in card.text and "GFLOP" in card.text


def test_a_distilled_deit(photos, tmp_path):
    model = DeiTForImageClassificationWithTeacher(make_encoder("deit", num_labels=3).config)
    source = saved(model, tmp_path / "source")
    refine(source, photos, tmp_path / "out")
    pixels = torch.randn(2, 3, 32, 32)
    ours, theirs = (AutoModelForImageClassification.from_pretrained(f) for f in (tmp_path / "out", source))
    assert type(ours).__name__ == "RefinedDeiTForImageClassificationWithTeacher"
    theirs = DeiTForImageClassificationWithTeacher.from_pretrained(source)
    with torch.no_grad():
        for name in ("logits", "cls_logits", "distillation_logits"):
            assert_close(getattr(ours(pixels), name), getattr(theirs(pixels), name), 1e-5)


def test_an_encoder_without_a_head_and_with_code(photos, tmp_path):
    refine(saved(make_encoder("dinov3"), tmp_path / "source"), photos, tmp_path / "out", "--with_code", "true")
    assert {file.name for file in (tmp_path / "out").glob("*.py")} == set(REFINED_CODE_FILES)
    pixels = torch.randn(2, 3, 32, 32)
    ours, theirs = (AutoModel.from_pretrained(tmp_path / name) for name in ("out", "source"))
    with torch.no_grad():
        assert_close(ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state, 1e-5)


@pytest.mark.parametrize("head", [True, False])
def test_texts(head, tmp_path, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    make_encoder("bert", head=head).save_pretrained(tmp_path / "source")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "source")
    lines = tmp_path / "lines.txt"
    lines.write_text("a good film\n\na very very bad film\ngood\n" * 5)
    refine(tmp_path / "source", lines, tmp_path / "out")
    assert "2 of 2 layers" in capsys.readouterr().out
    task = "text-classification" if head else "feature-extraction"
    ours, theirs = (
        pipeline(task, model=str(tmp_path / name), device="cpu")("a good film") for name in ("out", "source")
    )
    if head:
        assert ours[0]["label"] == theirs[0]["label"] and abs(ours[0]["score"] - theirs[0]["score"]) < 1e-5
        kind = AutoModelForSequenceClassification
        assert type(kind.from_pretrained(tmp_path / "out")).__name__ == "RefinedBertForSequenceClassification"
    else:
        assert_close(torch.tensor(ours), torch.tensor(theirs), 1e-5)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == task and "vision" not in card.data.tags and '"A sentence."' in card.text


@pytest.mark.parametrize(
    "words, says",
    [
        (["--layers", "0"], "count from 1; there is no layer 0"),
        (["--layers", "3"], "there is no layer 2"),
        (["--refinement_kernel_size", "2"], "must be odd"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--model", "./nowhere"], "./nowhere"),
    ],
)
def test_refused(words, says, photos, tmp_path):
    source = saved(make_encoder("vit", head=True), tmp_path / "source")
    with pytest.raises(SystemExit) as stopped:
        refine(source, photos, tmp_path / "out", *words)
    assert says in str(stopped.value.code)
    assert not (tmp_path / "out").exists()


def test_an_empty_file(tmp_path):
    (tmp_path / "lines.txt").write_text("\n \n")
    source = saved(make_encoder("vit", head=True), tmp_path / "source")
    with pytest.raises(SystemExit, match="no lines of text"):
        refine(source, tmp_path / "lines.txt", tmp_path / "out")


def test_a_decoder(photos, tmp_path):
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=10))
    model.save_pretrained(tmp_path / "source")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "source")
    (tmp_path / "lines.txt").write_text("good\n")
    with pytest.raises(SystemExit, match="it is a decoder's"):
        refine(tmp_path / "source", tmp_path / "lines.txt", tmp_path / "out")
