"""Networks that read texts, looked at."""

import json

import matplotlib.figure
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import BertForPreTraining, BertTokenizer, ViTImageProcessorPil

from refiner_hf import RefinementAdapterConfig, refine
from refiner_hf.commands.analyze import main as analyze_command
from refiner_hf.encoders.folder import load_as_saved
from refiner_hf.encoders.inputs import longest_text
from refiner_hf.inspection.analysis import analyze
from refiner_hf.inspection.cka import gram_matrix, unbiased_hsic
from refiner_hf.inspection.layer_views import watch_layers
from refiner_hf.inspection.map_metrics import effective_rank, head_similarity, layer_similarity, map_entropy
from refiner_hf.inspection.networks import Network, open_network
from refiner_hf.inspection.report import summary_table, write_analyses
from refiner_hf.utils.model_source import find_source

from ..conftest import assert_close
from ..encoders import TEXT_ENCODERS, disturb, inputs_of, make_encoder, padded_texts


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
TEXTS = ["a good film", "a very very very bad film", "good", "bad film", "very good", "a film"]


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def refined_bert(head: bool = False):
    model = make_encoder("bert", head=head)
    disturb(refine(model, inputs_of("bert"), layers=[1]))
    return model


@pytest.mark.parametrize("refined", [True, False])
@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_what_each_layer_shows(family, refined):
    """Is what the model itself gives of all layers."""
    model = make_encoder(family, attention="eager")
    if refined:
        disturb(refine(model, inputs_of(family), layers=[1]))
    inputs = padded_texts(9, numbers=(0,))
    views = []
    watch_layers(model, inputs, views.append)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert [view.index for view in views] == [0, 1]
    for view, attention, entering in zip(views, expected.attentions, expected.hidden_states):
        assert torch.equal(view.applied, attention) and torch.equal(view.entering, entering)
    assert [view.before is not None for view in views] == [False, refined]
    if refined:
        before = views[1].before
        assert_close(before.sum(-1), torch.ones_like(before[..., 0]), 1e-5)
        assert (before - views[1].applied).abs().max() > 1e-3


class TestNumbers:
    def test_are_those_of_each_text_alone(self):
        network = Network("reader", refined_bert(), tokenizer())
        found = analyze(network, TEXTS, batch_size=4)
        assert found["texts"] == 6 and found["grid"] is None and "images" not in found
        outputs = []
        for text in TEXTS:
            with torch.no_grad():
                inputs = network.processor(text, return_tensors="pt")
                outputs.append(network.model(**inputs, output_attentions=True, output_hidden_states=True))
        lengths = [len(output.last_hidden_state[0]) for output in outputs]
        assert len(set(lengths)) > 2 and found["num_tokens"] == round(np.mean(lengths), 1)

        def compare(actual, values):
            values = np.array(values, dtype=float)
            np.testing.assert_allclose(np.array(actual["mean"], dtype=float), values.mean(0), rtol=2e-4, atol=2e-5)
            np.testing.assert_allclose(
                np.array(actual["std"], dtype=float), values.std(0, ddof=1), rtol=2e-3, atol=2e-5
            )

        metrics = {"head_similarity": head_similarity, "entropy": map_entropy, "effective_rank": effective_rank}
        for name, metric in metrics.items():
            compare(found["applied"][name], [[float(metric(m)) for m in output.attentions] for output in outputs])
        assert "distance" not in found["applied"] and found["before"]["entropy"]["mean"][0] is None
        tokens = [[float(head_similarity(h[:, :, None])) for h in output.hidden_states] for output in outputs]
        compare(found["tokens"]["similarity"], tokens)
        cosines = [layer_similarity(list(output.attentions))[0][0].tolist() for output in outputs]
        compare(found["layers"]["cosine"], cosines)
        # Features of a text are the mean of its tokens; the first four texts are the only whole batch.
        layers = list(zip(*(output.hidden_states for output in outputs[:4])))
        hsic = unbiased_hsic(torch.stack([gram_matrix(torch.cat([h.mean(1) for h in layer])) for layer in layers]))
        cka = hsic / (hsic.diagonal()[:, None] * hsic.diagonal()).sqrt()
        np.testing.assert_allclose(np.array(found["cka"]["mean"]), cka.numpy(), rtol=1e-3, atol=1e-4)

    def test_pairs_and_long_texts(self):
        network = Network("reader", make_encoder("bert", attention="eager"), tokenizer())
        pairs = [{"text": "a film", "text_pair": "good"}, {"text": "film " * 700}]
        lengths = [network.tokens_of(pair)["input_ids"].shape[1] for pair in pairs]
        assert lengths == [6, 512]
        assert network.tokens_of(pairs[0])["token_type_ids"].sum() == 2

    def test_places_of_a_refined_roberta(self):
        """It counts its places from behind the number of its padding, refined or not."""
        model = make_encoder("roberta", max_position_embeddings=20)
        assert longest_text(model, tokenizer()) == 19
        assert longest_text(refine(model, inputs_of("roberta")), tokenizer()) == 19

    def test_a_single_token(self):
        network = Network("reader", make_encoder("bert", attention="eager"), tokenizer())
        assert network.tokens_of("")["input_ids"].shape[1] == 2  # the special ones
        alone = lambda **kwargs: tokenizer()(**kwargs, add_special_tokens=False)  # noqa: E731
        with pytest.raises(ValueError, match="'good' is a single token"):
            Network("reader", network.model, Alone(alone)).tokens_of("good")

    def test_too_few_or_none(self):
        network = Network("reader", make_encoder("bert", attention="eager"), tokenizer())
        with pytest.raises(ValueError, match="no texts"):
            analyze(network, [])
        with pytest.raises(ValueError, match="at least 4 texts"):
            analyze(network, TEXTS, batch_size=2)


class Alone:
    """A tokenizer that adds no special tokens."""

    def __init__(self, call):
        self.call, self.model_max_length = call, 512

    def __call__(self, **kwargs):
        return self.call(**kwargs)


def saved(model, folder, processor=None) -> str:
    model.save_pretrained(folder)
    (processor or tokenizer()).save_pretrained(folder)
    return str(folder)


class TestOpenNetwork:
    @pytest.mark.parametrize("head", [True, False])
    def test_refined_or_not(self, head, tmp_path):
        for name, model in (("plain", make_encoder("bert", head=head)), ("refined", refined_bert(head))):
            network = open_network(saved(model, tmp_path / name), texts=True)
            expected = "RefinedBertModel" if name == "refined" else "BertModel"
            assert type(network.model).__name__ == expected and network.reads_texts and network.name == name
            views = []
            watch_layers(network.model, network.tokens_of("a good film"), views.append)
            assert len(views) == 2

    def test_pretrained_with_other_heads(self, tmp_path):
        """As bert-base-uncased: two heads in the file, of which the configuration names one."""
        torch.manual_seed(0)
        folder = saved(BertForPreTraining(make_encoder("bert").config), tmp_path / "bert")
        config = json.loads((tmp_path / "bert" / "config.json").read_text())
        (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
        assert type(open_network(folder, texts=True).model).__name__ == "BertModel"
        assert type(load_as_saved(find_source(folder))).__name__ == "BertForMaskedLM"

    @pytest.mark.parametrize("head", [True, False], ids=["of a classifier", "with a new head"])
    def test_an_adapter(self, head, tmp_path):
        base = saved(make_encoder("bert", head=head), tmp_path / "base")
        model = type(make_encoder("bert", head=True)).from_pretrained(base)
        config = RefinementAdapterConfig(
            inputs=inputs_of("bert"), modules_to_save=None if head else ["classifier", "pooler"]
        )
        adapted = get_peft_model(model, config)
        disturb(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        network = open_network(str(tmp_path / "adapter"), texts=True)
        assert type(network.model).__name__ == "RefinedBertForSequenceClassification"
        with torch.no_grad():
            inputs = network.tokens_of("a good film")
            assert_close(network.model(**inputs).logits, adapted.eval()(**inputs).logits, 1e-5)

    def test_the_other_kind(self, tmp_path):
        reader = saved(make_encoder("bert"), tmp_path / "bert")
        with pytest.raises(ValueError, match="bert is a BertModel, which takes texts, not images"):
            open_network(reader)
        sees = saved(make_encoder("vit"), tmp_path / "vit", ViTImageProcessorPil(size={"height": 32, "width": 32}))
        with pytest.raises(ValueError, match="vit is a ViTModel, which takes images, not texts"):
            open_network(sees, texts=True)

    def test_a_tokenizer_of_another_network(self, tmp_path):
        model = make_encoder("bert")
        model.resize_token_embeddings(9)
        folder = saved(model, tmp_path / "bert")
        with pytest.raises(ValueError, match="can't take.*the tokenizer knows 10 tokens, and the network 9"):
            open_network(folder, texts=True)

    def test_without_a_tokenizer(self, tmp_path):
        make_encoder("bert").save_pretrained(tmp_path / "bert")
        with pytest.raises(OSError, match="bert has no tokenizer: none of tokenizer_config.json"):
            open_network(str(tmp_path / "bert"), texts=True)


class TestCommand:
    @pytest.fixture
    def sentences(self, tmp_path):
        (tmp_path / "sentences.txt").write_text("\n".join(TEXTS))
        return str(tmp_path / "sentences.txt")

    def test_side_by_side(self, sentences, tmp_path, capsys):
        models = [saved(make_encoder("bert", head=True), tmp_path / "plain"), saved(refined_bert(), tmp_path / "mine")]
        analyze_command(["--model", *models, "--data", sentences, "--output_dir", str(tmp_path / "out")])
        output = capsys.readouterr().out
        assert "6 texts of sentences.txt" in output and "| plain |" in output and "| mine |" in output
        assert "distance" not in output
        found = json.loads((tmp_path / "out" / "analysis.json").read_text())
        assert [network["texts"] for network in found["networks"]] == [6, 6]
        names = {"analysis.json"} | {f"analysis_{n}.{s}" for n in ("curves", "layers") for s in ("png", "pdf")}
        assert names <= {file.name for file in (tmp_path / "out").iterdir()}

    def test_refused(self, sentences, tmp_path):
        sees = saved(make_encoder("vit"), tmp_path / "vit", ViTImageProcessorPil(size={"height": 32, "width": 32}))
        with pytest.raises(SystemExit, match="takes images, not texts"):
            analyze_command(["--model", sees, "--data", sentences, "--output_dir", str(tmp_path / "out")])


def test_figures_leave_the_distance_out(tmp_path, monkeypatch):
    found = analyze(Network("reader", refined_bert(), tokenizer()), TEXTS, batch_size=4)
    assert "distance" not in summary_table([found])
    figures, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    write_analyses([found], {}, tmp_path)
    assert sum(axis.axison for axis in figures[0].axes) == 9 and len(figures[0].axes) == 10
