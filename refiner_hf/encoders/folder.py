"""An encoder's folder or Hub name to the folder of a refined one that starts as the same function."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cards.conversion import refined_card
from ..encoder_models_refiner import class_as_saved
from ..hub.code import add_code
from ..utils.loading import has_image_processor, load_config, load_image_processor, load_network, load_tokenizer
from ..utils.model_inputs import moved
from ..utils.model_source import Source, find_source
from ..utils.new_folder import check_new, new_folder
from ..utils.same_answers import check_same_answers
from .inputs import batches_of
from .modules import check_refinable
from .refine import refine


_ROUNDING = 1e-3  # what float32 may make of other orders of the same sums in a large network


def refine_to_folder(
    model: str,
    output_dir: str | Path,
    data: Sequence[Any],
    *,
    revision: str | None = None,
    layers: list[int] | None = None,
    refinement: str = "expansion_convolution",
    expansion_ratio: int = 3,
    refinement_kernel_size: int = 3,
    with_code: bool = False,
) -> PreTrainedModel:
    """
    [`~refiner_hf.refine`] from folder to folder: weights, configuration, the model's own image processor or tokenizer,
    and a card. The saved model is loaded back and must answer as the source.

    Args:
        model (`str`): folder or Hub name of an encoder, with any head or none.
        output_dir: the folder to make; must be new or empty.
        data: rows with a picture, or with a text or two, such as a `Dataset`; some dozens of them give the norms'
            statistics.
        revision (`str`, *optional*): branch, tag or commit of the model on the Hub.
        layers (`list[int]`, *optional*): which layers refine their map, from 0. Default: all.
        refinement, expansion_ratio, refinement_kernel_size (*optional*): as in [`RefinerConfig`].
        with_code (`bool`, *optional*): put the model's code into the folder.

    Returns:
        `PreTrainedModel`: as loaded back from the folder.

    Raises:
        `ValueError`: a model that can't be refined, or data that don't fit it.
        `OSError`: there is no such model, or it has no image processor or tokenizer.
        `FileExistsError`: `output_dir` holds something already. Nothing half-written is left behind in any case.
    """
    output_dir = Path(output_dir)
    check_new(output_dir)
    source = find_source(model, revision=revision)
    network = load_as_saved(source)
    check_refinable(network)
    processor = load_processing_class(source)
    batches = batches_of(network, data, processor)
    expected = _answers(network, batches[0])
    refine(
        network,
        batches,
        layers=layers,
        refinement=refinement,
        expansion_ratio=expansion_ratio,
        refinement_kernel_size=refinement_kernel_size,
    )
    with new_folder(output_dir) as unfinished:
        network.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if with_code:
            add_code(unfinished)
        refined_card(output_dir.name, model, network, remote_code=with_code).save(unfinished / "README.md")
        loaded = load_network(str(unfinished), type(network))
        check_same_answers(expected, _answers(loaded, batches[0]), _ROUNDING, "The saved model, loaded again,")
    loaded.config.name_or_path = str(output_dir)
    return loaded


def load_as_saved(source: Source) -> PreTrainedModel:
    """
    A model of the class that it was saved as, in float32.

    Raises:
        `ValueError`: its configuration doesn't say which, or one that no Auto class loads; or as [`load_network`].
    """
    config = load_config(source)
    kind = class_as_saved(config)
    if kind is None:
        names = " or ".join(config.architectures or ["model of a class that its configuration doesn't say"])
        raise ValueError(f"{source} is a {names}, and no Auto class of transformers loads that.")
    # Parts that some models are saved with, and others without.
    unused = ("pooler.", "mask_token", "cls.seq_relationship.")
    return load_network(
        source,
        kind,
        config=config,
        dtype=torch.float32,
        may_lack=lambda tensor: any(part in tensor for part in unused),
        may_have=lambda tensor: any(part in tensor for part in unused),
    )


def load_processing_class(source: Source) -> Any:
    """The image processor of a model, or its tokenizer."""
    if has_image_processor(source):
        return load_image_processor(source)
    return load_tokenizer(source)


@torch.no_grad()
def _answers(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """What a batch gives, where tokens are real."""
    output = model(**moved(model, batch)).to_tuple()[0]
    mask = batch.get("attention_mask")
    return output[mask.bool()] if mask is not None and output.shape[:2] == mask.shape else output
