"""The network and the image processor that a run begins with."""

import copy
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..configuration_refiner import RefinerConfig
from ..data.augmentation import output_size
from ..data.transforms import match_labels
from ..image_processing_pil_refiner import RefinerImageProcessorMixin
from ..image_processing_refiner import RefinerImageProcessor
from ..modeling_refiner import RefinerForImageClassification
from ..utils.fitting import try_out
from ..utils.heads import head_modules
from ..utils.image_config import image_size_of, label_names_of, set_image_size
from ..utils.loading import has_image_processor, load_config, load_image_processor, load_network
from ..utils.model_source import Source, find_source
from .model_arguments import ModelArguments


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
) -> tuple[PreTrainedModel, list[int] | None]:
    """
    A new Refiner for `labels`, or a checkpoint's network, a Refiner or another, fitted to them.

    A checkpoint with the same labels keeps its heads and its label order, whatever order the data has. With other
    labels, or none, its heads are replaced, with a warning, unless `keep_labels`; only then may the checkpoint lack
    them.

    Returns:
        the model, and its number of each of the data's labels (`None` where they are the same).

    Raises:
        `ValueError`: the checkpoint isn't an encoder of images that can classify, or isn't whole; or, with
            `keep_labels`, labels that it doesn't know.
    """
    if source is None:
        new = getattr(RefinerConfig, args.model_size)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        sizes = {} if args.image_size is None else {"image_size": args.image_size}
        config = new(**names, **args.overrides | sizes)
        config.refine_implementation = args.refine_implementation
        return RefinerForImageClassification(config), None

    config = load_config(source)
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise ValueError(f"{source} is a {config.model_type!r} model, of which there is no image classifier.")
    own, had = copy.deepcopy(config), label_names_of(config)
    replaced = not keep_labels and set(labels) != set(had)
    for name, value in args.overrides.items():
        if not hasattr(config, name):
            raise ValueError(f"--config_overrides has {name}, which the configuration of {source} doesn't have.")
        setattr(config, name, value)
    if args.image_size is not None:
        set_image_size(config, args.image_size)
    if isinstance(config, RefinerConfig):
        model = _load_refiner(args, source, config, own, replaced)
        if replaced:
            model.reset_classifier(labels)
    else:
        model = _load_other(source, config, labels if replaced else None)
        if hasattr(model, "set_refine_implementation"):
            model.set_refine_implementation(args.refine_implementation)
    if not replaced:
        return model, match_labels(labels, had)
    logger.warning(
        f"The data's {len(labels)} labels are not the checkpoint's {len(had)}: its classifiers are replaced "
        "by new ones."
    )
    return model, None


def _load_refiner(
    args: ModelArguments, source: Source, config: RefinerConfig, own: RefinerConfig, replaced: bool
) -> Any:
    # A head that the checkpoint's own configuration doesn't have was asked for by --config_overrides.
    had = {"dense_classifier.": own.use_dense_head, "distillation_classifier.": own.use_distillation_head}
    new_heads = tuple(head for head in _HEADS if replaced or not had.get(head, True))
    return load_network(
        source,
        RefinerForImageClassification,
        may_lack=lambda tensor: tensor.startswith(new_heads),
        # What masked image modelling needs beside the network.
        may_have=lambda tensor: tensor.startswith("decoder.") or tensor.endswith(".mask_token"),
        config=config,
        refine_implementation=args.refine_implementation,
    )


def _load_other(source: Source, config: PreTrainedConfig, labels: list[str] | None) -> PreTrainedModel:
    """With a new head for `labels`, where there are some; in float32, in which training keeps weights."""
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    new: tuple[str, ...] = () if labels is None else tuple(f"{name}." for name in head_modules(config))

    def without_use(tensor: str) -> bool:  # parts that some models are saved with, and others without
        return "mask_token" in tensor or "pooler." in tensor

    model = load_network(
        source,
        AutoModelForImageClassification,
        may_lack=lambda tensor: tensor.startswith(new) or without_use(tensor),
        may_have=without_use,
        may_differ=lambda tensor: tensor.startswith(new),
        config=config,
        dtype=torch.float32,
    )
    for name, module in model.named_modules():
        if f"{name}.".startswith(new) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # it may be for as many other labels
    return model


def load_processor(args: ModelArguments, source: Source | None, model: PreTrainedModel) -> BaseImageProcessor:
    """
    The checkpoint's image processor, or a new one, at the model's image size, tried out with the model. A model of
    transformers keeps its own.

    Raises:
        `ValueError`: the checkpoint's is damaged, or makes images of another size than its network takes; `crop_pct`
            for a processor that has none.
    """
    processor = _fitting_processor(args, source, model.config)
    if source is not None:
        try_out(source.name, model, processor)
    return processor


def _fitting_processor(args: ModelArguments, source: Source | None, config: PreTrainedConfig) -> BaseImageProcessor:
    height, width = image_size_of(config)
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
