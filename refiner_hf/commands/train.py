"""
Train, fine-tune or evaluate a Refiner.

The first word may name a recipe or a YAML or JSON file of options; options after it win. The recipe auto, which data
without a recipe get, looks at the images and chooses what fits into --time_budget; others, such as fine_tune
and imagenet_s_224, are in refiner_hf/recipes/. Without options, a small Refiner learns scikit-learn's
digits. The same command continues an interrupted run.

    refiner train                                                     # digits, under two minutes on 2 CPU cores
    refiner train --train_dir photos --output_dir out                 # photos/LABEL/*.jpg; --dry_run only says what
    refiner train auto --train_dir photos --output_dir out --time_budget 1h --horizontal_flip true
    refiner train fine_tune --model_name_or_path MODEL --train_dir photos --output_dir out
    refiner train --train_dir photos --output_dir out --push_to_hub --hub_model_id USER/NAME --verify_push
    refiner train --show_recipe imagenet_s_224 --num_train_epochs 100 # prints that recipe, changed so, as one file
    refiner train --model_name_or_path out --validation_dir more_photos --do_eval --output_dir out_eval
"""

from typing import TYPE_CHECKING

from ..data.arguments import AugmentationArguments, DataArguments
from ..training.model_arguments import ModelArguments
from .recipes import Recipe
from .running import command, if_interrupted
from .training_options import parse_training


if TYPE_CHECKING:
    from ..training.arguments import RefinerTrainingArguments
    from ..training.folds import FoldsResult
    from ..training.run import RunResult


@command(parse=parse_training)
def main(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    training_args: "RefinerTrainingArguments",
    recipe: Recipe,
) -> "RunResult | FoldsResult":
    """Runs the training or evaluation, and says what came out."""
    from ..training.folds import FoldsResult, run_folds
    from ..training.run import run
    from .training_report import report, report_folds

    with if_interrupted("The same command continues from the last checkpoint."):
        kept = recipe.to_yaml({}) if recipe.is_auto else None
        begin = run if data_args.k_folds is None or data_args.fold is not None else run_folds
        result = begin(model_args, data_args, augmentation_args, training_args, kept)
    if training_args.should_save:
        if isinstance(result, FoldsResult):
            report_folds(result)
        else:
            report(result, data_args)
    return result
