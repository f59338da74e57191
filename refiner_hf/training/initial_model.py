"""The network and the image processor that a run begins with."""

from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..configuration_refiner import RefinerConfig
from ..data.augmentation import output_size
from ..data.transforms import match_labels
from ..image_processing_pil_refiner import RefinerImageProcessorMixin
from ..image_processing_refiner import RefinerImageProcessor
from ..modeling_refiner import RefinerForImageClassification
from ..utils.fitting import try_out
from ..utils.loading import has_image_processor, load_config, load_image_processor, load_network
from ..utils.model_source import Source, find_source
from .arguments import ModelArguments


logger = logging.get_logger(__name__)

_HEADS = ("classifier.", "distillation_classifier.", "dense_classifier.")


def source_of_model(args: ModelArguments) -> Source | None:
    """Where the checkpoint that a run begins with is, looked for once; `None` for a new network."""
    if args.model_name_or_path is None:
        return None
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    return find_source(args.model_name_or_path, **hub)


def load_model(
    args: ModelArguments, source: Source | None, labels: list[str], *, keep_labels: bool
) -> tuple[RefinerForImageClassification, list[int] | None]:
    """
    A new network for `labels`, or a checkpoint's, fitted to them.

    A checkpoint with the same labels keeps its heads and its label order, whatever order the data has. With other
    labels its heads are replaced, with a warning, unless `keep_labels`; only then may the checkpoint lack them.

    Returns:
        the model, and its number of each of the data's labels (`None` where they are the same).

    Raises:
        `ValueError`: the checkpoint isn't a Refiner's, or isn't whole; or, with `keep_labels`, labels that it doesn't
            know.
    """
    sizes = {} if args.image_size is None else {"image_size": args.image_size}
    if source is None:
        new = getattr(RefinerConfig, args.model_size)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        config = new(**names, **args.overrides | sizes)
        config.refine_implementation = args.refine_implementation
        return RefinerForImageClassification(config), None

    config = load_config(source)
    if not isinstance(config, RefinerConfig):
        raise ValueError(
            f"{args.model_name_or_path} is a {config.model_type!r} model, not a Refiner. (Of a ViT or DeiT "
            "refiner refine-vit makes one.)"
        )
    replaced = not keep_labels and set(labels) != set(config.label_names)
    # A head that the checkpoint's own configuration doesn't have was asked for by --config_overrides.
    own = {"dense_classifier.": config.use_dense_head, "distillation_classifier.": config.use_distillation_head}
    new_heads = tuple(head for head in _HEADS if replaced or not own.get(head, True))
    for name, value in (args.overrides | sizes).items():
        setattr(config, name, value)
    model = load_network(
        source,
        RefinerForImageClassification,
        may_lack=lambda tensor: tensor.startswith(new_heads),
        # What masked image modelling needs beside the network.
        may_have=lambda tensor: tensor.startswith("decoder.") or tensor.endswith(".mask_token"),
        config=config,
        refine_implementation=args.refine_implementation,
    )
    model_labels = model.config.label_names
    if not replaced:
        return model, match_labels(labels, model_labels)
    logger.warning(
        f"The data's {len(labels)} labels are not the checkpoint's {len(model_labels)}: its classifiers are replaced "
        "by new ones."
    )
    model.reset_classifier(labels)
    return model, None


def load_processor(
    args: ModelArguments, source: Source | None, model: RefinerForImageClassification
) -> BaseImageProcessor:
    """
    The checkpoint's image processor, or a new one, at the model's image size, tried out with the model. A Refiner that
    was a ViT before ([`~refiner_hf.refine_vit`]) keeps the ViT's.

    Raises:
        `ValueError`: the checkpoint's is damaged, or makes images of another size than its network takes; `crop_pct`
            for a processor that has none.
    """
    processor = _fitting_processor(args, source, model.config)
    if source is not None:
        try_out(source.name, model, processor)
    return processor


def _fitting_processor(args: ModelArguments, source: Source | None, config: RefinerConfig) -> BaseImageProcessor:
    height, width = config.image_height_width
    size = {"height": height, "width": width}
    own = {"size": size} if args.crop_pct is None else {"size": size, "crop_pct": args.crop_pct}
    if source is None:
        return RefinerImageProcessor(**own)
    if not has_image_processor(source):
        logger.warning(f"{source} has no image processor; taking the standard one.")
        return RefinerImageProcessor(**own)
    processor = load_image_processor(source)
    try:
        made = output_size(processor)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The image processor of {source} doesn't say which height and width its images have."
        ) from error
    if made != (height, width) and args.image_size is None and "image_size" not in args.overrides:
        raise ValueError(
            f"The image processor of {source} makes images of {made[0]}x{made[1]} pixels, and its network takes "
            f"{height}x{width}. Give the size that you want: --image_size."
        )
    if isinstance(processor, RefinerImageProcessorMixin):
        return RefinerImageProcessor.from_dict(processor.to_dict(), **own)
    if args.crop_pct is not None:
        raise ValueError(f"{source} has a {type(processor).__name__}, which knows no --crop_pct.")
    if made == (height, width):
        return processor
    if not processor.do_center_crop:
        return load_image_processor(source, size=size)
    grown = {"height": height / processor.crop_size["height"], "width": width / processor.crop_size["width"]}
    sides = {side: pixels for side, pixels in dict(processor.size).items() if pixels}
    resized = {side: round(pixels * grown.get(side, max(grown.values()))) for side, pixels in sides.items()}
    return load_image_processor(source, size=resized, crop_size=size)
