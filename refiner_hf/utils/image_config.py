"""What the configuration of any image network of transformers says of its images and labels."""

from typing import Any


def of_images(config: Any) -> Any:
    """The part that describes the images: of two towers, the vision model's."""
    return getattr(config, "vision_config", config)


def image_size_of(config: Any) -> tuple[int, int]:
    """
    Height and width of the images.

    Raises:
        `ValueError`: the configuration doesn't say it.
    """
    size = getattr(of_images(config), "image_size", None)
    if size is None:
        raise ValueError(f"A {config.model_type!r} model doesn't say of which size its images are.")
    return (size, size) if isinstance(size, int) else tuple(size)


def set_image_size(config: Any, size: int) -> None:
    """For a network that is made or loaded afterwards."""
    of_images(config).image_size = size


def channels_of(config: Any) -> int:
    """How many channels images have."""
    return getattr(of_images(config), "num_channels", 3)


def image_shape_of(config: Any) -> tuple[int, int, int]:
    """Channels, height and width."""
    return channels_of(config), *image_size_of(config)


def label_names_of(config: Any) -> list[str]:
    """The labels in the order of the logits."""
    return [config.id2label[number] for number in sorted(config.id2label)]
