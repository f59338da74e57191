"""A training that ends when nothing gets better."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from refiner_hf.commands.train import main
from refiner_hf.training.arguments import RefinerTrainingArguments
from refiner_hf.training.early_stopping import EarlyStopping

from ..conftest import load_json
from ..images import write_folder


def test_stops_and_says_so(tmp_path):
    """With averaged weights, too, whose evaluations aren't those that count."""
    folder = write_folder(tmp_path / "photos", 8)
    main(
        ["digits", "--train_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--use_cpu",
         "--num_train_epochs", "9", "--learning_rate", "0", "--norm_statistics_images", "0", "--ema_decay", "0.5",
         "--early_stopping_patience", "2", "--load_best_model_at_end", "--metric_for_best_model", "accuracy"]
    )  # fmt: skip
    state = load_json(tmp_path / "out" / "trainer_state.json")
    evaluated = [entry["epoch"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert evaluated[:3] == [1.0, 2.0, 3.0] and state["epoch"] == 3.0 and state["global_step"] < state["max_steps"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"of {state['max_steps']}, where it was stopped early" in card
    assert "| early_stopping_patience | 2 |" in card


@pytest.mark.parametrize("best, count", [(10, 2), (20, 1), (30, 0), (None, 3)])
def test_goes_on_counting(best, count, tmp_path):
    """A continued run counts on from the log; the one that had ended before it was cut off ends at once."""
    state = TrainerState(best_global_step=best, best_metric=0.5)
    state.log_history = [{"step": 5, "loss": 1.0}]
    state.log_history += [{"step": step, "eval_accuracy": 0.5} for step in (10, 20, 30)]
    state.log_history += [{"step": 30, "eval_ema_accuracy": 0.5}]
    args = TrainingArguments(
        str(tmp_path), eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, use_cpu=True,
        metric_for_best_model="accuracy",
    )  # fmt: skip
    callback, control = EarlyStopping(2), TrainerControl()
    callback.on_train_begin(args, state, control)
    assert callback.early_stopping_patience_counter == count
    callback.on_epoch_begin(args, state, control)
    assert control.should_training_stop == (count >= 2)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(early_stopping_patience=2), "needs --load_best_model_at_end"),
        (dict(early_stopping_patience=0), "must be at least 1, got 0"),
    ],
)
def test_refused(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        RefinerTrainingArguments(str(tmp_path), use_cpu=True, **options)
