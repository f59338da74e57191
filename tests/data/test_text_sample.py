"""Samples of texts."""

import datasets
import pytest

from refiner_hf.data import text_sample
from refiner_hf.data.samples import load_sample
from refiner_hf.data.text_sample import has_texts, load_texts


def test_a_file(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f" text {i} \n" for i in range(40)))
    name, texts = load_texts(str(file), 10, seed=1)
    assert name == "lines.txt" and len({text["text"] for text in texts}) == 10
    assert set(texts[0]) == {"text"} and texts[0]["text"] in [f"text {i}" for i in range(40)]
    assert load_texts(str(file), 10, seed=1)[1] == texts != load_texts(str(file), 10, seed=2)[1]
    assert len(load_texts(str(file), 100)[1]) == 40 and len(load_sample(str(file))) == 40
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="lines.txt has no lines of text"):
        load_texts(str(file), 10)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="lines.txt isn't text in UTF-8"):
        load_texts(str(file), 10)
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match="rows.csv isn't a .txt file, with a text in each line"):
        load_texts(str(tmp_path / "rows.csv"), 10)


@pytest.fixture
def on_the_hub(monkeypatch):
    """Lets `load_dataset` give these columns as a stream."""

    def put(columns: dict[str, list]) -> None:
        split = datasets.Dataset.from_dict(columns).to_iterable_dataset()
        monkeypatch.setattr(
            text_sample, "load_dataset", lambda name, streaming: datasets.IterableDatasetDict(train=split)
        )

    return put


def test_of_the_hub(on_the_hub, tmp_path):
    on_the_hub({"sentence": [f"text {i}" for i in range(30)], "label": [0] * 30})
    assert has_texts("somebody/texts")
    name, texts = load_texts("somebody/texts", 5)
    assert name == "somebody/texts (train, sentence)" and len(texts) == 5 and set(texts[0]) == {"text"}
    on_the_hub({"premise": ["a", "b"], "label": [0, 1], "hypothesis": ["c", "d"]})
    _, texts = load_texts("somebody/pairs", 5)
    assert sorted(texts, key=lambda each: each["text"]) == [
        {"text": "a", "text_pair": "c"}, {"text": "b", "text_pair": "d"},
    ]  # fmt: skip
    on_the_hub({"id": ["a"] * 4, "text": ["b", "", None, " "], "label_text": ["good"] * 4})
    assert load_texts("somebody/texts", 5) == ("somebody/texts (train, text)", [{"text": "b"}])
    on_the_hub({"words": ["a", "b"], "label": [0, 1]})
    assert len(load_texts("somebody/words", 5)[1]) == 2
    on_the_hub({"id": ["a"], "words": ["b"]})
    with pytest.raises(ValueError, match="Which column.*id, words none has a usual name"):
        load_texts("somebody/words", 5)
    on_the_hub({"text": [""]})
    with pytest.raises(ValueError, match="no rows with texts in text"):
        load_texts("somebody/texts", 5)


def test_pictures_are_no_texts(on_the_hub, tmp_path):
    assert not has_texts(str(tmp_path)) and not has_texts("./nowhere")
    features = {"label": [0]}
    on_the_hub(features)
    assert not has_texts("somebody/numbers")
