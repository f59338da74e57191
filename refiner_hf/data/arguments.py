"""The data options of training and evaluation."""

from dataclasses import dataclass, field


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
        if self.streaming and not self.dataset_name:
            raise ValueError("--streaming is for a --dataset_name; folders and the digits are read from disk anyway.")

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
