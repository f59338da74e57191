"""The cards of models that were made of other models, without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..modeling_refiner import RefinerForImageClassification
from .architecture import describe_network
from .card import CardContent, make_card, task_of
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


def refined_card(name: str, source: str, model: PreTrainedModel, *, remote_code: bool) -> ModelCard:
    """
    The card of an encoder into which refinements were put.

    Args:
        name (`str`): of the model.
        source (`str`): folder or Hub name of the encoder.
        model (`PreTrainedModel`): the refined one.
        remote_code (`bool`): whether the folder has the model's code.
    """
    is_folder = Path(source).exists()
    called = Path(source).resolve().name if is_folder else source
    return make_card(
        CardContent(
            title=name,
            summary=f"`{called}` with refined attention maps: they pass a refinement that doesn't change them yet. In "
            f"evaluation the model answers as `{called}`; it is meant to be trained.",
            usage=usage_example(name, remote_code, task_of(model)),
            architecture=describe_network(model),
            training=f"All weights except the refinement's are those of `{called}`: `refine` of `refiner_hf` made the "
            "model, and nothing was trained. The norms' statistics come from some dozens of examples.",
            limits=f"The limits of `{called}` are the limits of this model. Its accuracy was not measured. The saved "
            f"model was loaded again and answered as `{called}`.",
            base_model=None if is_folder else source,
            remote_code=remote_code,
            task=task_of(model),
        )
    )
