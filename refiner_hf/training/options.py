"""Options of a training that transformers doesn't have. This file imports nothing, so `--help` is there at once."""

from dataclasses import dataclass, field


@dataclass
class RefinerTrainingOptions:
    """What [`RefinerTrainingArguments`] has beside [`~transformers.TrainingArguments`]."""

    # The stock default drops the column `image` before our transform sees it.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off: it drops the images."})
    norm_statistics_images: int = field(
        default=512,
        metadata={
            "help": "Training images over which the batch norms' statistics are re-estimated before each evaluation "
            "and save. 0 uses the running averages."
        },
    )
    synchronize_norms: bool = field(
        default=True,
        metadata={"help": "With several processes, normalise with the statistics of all their batches together."},
    )
    freeze_norms: bool = field(
        default=False, metadata={"help": "Keep the batch norms' statistics as they are (fine-tuning, small batches)."}
    )
    learning_rate_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "How many images a step has that --learning_rate is meant for. It is scaled in proportion to "
            "how many it really has (processes x images of each x accumulation). Default: the rate is taken as it is."
        },
    )
    cooldown_steps: float = field(
        default=0.0,
        metadata={
            "help": "Steps at the end, or below 1 their share of all steps, through which the learning rate stays "
            "where the schedule, --warmup_steps included, has ended before."
        },
    )
    class_weights: str = field(
        default="none",
        metadata={
            "help": "Balanced: an image counts in the loss by how rare its label is among the training images, so "
            "that each label has the same weight.",
            "choices": ["none", "balanced"],
        },
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "After training, divide the logits by the temperature that fits the evaluation images best, so "
            "that a score says how often it is right. The division goes into the heads' weights; answers stay."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End the training once so many evaluations in a row weren't better than the best (by "
            "--metric_for_best_model). Needs --load_best_model_at_end."
        },
    )
    timm_optim: str | None = field(
        default=None,
        metadata={
            "help": "Name of an optimizer of timm, in place of --optim: nmuon learns small networks with fewer steps "
            "than AdamW (its learning rate means the same)."
        },
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Each layer's learning rate is this times that of the layer after it."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Average the weights, with so much of the average left after each step. It is evaluated and saved "
            "(in the folder ema) beside the raw weights. 0 makes none."
        },
    )
    ema_warmup: bool = field(
        default=True,
        metadata={
            "help": "Let the average forget the first weights quickly: a decay of at most 1 - (1 + step)^(-2/3)."
        },
    )
    with_code: bool = field(
        default=False,
        metadata={
            "help": "Put the model's code into the folder, for trust_remote_code where this package isn't installed."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: say what would be trained, and draw a batch as the network would see it, with "
            "augmentation and all, into the output folder. Nothing goes to the Hub."
        },
    )
    example_pictures: int = field(
        default=0,
        metadata={
            "help": "So many evaluation pictures go into the folder and its card, with the model's answers. Mind that "
            "they are published with it."
        },
    )
    analysis_images: int = field(
        default=0,
        metadata={
            "help": "Measure on so many evaluation images what the trained network's attention maps and features are "
            "like, for its card (as refiner analyze does); with --example_pictures also draw where it looks in one."
        },
    )
    verify_push: bool = field(
        default=False,
        metadata={"help": "After --push_to_hub, load the model back from the Hub in a fresh process and compare."},
    )
    weights_license: str | None = field(
        default=None, metadata={"help": "License of the weights for the model card, such as apache-2.0."}
    )
