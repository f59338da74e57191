"""Early stopping that a continued run does as an unbroken one."""

from transformers import EarlyStoppingCallback, TrainingArguments


def _metric(args: TrainingArguments) -> str:
    """What decides which evaluation is best, as the log names it."""
    return f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"


class EarlyStopping(EarlyStoppingCallback):
    """
    [`~transformers.EarlyStoppingCallback`], which in a continued run begins to count anew. This one counts the
    evaluations since the best in the log, which a checkpoint holds.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        name = _metric(args)
        later = [
            entry for entry in state.log_history if name in entry and entry["step"] > (state.best_global_step or 0)
        ]
        self.early_stopping_patience_counter = len(later)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if _metric(args) in metrics:  # not those of averaged weights
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # It was over before it was interrupted: one step more, which the best weights then replace.
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
