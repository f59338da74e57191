"""A reference checkpoint file to a Hub-ready folder."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..cards.conversion import converted_card
from ..cards.paper import published_network
from ..configuration_refiner import RefinerConfig
from ..hub.code import add_code
from ..image_processing_refiner import RefinerImageProcessor
from ..modeling_refiner import RefinerForImageClassification
from ..utils.image_config import image_shape_of
from ..utils.new_folder import check_new, new_folder
from ..utils.same_answers import check_same_logits
from .weights import check_tensors, read_config, rename_state_dict


_OTHER_CROP_PCT = 0.9
_ROUNDING = 1e-5  # of a logit: a folder that was written and read
# WordNet's lemmas of ImageNet-1k's 1000 synsets in the usual order, as timm's ImageNetInfo lists them; the second
# "crane" is called "crane2", as in the Hub's imagenet-1k, so that no two labels have one name.
IMAGENET_LABELS = Path(__file__).with_name("imagenet_1k_labels.txt")


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    use_ema: bool = False,
    num_attention_heads: int | None = None,
    crop_pct: float | None = None,
    with_code: bool = False,
) -> RefinerForImageClassification:
    """
    Turns a reference checkpoint into a folder with weights, configuration, image processor and card.

    Args:
        checkpoint: a file as the reference's training writes it, or a bare state dict.
        output_dir: the folder to make; must be new or empty.
        use_ema (`bool`, *optional*): take the averaged weights (`state_dict_ema`).
        num_attention_heads (`int`, *optional*): needed for a network that refines no map; nothing else shows it.
        crop_pct (`float`, *optional*): of the evaluation crop; by default the published one of the architecture.
        with_code (`bool`, *optional*): put the model's code into the folder.

    Returns:
        [`RefinerForImageClassification`]: the converted model, as loaded back from the folder.

    Raises:
        `ValueError`: no reference checkpoint, or tensors that are unknown, missing or misshapen (they are named).
        `StrictDataclassError` (of `huggingface_hub.errors`): an architecture that makes no sense.
        `FileExistsError`: `output_dir` holds something already. Nothing half-written is left behind in any case.
    """
    output_dir = Path(output_dir)
    if crop_pct is not None and crop_pct <= 0:
        raise ValueError(f"crop_pct must be positive, got {crop_pct}.")
    check_new(output_dir)

    content = load_reference_file(checkpoint)
    reference = select_state_dict(content, use_ema)
    config = read_config(reference, num_attention_heads)
    if (drop_path := getattr(content.get("args"), "drop_path", None)) is not None:
        config.drop_path_rate = float(drop_path)
    name_labels(config)
    if crop_pct is None:
        published = published_network(config)
        crop_pct = published.crop_pct if published else _OTHER_CROP_PCT
    height, width = config.image_height_width
    processor = RefinerImageProcessor(size={"height": height, "width": width}, crop_pct=crop_pct)

    model = RefinerForImageClassification(config)
    renamed = rename_state_dict(reference)
    check_tensors(renamed, model.state_dict())
    model.load_state_dict(renamed)

    with new_folder(output_dir) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if with_code:
            add_code(unfinished)
        card = converted_card(
            output_dir.name,
            Path(checkpoint).name,
            content,
            model,
            use_ema=use_ema,
            crop_pct=crop_pct,
            remote_code=with_code,
        )
        card.save(unfinished / "README.md")
        loaded = RefinerForImageClassification.from_pretrained(unfinished)
        check_same_logits(model, loaded, image_shape_of(model.config), _ROUNDING)
    loaded.config.name_or_path = str(output_dir)
    return loaded


def load_reference_file(path: str | Path) -> dict[str, Any]:
    """
    Reads a checkpoint with torch's restricted unpickler, which builds tensors, plain containers and an
    `argparse.Namespace`, and runs no code from the file.

    Raises:
        `ValueError`: no such file, a damaged one, or one that holds other objects; the message says which.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} holds objects that aren't loaded for safety"
            + (f", such as {what.group(1)}." if what else ", or it is no PyTorch checkpoint.")
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a PyTorch checkpoint: {error}. Is it complete?") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint or state dict.")
    return dict(content)


def select_state_dict(content: Mapping[str, Any], use_ema: bool) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, raw or averaged, without the `module.` of data-parallel training."""
    key = "state_dict_ema" if use_ema else "state_dict"
    if key in content:
        state_dict = content[key]
    elif use_ema or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"The checkpoint has no {key!r}, but {sorted(content)}.")
    else:
        state_dict = content
    if not isinstance(state_dict, Mapping) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ValueError(f"{key!r} in the checkpoint isn't a state dict of tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def name_labels(config: RefinerConfig) -> None:
    """Gives a network of 1000 labels those of ImageNet-1k."""
    if config.num_labels == 1000:
        names = IMAGENET_LABELS.read_text(encoding="utf-8").splitlines()
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
