"""A ViT's folder or Hub name to the folder of a Refiner that starts as the same function."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from PIL import Image as PILImage
from transformers.image_processing_utils import BaseImageProcessor

from ..cards.conversion import refined_card
from ..hub.code import add_code
from ..modeling_refiner import RefinerForImageClassification
from ..utils.fitting import check_processor
from ..utils.loading import load_image_processor
from ..utils.model_source import find_source
from ..utils.new_folder import check_new, new_folder
from ..utils.same_answers import check_same_logits
from .vit import load_refinable, refine_vit


_BATCH = 32
_ROUNDING = 1e-3  # what float32 may make of other orders of the same sums in a large network


def refine_to_folder(
    model: str,
    output_dir: str | Path,
    pictures: Iterable[PILImage.Image] | None = None,
    *,
    revision: str | None = None,
    refined_layers: list[int] | None = None,
    refinement: str = "expansion_convolution",
    expansion_ratio: int = 3,
    refinement_kernel_size: int = 3,
    with_code: bool = False,
) -> RefinerForImageClassification:
    """
    [`~refiner_hf.refine_vit`] from folder to folder: weights, configuration, the source's own image processor, and a
    card. The saved model is loaded back and must answer as the source.

    Args:
        model (`str`): folder or Hub name of a ViT or DeiT image classifier.
        output_dir: the folder to make; must be new or empty.
        pictures (`PIL.Image` ones, *optional*): some dozens, for the norms' statistics.
        revision (`str`, *optional*): branch, tag or commit of the model on the Hub.
        refined_layers (`list[int]`, *optional*): which layers refine their map, from 1. Default: all.
        refinement, expansion_ratio, refinement_kernel_size (*optional*): as in [`RefinerConfig`].
        with_code (`bool`, *optional*): put the model's code into the folder.

    Returns:
        [`RefinerForImageClassification`]: as loaded back from the folder.

    Raises:
        `ValueError`: no ViT or DeiT, one without image classifier, layers that aren't there.
        `OSError`: there is no such model, or it has no image processor.
        `FileExistsError`: `output_dir` holds something already. Nothing half-written is left behind in any case.
    """
    output_dir = Path(output_dir)
    check_new(output_dir)
    found = find_source(model, revision=revision)
    source = load_refinable(found)
    layers = range(1, source.config.num_hidden_layers + 1)
    if unknown := sorted(set(refined_layers or ()) - set(layers)):
        raise ValueError(f"The model has the layers 1 to {layers[-1]}, there is no layer {unknown[0]}.")
    processor = load_image_processor(found)
    check_processor(processor, source.config)
    refined = refine_vit(
        source,
        None if pictures is None else _prepared(pictures, processor),
        attention_types=["refined" if layer in (refined_layers or layers) else "plain" for layer in layers],
        refinement=refinement,
        expansion_ratio=expansion_ratio,
        refinement_kernel_size=refinement_kernel_size,
    )
    with new_folder(output_dir) as unfinished:
        refined.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if with_code:
            add_code(unfinished)
        card = refined_card(output_dir.name, model, refined, on_pictures=pictures is not None, remote_code=with_code)
        card.save(unfinished / "README.md")
        loaded = RefinerForImageClassification.from_pretrained(unfinished)
        check_same_logits(source, loaded, _ROUNDING)
    loaded.config.name_or_path = str(output_dir)
    return loaded


def _prepared(pictures: Iterable[PILImage.Image], processor: BaseImageProcessor) -> Iterator[torch.Tensor]:
    """Batches (B, C, height, width)."""
    pictures = iter(pictures)
    while some := list(islice(pictures, _BATCH)):
        yield processor(some, return_tensors="pt").pixel_values
