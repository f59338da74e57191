"""Cross-validation: a training for each part of the images, which is measured on that part."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.arguments import AugmentationArguments, DataArguments
from ..utils.files import read_json, write_json
from .arguments import RefinerTrainingArguments
from .model_arguments import ModelArguments
from .output_folder import FINISHED_FILE
from .run import RunResult, run


logger = logging.get_logger(__name__)

FOLDS_FILE = "k_folds.json"
_MEASURED = ("eval_results.json", "baseline_results.json")
_NOT_OF_THE_NETWORK = ("runtime", "_per_second", "epoch")


@dataclass
class FoldsResult:
    """What a cross-validation leaves: its folder, with a finished folder for each fold, and each number by fold."""

    folder: Path
    metrics: dict[str, list[float]]

    def mean(self, name: str) -> float:
        """Over the folds."""
        return float(np.mean(self.metrics[name]))

    def standard_deviation(self, name: str) -> float:
        """Between the folds (with n - 1)."""
        return float(np.std(self.metrics[name], ddof=1))


def run_folds(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: RefinerTrainingArguments,
    recipe: str | None = None,
) -> FoldsResult | RunResult:
    """
    Trains `data_args.k_folds` times as [`~refiner_hf.training.run.run`], each time without another part of the images,
    on which it measures. Each training has a folder of its own, `fold_1` and so on, within the output folder, which
    also gets `k_folds.json` with all numbers. After an interruption, finished folds are kept as they are. A dry run is
    that of the first fold.

    Raises:
        `ValueError`: as `run`; or something is to be pushed, of which there would be several.
    """
    assert data_args.k_folds is not None
    if training_args.push_to_hub:
        raise ValueError("--k_folds measures with several networks: none is pushed. Train one without it.")
    if not (training_args.do_train and training_args.do_eval):
        raise ValueError("--k_folds trains and measures: give both --do_train and --do_eval, or neither.")
    folder, measured = Path(str(training_args.output_dir)), []
    for number in range(1, data_args.k_folds + 1):
        args = copy.copy(training_args)
        args.output_dir = str(folder / f"fold_{number}")
        if not (Path(args.output_dir) / FINISHED_FILE).exists():
            logger.warning(f"Fold {number} of {data_args.k_folds}: {args.output_dir}")
            result = run(model_args, replace(data_args, fold=number), augmentation_args, args, recipe)
            if args.dry_run:
                return result
        measured.append(_measured(Path(args.output_dir)))
    folds = FoldsResult(folder, {name: [each[name] for each in measured] for name in _common(measured)})
    if training_args.should_save:
        write_json(folder / FOLDS_FILE, _summary(folds))
    return folds


def _measured(folder: Path) -> dict[str, float]:
    """What was measured of one fold, as its folder has it."""
    files = [folder / name for name in _MEASURED if (folder / name).exists()]
    found: dict[str, Any] = {}
    for file in files:
        found |= read_json(file)
    return {name: value for name, value in found.items() if not name.endswith(_NOT_OF_THE_NETWORK)}


def _common(measured: list[dict[str, float]]) -> list[str]:
    return [name for name in measured[0] if all(name in each for each in measured)]


def _summary(result: FoldsResult) -> dict[str, Any]:
    return {
        name: {"mean": result.mean(name), "standard_deviation": result.standard_deviation(name), "folds": values}
        for name, values in result.metrics.items()
    }
