"""The recipe for GLUE, on own texts."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, BertTokenizer

from .encoders import make_encoder


SCRIPT = Path(__file__).parents[1] / "scripts" / "train_glue.py"


@pytest.fixture
def train():
    spec = importlib.util.spec_from_file_location("train_glue", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def words(tmp_path):
    kinds = ("bad", "good")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
    make_encoder("bert").save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(tmp_path / "bert")
    for name, count in (("train", 30), ("dev", 10)):
        rows = [f"a {'very ' * (i % 4)}{word} film,{label}" for i in range(count) for label, word in enumerate(kinds)]
        (tmp_path / f"{name}.csv").write_text("sentence1,label\n" + "\n".join(rows) + "\n")
    line = (
        "--train_file {0}/train.csv --validation_file {0}/dev.csv --model_name_or_path {0}/bert --output_dir {0}/out "
        "--max_steps 30 --learning_rate 0.01 --use_cpu --report_to none --disable_tqdm true --save_strategy no"
    )
    return line.format(tmp_path).split()


@pytest.mark.parametrize("refined", [False, True])
def test_learns(train, words, refined, tmp_path):
    found = train([*words, "--refine"] if refined else words)
    assert found["eval_accuracy"] == 1.0
    kind = type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")).__name__
    assert kind == ("RefinedBertForSequenceClassification" if refined else "BertForSequenceClassification")
    assert (tmp_path / "out" / "eval_results.json").exists()


def test_says_what_is_missing(train, words):
    with pytest.raises(ValueError, match="--task_name, or --train_file and"):
        train(words[2:])
