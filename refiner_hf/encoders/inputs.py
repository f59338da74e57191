"""What a model takes as inputs, from what a user has: batches, or a data set with its processor or tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.errors import explain_errors
from ..utils.model_inputs import Inputs


_EXAMPLES, _BATCH = 128, 8
_PLACES = 2**21  # of all maps together: of longer texts fewer are enough


def batches_of(
    model: PreTrainedModel,
    inputs: Inputs | Iterable[Inputs] | Sequence[Mapping[str, Any]],
    processing_class: Any = None,
) -> list[dict[str, Any]]:
    """
    Batches of a model's inputs, without labels.

    Args:
        model: takes them.
        inputs: a batch, several, or with `processing_class` a data set: rows with a picture, or with one text or two,
            of which some dozens are taken, spread over all of them.
        processing_class (*optional*): the image processor or tokenizer.

    Raises:
        `ValueError`: there is nothing, or rows hold neither pictures nor texts.
    """
    if processing_class is not None:
        batches = list(_prepared(model, inputs, processing_class))
    else:
        batches = [dict(batch) for batch in ([inputs] if isinstance(inputs, Mapping) else inputs)]
    if not batches:
        raise ValueError("There are no inputs to take the norms' statistics from.")
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def _prepared(model: PreTrainedModel, rows: Any, processing_class: Any) -> Iterable[dict[str, Any]]:
    if isinstance(rows, Mapping) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            "With a processing_class, inputs are a data set whose rows can be counted and picked, such as a split of "
            f"the library datasets; got a {type(rows).__name__}."
        )
    count = min(len(rows), _EXAMPLES)
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    batches, places = -(-count // _BATCH), 0
    for number in range(batches):  # each is spread over all rows, which may be sorted
        batch = dict(_prepare(model, chosen[number::batches], processing_class))
        yield batch
        places += batch["input_ids"].shape[1] * batch["input_ids"].numel() if "input_ids" in batch else 0
        if places >= _PLACES:
            break


def _prepare(model: PreTrainedModel, rows: list[Mapping[str, Any]], processing_class: Any) -> Mapping[str, Any]:
    if isinstance(processing_class, PreTrainedTokenizerBase):
        columns = [name for name, value in rows[0].items() if isinstance(value, str)]
        if not 1 <= len(columns) <= 2:
            raise ValueError(
                f"The rows have {len(columns)} columns of texts ({', '.join(columns) or 'none'}), not one or a pair: "
                "choose with select_columns."
            )
        texts = [[row[name] for row in rows] for name in columns]
        longest = longest_text(model, processing_class)
        with explain_errors("The tokenizer can't prepare the texts"):
            return processing_class(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    columns = [name for name, value in rows[0].items() if isinstance(value, Image.Image)]
    if len(columns) != 1:
        raise ValueError(
            f"The rows have {len(columns)} columns of pictures ({', '.join(columns) or 'none'}), not one: choose with "
            "select_columns."
        )
    with explain_errors("The image processor can't prepare the pictures"):
        return processing_class([row[columns[0]].convert("RGB") for row in rows], return_tensors="pt")


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a text may have. (A tokenizer that doesn't know says some number that is too large.)"""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    kind = getattr(config, "base_model_type", config.model_type)  # the former where it is refined
    if kind in ("roberta", "xlm-roberta", "camembert"):  # they count from behind their padding's number
        positions -= config.pad_token_id + 1
    return min(tokenizer.model_max_length, positions)
