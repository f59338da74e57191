"""The data options of training and evaluation."""

from dataclasses import dataclass, field

from ..choices_refiner import MULTI_LABEL, REGRESSION, SINGLE_LABEL


@dataclass
class DataArguments:
    """Where the images come from. Without dataset name and folders: scikit-learn's digits, split once and for all."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a dataset on the Hub, or path of one that `datasets` can load."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of training images, one subfolder per label; or of parquet files."},
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, with the images to evaluate on."})
    test_dir: str | None = field(
        default=None,
        metadata={
            "help": "The same, with images to measure on once, at the end, beside those of --validation_dir or those "
            "that are held out. A dataset with both splits has it by itself."
        },
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "About this share of the training images is held out where there is no validation set. Each is "
            "decided by its content, so that a folder that grows never moves one from one side to the other."
        },
    )
    k_folds: int | None = field(
        default=None,
        metadata={
            "help": "Cross-validation: train so many times, each time without another part of the images, which is "
            "measured on. For a small folder, whose held-out images would be few."
        },
    )
    fold: int | None = field(default=None, metadata={"help": "Train only this one of the --k_folds, from 1."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the dataset as it comes instead of downloading it; needs --max_steps."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many images."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Found by its type where not given."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Found by its type or name where not given."}
    )
    problem_type: str = field(
        default=SINGLE_LABEL,
        metadata={
            "help": "What is said of an image: one label; several, as a list or a text with ';' between them, such as "
            "in the column labels of a folder's metadata.csv; or a number.",
            "choices": [SINGLE_LABEL, MULTI_LABEL, REGRESSION],
        },
    )
    unreadable_images: str = field(
        default="stop",
        metadata={
            "help": "All images are opened once before anything else. If some can't be: stop and list them, or skip "
            "them and list them in a file.",
            "choices": ["stop", "skip"],
        },
    )
    label_map_dir: str | None = field(
        default=None,
        metadata={
            "help": "Token labelling: folder of the training images' label maps, made by refiner label-maps, or of "
            "published .pt files."
        },
    )
    transposed_label_maps: bool = field(
        default=False,
        metadata={"help": "Crop label maps as the reference's code does, with x and y exchanged, for its numbers."},
    )

    def __post_init__(self):
        if self.dataset_name and (self.train_dir or self.validation_dir or self.test_dir):
            raise ValueError("Give either --dataset_name or --train_dir / --validation_dir / --test_dir, not both.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split must be between 0 and 1, got {self.train_val_split}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        self._check_folds()
        if self.problem_type != SINGLE_LABEL and (self.streaming or self.embedded or self.label_map_dir):
            raise ValueError(
                f"--problem_type {self.problem_type} is for images on this machine (--train_dir, --dataset_name), "
                "without --streaming and --label_map_dir."
            )
        if self.streaming and not self.dataset_name:
            raise ValueError("--streaming is for a --dataset_name; folders and the digits are read from disk anyway.")

    def _check_folds(self) -> None:
        if self.fold is not None and (self.k_folds is None or not 1 <= self.fold <= self.k_folds):
            raise ValueError(f"--fold must be a number from 1 to --k_folds, got {self.fold} of {self.k_folds}.")
        if self.k_folds is None:
            return
        if self.k_folds < 2:
            raise ValueError(f"--k_folds must be at least 2, got {self.k_folds}.")
        if self.validation_dir or self.streaming:
            raise ValueError("--k_folds divides the training images by itself: not with --validation_dir or a stream.")

    @property
    def held_out(self) -> tuple[float, float]:
        """Which part of the training images is held out, where there is no validation set: from and to, in [0, 1]."""
        if self.k_folds is None:
            return 0.0, self.train_val_split
        number = self.fold or 1
        return (number - 1) / self.k_folds, number / self.k_folds

    @property
    def embedded(self) -> bool:
        """Whether no data was named, so that the digits are used."""
        return not (self.dataset_name or self.train_dir or self.validation_dir or self.test_dir)


@dataclass
class AugmentationArguments:
    """What happens to training images (timm's transforms)."""

    crop_min_scale: float = field(
        default=0.35, metadata={"help": "Smallest share of a training image's area that a random crop keeps."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    rotation: float = field(
        default=0.0, metadata={"help": "Turn a training image by at most so many degrees, to either side."}
    )
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "Strength of random brightness, contrast and saturation. Not with --auto_augment."},
    )
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's name of an augmentation policy, such as rand-m9-mstd0.5-inc1."}
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Share of training images in which a random box is replaced by noise."}
    )
    mixup: float = field(
        default=0.0,
        metadata={"help": "Blend a batch with itself in reverse order, by a share from Beta(mixup, mixup). 0: don't."},
    )
    cutmix: float = field(
        default=0.0,
        metadata={
            "help": "Swap a box in place of blending, its share from Beta(cutmix, cutmix). With both, one is chosen "
            "for each batch."
        },
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "How often an image comes in an epoch, each time augmented differently."}
    )

    def __post_init__(self):
        if not 0 < self.crop_min_scale <= 1:
            raise ValueError(f"--crop_min_scale must be in (0, 1], got {self.crop_min_scale}.")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"--rotation must be in [0, 180] degrees, got {self.rotation}.")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"--random_erasing must be in [0, 1], got {self.random_erasing}.")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.repeated_augmentation < 1:
            raise ValueError(f"--repeated_augmentation must be at least 1, got {self.repeated_augmentation}.")
