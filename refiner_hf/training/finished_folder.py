"""The finished folder of a training run: pictures, code and card beside the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig, Trainer, pipeline
from transformers.utils import logging

from ..cards import captions
from ..cards.card import make_card, refines
from ..cards.plots import plot_confusion_matrix, plot_learning_curve, plot_predictions
from ..cards.training import training_content
from ..choices_refiner import SINGLE_LABEL
from ..data.images import decode_image
from ..data.rows import StoredRows
from ..data.sources import IMAGE_COLUMN, LABEL_COLUMN, ImageData
from ..hub.code import add_code
from ..hub.publish import is_adapter, public_content
from ..utils.files import write_json
from ..utils.image_config import label_names_of
from ..utils.loading import load_classifier_and_processor
from ..utils.run_files import RUN_FILE
from ..utils.text import counted
from .arguments import RefinerTrainingArguments
from .baseline import Baseline
from .map_analysis import analyze_folder
from .metrics import Answers, Metrics


logger = logging.get_logger(__name__)

CONFUSION_MATRIX, BY_LABEL = "confusion_matrix.csv", "by_label.csv"
EXAMPLES = 8
LARGEST_EXAMPLE = 512


@dataclass
class Example:
    """An evaluation picture, its true label, and the model's best answer with its score."""

    image: Image.Image
    label: str
    answer: str
    score: float


def finish_folder(
    trainer: Trainer,
    data: ImageData,
    arguments: dict[str, dict[str, Any]],
    measured: dict[str, float],
    metrics: Metrics,
    baseline: Baseline | None,
) -> list[Example]:
    """
    Writes pictures, code (with `--with_code`) and card into the Trainer's output folder.

    Args:
        trainer: trained, its model saved.
        data: what it was trained and evaluated on.
        arguments: the run's options by group: model, data, augmentation, training.
        measured: all measured numbers, named as the Trainer does.
        metrics: of the evaluation, if there was one.
        baseline: what a linear model reaches, if it was measured.

    Returns:
        what the saved model answers for a few evaluation pictures.
    """
    args: RefinerTrainingArguments = trainer.args
    folder = Path(args.output_dir)
    for name in (RUN_FILE, "trainer_state.json"):
        write_json(folder / name, public_content(folder / name))
    pictures = [("learning_curve.png", captions.LEARNING_CURVE)]
    plot_learning_curve(trainer.state.log_history, folder / pictures[0][0])
    if (confusion_matrix := metrics.confusion_matrix) is not None:
        plot_confusion_matrix(confusion_matrix, label_names_of(trainer.model.config), folder / "confusion_matrix.png")
        pictures.append(("confusion_matrix.png", captions.confusion_matrix(data.evaluation_split)))
    examples = predict_examples(folder, data, args.example_pictures or EXAMPLES) if _have_one_label(data) else []
    if examples and args.example_pictures:
        titles = [f"{example.label}: {example.answer} {example.score:.0%}" for example in examples]
        plot_predictions([example.image for example in examples], titles, folder / "predictions.png")
        pictures.append(("predictions.png", captions.PREDICTIONS))
        _save_pictures([example.image for example in examples], folder / "examples")
    mistakes = "mistakes.png" if args.example_pictures else "_mistakes.png"  # the latter is never published
    if metrics.answers is not None and _draw_mistakes(folder / mistakes, metrics.answers, data, trainer.model.config):
        if args.example_pictures:
            pictures.append((mistakes, captions.MISTAKES))
    if args.analysis_images and data.evaluation is not None:
        may_show = args.example_pictures > 0
        try:
            pictures += analyze_folder(folder, data, args.analysis_images, str(args.device), may_show)
        except (RuntimeError, OSError, ValueError) as error:  # such as too little memory: no reason to lose the rest
            logger.warning(f"The network's maps weren't measured: {error} Try refiner analyze --model {folder}.")

    if args.with_code and refines(trainer.model):
        add_code(folder)
    beside = (
        {}
        if baseline is None
        else {
            f"{str(baseline).capitalize()}, trained on {counted(baseline.trained_on, 'image')}": (
                baseline.metric,
                baseline.value,
            )
        }
    )
    facts = training_content(
        trainer,
        measured,
        data=data,
        arguments=arguments,
        pictures=pictures,
        beside=beside,
        confusion_matrix=confusion_matrix,
    )
    make_card(facts).save(folder / "README.md")
    return examples


def _have_one_label(data: ImageData) -> bool:
    """Whether there are evaluation images, and the best answer for one can be compared with its label."""
    return data.evaluation is not None and data.problem_type == SINGLE_LABEL


def predict_examples(folder: Path, data: ImageData, count: int) -> list[Example]:
    """What the saved folder's pipeline answers for `count` evaluation images, spread over the set."""
    if is_adapter(folder):
        model, processor = load_classifier_and_processor(str(folder))
        classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    else:
        classify = pipeline("image-classification", model=str(folder), device="cpu")
    rows = data.evaluation.spread(count)
    images = [decode_image(row[IMAGE_COLUMN]) for row in rows]
    answers = [answer[0] for answer in classify(images, top_k=1)] if images else []
    return [
        Example(image, data.labels[row[LABEL_COLUMN]], answer["label"], answer["score"])
        for image, row, answer in zip(images, rows, answers)
    ]


def _draw_mistakes(file: Path, answers: Answers, data: ImageData, config: PreTrainedConfig) -> bool:
    """Evaluation pictures that were given a wrong label with the highest scores; whether there are any."""
    if not isinstance(data.evaluation, StoredRows) or not (worst := answers.worst(EXAMPLES)):
        return False
    names, images = label_names_of(config), [decode_image(data.evaluation[i][IMAGE_COLUMN]) for i in worst]
    titles = [
        f"{names[answers.labels[i]]}, taken for\n{names[answers.given[i]]} {answers.scores[i]:.0%}" for i in worst
    ]
    plot_predictions(images, titles, file)
    return True


def _save_pictures(images: list[Image.Image], folder: Path) -> None:
    """folder/0.png and so on, at a size for looking."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        image.thumbnail((LARGEST_EXAMPLE, LARGEST_EXAMPLE))
        image.save(folder / f"{i}.png")
