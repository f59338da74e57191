"""The lines of Python in a card that load the model. They name its repository, which is known when it is published."""

import re
from typing import Any

from huggingface_hub import ModelCard


CLASSIFICATION = "image-classification"
CODE_TAG = "custom_code"
# HTML comments, which aren't shown, around the example.
_BEGIN, _END = "<!-- usage: {task} -->", "<!-- end of usage -->"
_MARKED = re.compile(_BEGIN.format(task=r"(?P<task>[\w-]+)") + ".*?" + _END, re.DOTALL)


def usage_example(
    name: str,
    remote_code: bool,
    task: str = CLASSIFICATION,
    revision: str | None = None,
    adapts: str | None = None,
) -> str:
    """
    A block of Python that gives an image or a text to a model in a pipeline, between markers that [`for_repository`]
    finds.

    Args:
        name (`str`): folder or Hub name.
        remote_code (`bool`): whether the model loads with code of its own, and not with this package.
        task (`str`, *optional*): of the pipeline.
        revision (`str`, *optional*): branch or tag on the Hub.
        adapts (`str`, *optional*): the base model of a PEFT adapter for image classification.
    """
    if adapts:
        return _ADAPTER.format(name=name, adapts=adapts, revision=f', revision="{revision}"' if revision else "")
    options = f', revision="{revision}"' if revision else ""
    options += ", trust_remote_code=True" if remote_code else ""
    function = "classify" if task.endswith("classification") else "features"
    if task.startswith("image"):
        arguments = '"photo.jpg", top_k=5' if task == CLASSIFICATION else '"photo.jpg", pool=True'
    else:
        arguments = '"A sentence."'
    lines = [
        _BEGIN.format(task=task),
        "```python",
        *([] if remote_code else ["import refiner_hf  # registers the model"]),
        "from transformers import pipeline",
        "",
        f'{function} = pipeline("{task}", model="{name}"{options})',
        f"print({function}({arguments}))",
        "```",
        _END,
    ]
    return "\n".join(lines)


_ADAPTER = """```python
import refiner_hf  # registers the adapter
from peft import PeftModel
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

config = AutoConfig.from_pretrained("{name}"{revision})
base = AutoModelForImageClassification.from_pretrained("{adapts}", config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "{name}"{revision}).merge_and_unload()
processor = AutoImageProcessor.from_pretrained("{name}"{revision})
classify = pipeline("image-classification", model=model, image_processor=processor)
print(classify("photo.jpg", top_k=5))
```"""


def for_repository(card: ModelCard, repo_id: str, remote_code: bool, revision: str | None = None) -> ModelCard:
    """
    The same card with its [`usage_example`] for a repository. Everything else stays, and so does a card without one.
    """
    card = ModelCard(str(card))
    data: Any = card.data  # its fields are those that the card has
    card.text = _MARKED.sub(lambda found: usage_example(repo_id, remote_code, found["task"], revision), card.text)
    tags = [tag for tag in data.tags or [] if tag != CODE_TAG] + [CODE_TAG] * remote_code
    data.tags = tags or None
    return card
