"""The average of the weights: what it is, evaluated, saved, loaded, taken up again."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from refiner_hf import RefinerForImageClassification, RefinerImageProcessor
from refiner_hf.normalization_refiner import RefinerBatchNorm2d
from refiner_hf.training.ema import EmaCallback
from refiner_hf.training.metrics import ClassificationMetrics, rank_labels
from refiner_hf.training.norm_statistics_callback import NormStatisticsCallback
from refiner_hf.training.trainer import RefinerTrainer

from ..conftest import assert_close
from ..parsed_card import Card
from .test_trainer import Images, arguments


class Weights(TrainerCallback):
    """The state after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


def train(model, folder, *, ema=None, resume=None, callbacks=(), **fields):
    ema = ema or EmaCallback(0.9, warmup=False)
    trainer = RefinerTrainer(
        model,
        arguments(folder, **fields),
        train_dataset=Images(),
        eval_dataset=Images(10),
        processing_class=RefinerImageProcessor(size={"height": 16, "width": 16}),
        compute_metrics=ClassificationMetrics(5),
        preprocess_logits_for_metrics=rank_labels,
        callbacks=[ema, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("warmup", [True, False])
def test_it_is_the_average_of_weights_and_buffers(tiny_model, tmp_path, warmup):
    weights = Weights()
    trainer = train(tiny_model(), tmp_path, ema=EmaCallback(0.7, warmup), callbacks=[weights], num_train_epochs=2)
    expected = weights.states[0]  # the first step has nothing to average with
    for step, state in enumerate(weights.states[1:], 2):
        decay = min(0.7, 1 - step ** (-2 / 3)) if warmup else 0.7
        for name, value in state.items():
            whole = not value.is_floating_point()  # counts are copied
            expected[name] = value if whole else decay * expected[name] + (1 - decay) * value
    average = trainer.ema.model.state_dict()
    assert len(weights.states) == 6 and "running_var" in " ".join(average)
    for name, value in expected.items():
        assert_close(average[name], value, 1e-5, name)


def test_evaluated_beside_the_raw_model(tiny_model, tmp_path):
    trainer = train(tiny_model(), tmp_path, eval_strategy="epoch")
    metrics = trainer.evaluate()
    assert {"eval_accuracy", "eval_loss", "eval_ema_accuracy", "eval_ema_loss"} <= metrics.keys()
    assert metrics["eval_loss"] != metrics["eval_ema_loss"]
    data = Images(10)
    for name, model in (("eval_loss", trainer.model), ("eval_ema_loss", trainer.ema.model)):
        with torch.no_grad():
            loss = model.eval()(data.pixels, labels=data.labels).loss
        assert metrics[name] == pytest.approx(loss.item(), rel=1e-4)
    assert any("eval_ema_accuracy" in entry for entry in trainer.state.log_history)
    trainer.create_model_card()
    results = Card((tmp_path / "README.md").read_bytes()).table("Results")
    (averaged,) = (value for name, value in results.items() if name.startswith("Top-1") and "averaged" in name)
    assert averaged == f"{metrics['eval_ema_accuracy']:.2%}"


def test_saved_beside_the_raw_model(tiny_model, tmp_path):
    trainer = train(tiny_model(), tmp_path)
    trainer.save_model(str(tmp_path / "out"))
    raw = RefinerForImageClassification.from_pretrained(tmp_path / "out")
    averaged = RefinerForImageClassification.from_pretrained(tmp_path / "out", subfolder="ema")
    RefinerImageProcessor.from_pretrained(tmp_path / "out", subfolder="ema")
    for name, value in trainer.model.state_dict().items():
        assert (raw.state_dict()[name] == value).all()
        assert (averaged.state_dict()[name] == trainer.ema.model.state_dict()[name]).all()


def test_taken_up_again(tiny_model, tmp_path):
    whole = train(tiny_model(), tmp_path / "whole", save_strategy="steps", save_steps=2, num_train_epochs=2)
    again = train(
        tiny_model(), tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"), num_train_epochs=2
    )
    for name, value in whole.ema.model.state_dict().items():
        assert_close(again.ema.model.state_dict()[name], value, 1e-5, name)


def test_a_checkpoint_without_one(tiny_model, tmp_path, monkeypatch):
    from refiner_hf.training import ema

    said = []
    monkeypatch.setattr(ema.logger, "warning", said.append)
    plain = RefinerTrainer(tiny_model(), arguments(tmp_path, save_strategy="epoch"), train_dataset=Images())
    plain.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    model = copy.deepcopy(plain.model)
    trainer = train(tiny_model(), tmp_path / "again", resume=checkpoint, num_train_epochs=1)
    assert any("holds no average of the weights" in line for line in said)
    for name, value in model.state_dict().items():
        assert (trainer.ema.model.state_dict()[name] == value).all()


def test_the_best_model_brings_its_average(tiny_model, tmp_path):
    trainer = train(
        tiny_model(), tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch", learning_rate=0.05,
        load_best_model_at_end=True, metric_for_best_model="ema_loss", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_global_step < trainer.state.global_step, "else it has that average anyway"
    best = RefinerForImageClassification.from_pretrained(trainer.state.best_model_checkpoint, subfolder="ema")
    for name, value in best.state_dict().items():
        assert (trainer.ema.model.state_dict()[name] == value).all()


def test_its_norms_have_statistics_of_their_own(tiny_model, tmp_path):
    ema = EmaCallback(0.5)
    statistics = NormStatisticsCallback(Images(16), 8, ema=ema)
    trainer = train(tiny_model(), tmp_path, ema=ema, callbacks=[statistics])
    assert not trainer.ema.model.training
    for model in (trainer.model, trainer.ema.model):
        norms = {name: module for name, module in model.named_modules() if isinstance(module, RefinerBatchNorm2d)}
        means = []
        for norm in norms.values():
            norm.register_forward_pre_hook(lambda _, args, seen=means: seen.append(args[0].mean((0, 2, 3))))
        with torch.no_grad():
            model.eval()(Images(16).pixels)
        assert len(norms) == len(means) == 3 + 2 * 4  # of the stem, and of two layers that refine
        for (name, norm), mean in zip(norms.items(), means):
            # Those further on see what a norm before them made with the unbiased variance.
            assert_close(norm.running_mean, mean, 1e-3 if "convolution1" in name else 1e-2, name)


def test_where_there_can_be_no_average(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["v_proj"]))
    for model, fields, says in (
        (tiny_model(), dict(bf16_full_eval=True), "stays in float32"),
        (adapted, {}, "one of a whole network, not of an adapter"),
    ):
        with pytest.raises(ValueError, match=f"An average of the weights .*{says}"):
            RefinerTrainer(model, arguments(tmp_path, ema_decay=0.5, **fields), train_dataset=Images())


@pytest.mark.parametrize("decay", [0.0, 1.0, -1])
def test_decays_that_are_none(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        EmaCallback(decay)
