"""Several trainings with one trainer: a hyperparameter search, arguments that were changed, nothing left over."""

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset as Table
from transformers import TrainerCallback, hyperparameter_search
from transformers.trainer_utils import BestRun, HPSearchBackend

from refiner_hf import RefinerForImageClassification
from refiner_hf.data.streams import StreamedImages, StreamPosition
from refiner_hf.normalization_refiner import RefinerBatchNorm2d
from refiner_hf.training.ema import EmaCallback
from refiner_hf.training.norm_statistics_callback import NormStatisticsCallback
from refiner_hf.training.trainer import RefinerTrainer

from .test_trainer import Images, arguments, losses


class Given:
    """A search's backend that tries what it is given, one after the other, and counts each trial's curve."""

    trials, curves = [], []

    def ensure_available(self):
        pass

    def default_hp_space(self, trial):
        return trial

    def run(self, trainer, n_trials, direction, **kwargs):
        for trial in self.trials:
            try:
                trainer.train(trial=dict(trial))
                self.curves.append((losses(trainer), trainer.evaluate()))
            except FloatingPointError:
                self.curves.append(None)
        return BestRun("0", 0.0, {})


@pytest.fixture
def search(monkeypatch):
    """`search(trainer, trials)`: what each trial had, its losses and its evaluation."""
    monkeypatch.setitem(hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Given)
    monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", {HPSearchBackend.WANDB: Given})
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="0")))

    def run(trainer, trials):
        monkeypatch.setattr(Given, "trials", trials)
        monkeypatch.setattr(Given, "curves", [])
        trainer.hyperparameter_search(backend="wandb", n_trials=len(trials))
        return Given.curves

    return run


@pytest.fixture
def trainer(tiny_model, tmp_path):
    def make(callbacks=(), train=None, model=None, **fields):
        return RefinerTrainer(
            model_init=model or (lambda: tiny_model(drop_path_rate=0.2)),
            args=arguments(tmp_path, **fields),
            train_dataset=train or Images(),
            eval_dataset=Images(10),
            callbacks=list(callbacks),
        )

    return make


@pytest.mark.parametrize(
    "name, values",
    [
        ("label_smoothing_factor", [0.0, 0.5, 0.9]),
        ("learning_rate", [1e-3, 1e-2]),
        pytest.param("learning_rate_batch_size", [8, 1], marks=pytest.mark.slow),
        pytest.param("layer_decay", [1.0, 0.3], marks=pytest.mark.slow),
        pytest.param("cooldown_steps", [0.0, 0.7], marks=pytest.mark.slow),
        ("warmup_steps", [0.0, 0.7]),
    ],
)
def test_each_trial_has_its_own(search, trainer, name, values):
    found = search(trainer(num_train_epochs=2), [{name: value} for value in [*values, *values]])
    first, again = found[: len(values)], found[len(values) :]
    for one, other in zip(first, again):
        assert_same(one, other)
    assert len({tuple(curve) for curve, _ in first}) == len(values)


def assert_same(one, other):
    """The same losses and evaluation."""
    assert one[0] == other[0]
    timed = ("runtime", "per_second")
    kept = [{k: v for k, v in metrics.items() if not any(t in k for t in timed)} for _, metrics in (one, other)]
    assert kept[0] == kept[1]


def test_averages_of_trials(search, trainer):
    """Whether there is one, its decay, and the model it is of: each trial's own."""
    searched = trainer(ema_decay=0.0)
    assert searched.ema is None
    tried = [{"ema_decay": decay} for decay in (0.5, 0.0, 0.99, 0.5)]
    found = search(searched, [trial | {"ema_warmup": False} for trial in tried])
    assert ["eval_ema_loss" in metrics for _, metrics in found] == [True, False, True, True]
    assert_same(found[0], found[3])
    assert found[0][1]["eval_ema_loss"] != found[2][1]["eval_ema_loss"]
    assert sum(isinstance(c, EmaCallback) for c in searched.callback_handler.callbacks) == 1


def test_trials_of_different_networks_are_averaged(search, trainer, tiny_model):
    def model(trial):
        return tiny_model(num_hidden_layers=2 if trial and trial["seed"] == 1 else 4)

    given = EmaCallback(0.5)
    found = search(trainer([given], model=model), [{"seed": 1}, {"seed": 2}])
    assert len(found) == 2 and given.model.config.num_hidden_layers == 4


def test_the_arguments_make_an_average_without_a_callback(trainer):
    made = trainer(ema_decay=0.5, ema_warmup=False)
    made.train()
    average = made.ema.model.state_dict()
    given = trainer([EmaCallback(0.5, warmup=False)])
    given.train()
    assert all(torch.equal(value, average[name]) for name, value in given.ema.model.state_dict().items())
    with pytest.raises(ValueError, match="decay is 0.5, and ema_decay in the arguments 0.9"):
        trainer([EmaCallback(0.5)], ema_decay=0.9)


def test_a_loss_that_was_none_is_forgotten(search, trainer):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if args.seed == 1:
                next(model.parameters()).data.fill_(float("nan"))

    found = search(trainer([Spoil()]), [{"seed": 2}, {"seed": 1}, {"seed": 2}])
    assert found[1] is None
    assert_same(found[0], found[2])


def test_norm_statistics_leave_nothing_over(search, trainer):
    searched = trainer([NormStatisticsCallback(Images(), 8)], eval_strategy="epoch", num_train_epochs=2)
    found = search(searched, [{"weight_decay": 0.1}, {"weight_decay": 5.0}, {"weight_decay": 0.1}])
    assert_same(found[0], found[2])
    assert found[0][0] != found[1][0]


def test_a_seed_is_its_trials_and_not_the_next_ones(search, trainer, tiny_config):
    searched = trainer(model=lambda: RefinerForImageClassification(tiny_config()))
    found = search(searched, [{"seed": seed} for seed in (1, 2, 1, 2)])
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])
    assert found[0][0][0] != found[1][0][0], "they begin with other weights"


def test_norms_are_frozen_as_the_arguments_say(trainer):
    frozen = trainer(freeze_norms=True)
    frozen.train()
    norms = [m for m in frozen.model.modules() if isinstance(m, RefinerBatchNorm2d)]
    assert norms and all(norm.frozen and norm.num_batches_tracked == 0 for norm in norms)


def test_a_stream_begins_anew(search, trainer):
    rows = Images()

    def prepare(row):
        return rows[row["x"]]

    stream = StreamedImages(Table.from_dict({"x": list(range(24))}).to_iterable_dataset(num_shards=2), prepare, seed=0)
    searched = trainer(train=stream, max_steps=5)
    found = search(searched, [{"weight_decay": 0.1}] * 2)
    assert_same(*found)
    searched.train_dataset = rows  # an ordinary one after it
    assert searched.train().global_step == 5


def test_a_streams_epoch_is_its_share_of_all_steps(trainer, tmp_path):
    """Also where it goes on from a checkpoint."""
    rows = Images()

    def made(position=None):
        table = Table.from_dict({"x": list(range(24))}).to_iterable_dataset()
        stream = StreamedImages(table, lambda row: rows[row["x"]], seed=0, position=position)
        return trainer(train=stream, max_steps=4, save_strategy="steps", save_steps=2, ignore_data_skip=True)

    whole = made()
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = made(StreamPosition.load(checkpoint, rank=0))
    resumed.train(resume_from_checkpoint=checkpoint)
    for each in (whole, resumed):
        epochs = [entry["epoch"] for entry in each.state.log_history if "loss" in entry]
        assert epochs == [0.25, 0.5, 0.75, 1] and losses(each) == losses(whole)


def test_checkpoints_lie_in_their_trials_folder(search, trainer, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    searched = trainer(save_strategy="epoch")
    search(searched, [{"seed": 2}])
    whole = tmp_path / "run-0" / "checkpoint-3" / "trainer_state.json"
    assert whole.exists()
    monkeypatch.setattr(RefinerTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="run-0/checkpoint-3 can't be written"):
        search(searched, [{"seed": 2}])
    assert not whole.parent.exists(), "no half of it is left"


@pytest.mark.parametrize(
    "name, value", [("label_smoothing_factor", 1.5), ("ema_decay", 2.0), ("layer_decay", 0.0), ("cooldown_steps", -1)]
)
def test_what_is_out_of_range_is_seen_also_later(trainer, name, value):
    made = trainer()
    setattr(made.args, name, value)
    with pytest.raises(ValueError, match=f"--{name} must"):
        made.train()


def test_the_rate_that_was_given_stays_as_it_was_given(trainer):
    made = trainer(learning_rate=1e-3, learning_rate_batch_size=2, gradient_accumulation_steps=3)
    for _ in range(2):
        made.train()
        assert made.args.learning_rate == 1e-3
        assert made.optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-3 * 8 * 3 / 2)
