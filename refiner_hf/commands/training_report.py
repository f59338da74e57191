"""What `refiner train` says at the end."""

from ..data.arguments import DataArguments
from ..training.baseline import Baseline
from ..training.folds import FoldsResult
from ..training.run import RunResult
from ..utils.text import counted, printable


# What is shown of problems without an accuracy, by the names of an evaluation.
_OTHER = {
    "map": "mAP",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R squared",
}


def report(result: RunResult, data_args: DataArguments) -> None:
    """Prints where the folder is, what was measured, and a few predictions."""
    print()
    if result.planned is not None:
        facts, picture = result.planned
        print("Nothing was trained. This would be:\n")
        print("\n".join(f"{topic:>18}  {printable(fact)}" for topic, fact in facts.items()))
        print(f"\nA batch as the network would see it: {picture}")
        return
    if "eval_accuracy" in result.metrics:
        _report_accuracy(result)
        if data_args.embedded:
            from ..data.digits import accuracy_seen

            print(accuracy_seen())
    elif measured := {name: result.metrics[f"eval_{name}"] for name in _OTHER if f"eval_{name}" in result.metrics}:
        print(f"On {result.data.evaluation_split}: " + ", ".join(f"{_OTHER[n]} {v:.4g}" for n, v in measured.items()))
        if result.baseline is not None:
            _compare(measured.get(result.baseline.metric), result.baseline)
    if not result.trained:
        print(f"Results: {result.folder}")
        return
    if result.examples:
        print("\nThe saved model on a few held-out pictures:")
    for example in result.examples:
        mark = "" if example.answer == example.label else "   <- wrong"
        print(f"  {printable(example.label):>12}: {printable(example.answer)} ({example.score:.1%}){mark}")
    print(f"\nThe finished folder, with model, card and pictures: {result.folder.resolve()}")
    if result.published:
        print(f"Published: {result.published.url} (commit {result.published.commit[:8]})")


def report_folds(result: FoldsResult) -> None:
    """Prints what was measured in a cross-validation."""
    folds = counted(len(next(iter(result.metrics.values()))), "fold")
    print(f"\nMeasured on {folds}, mean and standard deviation between them:\n")
    for name in result.metrics:
        print(f"  {name:<26} {result.mean(name):.4f} +- {result.standard_deviation(name):.4f}")
    print(f"\nEach number, and a finished folder for each fold: {result.folder.resolve()}")


def _report_accuracy(result: RunResult) -> None:
    print(f"Accuracy on {result.data.evaluation_split}: {result.metrics['eval_accuracy']:.2%}", end="")
    top5 = result.metrics.get("eval_top5_accuracy")
    print(f" (top-5 {top5:.2%})" if top5 is not None else "")
    if (on_test := result.metrics.get("test_accuracy")) is not None:
        print(f"On the test images, measured once at the end: {on_test:.2%}")
    if (averaged := result.metrics.get("eval_ema_accuracy")) is not None:
        print(f"That of the averaged weights (in the folder ema): {averaged:.2%}")
    if result.baseline is not None:
        _compare(result.metrics["eval_accuracy"], result.baseline)


def _compare(value: float | None, baseline: Baseline) -> None:
    sides = f"trained on {baseline.trained_on:,} of the same images, measured on {baseline.measured_on:,}"
    shown = f"{_OTHER[baseline.metric]} {baseline.value:.4g}" if baseline.metric in _OTHER else f"{baseline.value:.2%}"
    print(f"{str(baseline).capitalize()}, {sides}: {shown}")
    if value is not None and value < baseline.value:
        print(
            "The network is behind this linear model. Try more --num_train_epochs; less augmentation "
            "(--crop_min_scale 0.8, without --auto_augment and --random_erasing); or a network that has learned from "
            "other pictures (the recipe fine_tune with --model_name_or_path)."
        )
