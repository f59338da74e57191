"""The cards of models that were made of other models, without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..modeling_refiner import RefinerForImageClassification
from .architecture import describe_network
from .card import CardContent, make_card
from .paper import published_network
from .usage import usage_example


def converted_card(
    name: str,
    file: str,
    content: Mapping[str, Any],
    model: RefinerForImageClassification,
    *,
    use_ema: bool,
    crop_pct: float,
    remote_code: bool,
) -> ModelCard:
    """
    The card of a converted reference checkpoint.

    Args:
        name (`str`): of the model.
        file (`str`): of the checkpoint, without its folder.
        content (`Mapping`): of the checkpoint; it may say its architecture, epoch and metric.
        model ([`RefinerForImageClassification`]): the converted one.
        use_ema (`bool`): whether its weights are the averaged ones.
        crop_pct (`float`): of the evaluation crop.
        remote_code (`bool`): whether the folder has the model's code.
    """
    kind = "averaged (EMA)" if use_ema else "raw"
    said = {
        key: content[key] for key in ("arch", "epoch", "metric") if isinstance(content.get(key), (str, int, float))
    }
    results = ""
    if published := published_network(model.config):
        results = (
            f"The network is {published.name}'s. {published.table()}\n\nThe file doesn't show whether its weights are "
            "those for which these numbers were published."
        )
    claims = "".join(f" The file says {key}: {value}." for key, value in said.items())
    return make_card(
        CardContent(
            title=name,
            summary=f"A Refiner image classifier, converted from the reference checkpoint `{file}`.",
            usage=usage_example(name, remote_code),
            results=results,
            architecture=describe_network(model),
            training=f"The {kind} weights of `{file}` were converted by `refiner_hf`; nothing was trained.{claims} "
            "What the file says about itself was not measured again. Images are prepared as in the reference's "
            f"evaluation: bicubic resize, centre crop with crop_pct {crop_pct:g}.",
            limits="Accuracy was not measured after the conversion. The saved model was loaded again and gave the "
            "same logits as the converted one. The tensors don't record how and on which data it was trained; ask the "
            "person who gave you the file.",
            remote_code=remote_code,
        )
    )


def refined_card(
    name: str, source: str, model: RefinerForImageClassification, *, on_pictures: bool, remote_code: bool
) -> ModelCard:
    """
    The card of a Refiner that was made of a ViT.

    Args:
        name (`str`): of the model.
        source (`str`): folder or Hub name of the ViT.
        model ([`RefinerForImageClassification`]): the Refiner.
        on_pictures (`bool`): whether the norms' statistics come from pictures, and not from noise.
        remote_code (`bool`): whether the folder has the model's code.
    """
    is_folder = Path(source).exists()
    called = Path(source).resolve().name if is_folder else source
    return make_card(
        CardContent(
            title=name,
            summary=f"A Refiner image classifier made of `{called}`: its attention maps pass a refinement that "
            f"doesn't change them yet. In evaluation it gives the logits of `{called}`; it is meant to be fine-tuned.",
            usage=usage_example(name, remote_code),
            architecture=describe_network(model),
            training=f"All weights except the refinement's are those of `{called}`: `refine_vit` of `refiner_hf` made "
            "the model, and nothing was trained. The norms' statistics come from "
            f"{'pictures' if on_pictures else 'noise'}.",
            limits=f"The limits of `{called}` are the limits of this model. Its accuracy was not measured. The saved "
            f"model was loaded again and gave the logits of `{called}`.",
            base_model=None if is_folder else source,
            remote_code=remote_code,
        )
    )
