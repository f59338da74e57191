"""The network and the image processor that a run begins with."""

from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..configuration_refiner import RefinerConfig
from ..data.augmentation import output_size
from ..data.transforms import match_labels
from ..image_processing_pil_refiner import RefinerImageProcessorMixin
from ..image_processing_refiner import RefinerImageProcessor
from ..modeling_refiner import RefinerForImageClassification
from .arguments import ModelArguments


logger = logging.get_logger(__name__)


def load_model(
    args: ModelArguments, labels: list[str], *, keep_labels: bool
) -> tuple[RefinerForImageClassification, list[int] | None]:
    """
    A new network for `labels`, or a checkpoint's, fitted to them.

    A checkpoint with the same labels keeps its heads and its label order, whatever order the data has. With other
    labels its heads are replaced, with a warning, unless `keep_labels`.

    Returns:
        the model, and its number of each of the data's labels (`None` where they are the same).

    Raises:
        `ValueError`: the checkpoint isn't a Refiner's; or, with `keep_labels`, labels that it doesn't know.
    """
    sizes = {} if args.image_size is None else {"image_size": args.image_size}
    if args.model_name_or_path is None:
        new = getattr(RefinerConfig, args.model_size)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        config = new(**names, **args.overrides | sizes)
        return RefinerForImageClassification(config, args.refine_implementation), None

    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    config = AutoConfig.from_pretrained(args.model_name_or_path, **hub)
    if not isinstance(config, RefinerConfig):
        raise ValueError(
            f"{args.model_name_or_path} is a {config.model_type!r} model, not a Refiner. (Of a ViT or DeiT "
            "refiner-refine-vit makes one.)"
        )
    try:
        model = RefinerForImageClassification.from_pretrained(
            args.model_name_or_path,
            refine_implementation=args.refine_implementation,
            **hub,
            **args.overrides | sizes,
        )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {args.model_name_or_path} don't fit the network: {error}") from error
    model_labels = model.config.label_names
    if keep_labels or set(labels) == set(model_labels):
        return model, match_labels(labels, model_labels)
    logger.warning(
        f"The data's {len(labels)} labels are not the checkpoint's {len(model_labels)}: its classifiers are replaced "
        "by new ones."
    )
    model.reset_classifier(labels)
    return model, None


def load_processor(args: ModelArguments, config: RefinerConfig) -> BaseImageProcessor:
    """
    The checkpoint's image processor, or a new one, at the model's image size. A Refiner that was a ViT before
    ([`~refiner_hf.refine_vit`]) keeps the ViT's.

    Raises:
        `ValueError`: `crop_pct` for a processor that has none.
    """
    height, width = config.image_height_width
    size = {"height": height, "width": width}
    own = {"size": size} if args.crop_pct is None else {"size": size, "crop_pct": args.crop_pct}
    if args.model_name_or_path is None:
        return RefinerImageProcessor(**own)
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    try:
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, **hub)
    except OSError:
        logger.warning(f"{args.model_name_or_path} has no image processor; taking the standard one.")
        return RefinerImageProcessor(**own)
    if isinstance(processor, RefinerImageProcessorMixin):
        return RefinerImageProcessor.from_pretrained(args.model_name_or_path, **hub, **own)
    if args.crop_pct is not None:
        raise ValueError(f"{args.model_name_or_path} has a {type(processor).__name__}, which knows no --crop_pct.")
    if output_size(processor) == (height, width):
        return processor
    if not processor.do_center_crop:
        return AutoImageProcessor.from_pretrained(args.model_name_or_path, **hub, size=size)
    grown = {"height": height / processor.crop_size["height"], "width": width / processor.crop_size["width"]}
    sides = {side: pixels for side, pixels in dict(processor.size).items() if pixels}
    resized = {side: round(pixels * grown.get(side, max(grown.values()))) for side, pixels in sides.items()}
    return AutoImageProcessor.from_pretrained(args.model_name_or_path, **hub, size=resized, crop_size=size)
