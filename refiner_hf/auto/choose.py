"""
Which options a training gets, from what its images are like and how long it may take.

The numbers come from the study in docs/auto.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..choices_refiner import REGRESSION, SINGLE_LABEL
from ..configuration_refiner import RefinerConfig
from ..utils.text import counted
from .look import Facts
from .timing import Speed


Measure = Callable[[dict[str, Any]], Speed]  # options to how fast they are here

_SMALL = 40  # pixels: up to here images are taken as they are
_SIDE = 64  # pixels: larger images are made as small as this
_LAYERS = 2
_PATCHES = 6  # at least so many on a side
_MOST_EPOCHS = 300
_PLANNED = 0.9  # of the time; the rest is for what can't be foreseen
_FOR_EVALUATIONS = 0.1  # of the time
_FEWEST, _MOST_EVALUATIONS = 2, 10
_LOGGED = 50  # times
_WORTH = 1.1  # so many times as fast must bfloat16 be


@dataclass(frozen=True)
class Choice:
    """An option and its value, and why. With `of_network` it is a field of the network's configuration."""

    name: str
    value: Any
    reason: str
    of_network: bool = False


@dataclass
class Choices:
    """
    What has been chosen, in the order in which it is shown.

    Args:
        given (`dict[str, Any]`): options that the user has given, by name; `config_overrides` as a mapping. They win.
    """

    given: dict[str, Any]
    rows: list[Choice] = field(default_factory=list)

    @property
    def given_fields(self) -> dict[str, Any]:
        """The fields of the network's configuration that the user has given."""
        return self.given.get("config_overrides") or {}

    @property
    def learned(self) -> bool:
        """Whether the training begins with a network that has learned."""
        return self.given.get("model_name_or_path") is not None

    def add(self, name: str, value: Any, reason: str) -> None:
        """An option's value, unless it is given."""
        if name in self.given:
            value, reason = self.given[name], "given"
        self.rows.append(Choice(name, value, reason))

    def add_field(self, name: str, value: Any, reason: str) -> None:
        """A field of the network, unless it is given."""
        if name in self.given_fields:
            value, reason = self.given_fields[name], "given"
        self.rows.append(Choice(name, value, reason, of_network=True))

    @property
    def options(self) -> dict[str, Any]:
        """All options, the given ones among them."""
        chosen = {row.name: row.value for row in self.rows if not row.of_network}
        network = {row.name: row.value for row in self.rows if row.of_network} | self.given_fields
        return {**self.given, **chosen, **({"config_overrides": network} if network else {})}


def choose(
    facts: Facts,
    given: dict[str, Any],
    *,
    seconds: float,
    measure: Measure,
    has_bf16: bool,
    workers: int = 0,
    processes: int = 1,
) -> Choices:
    """
    Chooses the options of a training: of a new network, or of one that has learned if `given` names it.

    Args:
        facts ([`Facts`]): what the images are like.
        given (`dict[str, Any]`): options that the user has given, by name; `config_overrides` as a mapping.
        seconds (`float`): how long the training, with its evaluations, may take.
        measure: trains some steps with options, and says how long they take.
        has_bf16 (`bool`): whether this machine may compute in bfloat16.
        workers (`int`, *optional*, defaults to 0): how many processes can prepare images beside the training.
        processes (`int`, *optional*, defaults to 1): how many train together.

    Returns:
        [`Choices`], with a reason for each.

    Raises:
        `ValueError`: given options that don't fit each other, the images or the network.
    """
    choices = Choices(given)
    if not choices.learned and given.get("model_size") is None:
        _new_network(choices, facts)
    _augmentation(choices, facts)
    _optimisation(choices)
    if workers:
        choices.add("dataloader_num_workers", workers, "they prepare images while the network learns from others")
        choices.add("dataloader_persistent_workers", choices.options["dataloader_num_workers"] > 0, "")
    speed = None if given.get("max_steps") or given.get("num_train_epochs") else _fastest(choices, measure, has_bf16)
    _length(choices, facts, seconds, speed, processes)
    return choices


def _new_network(choices: Choices, facts: Facts) -> None:
    side, reason = _image_size(choices, facts)
    choices.add_field("image_size", side, reason)
    patch = _patch_size(side)
    choices.add_field("patch_size", patch, f"{side // patch} x {side // patch} patches")
    fields = choices.given_fields
    count = fields.get("num_hidden_layers") or len(fields.get("attention_types") or ()) or _LAYERS
    choices.add_field("num_hidden_layers", count, "trained for long in the time, where deeper ones would not be")
    layers = RefinerConfig(num_hidden_layers=count).attention_types
    choices.add_field("attention_types", layers, "as in the published networks: every second layer refines")
    choices.add_field("hidden_size", 96, "narrow, as there are few layers and little time")
    choices.add_field("num_attention_heads", 4, "24 numbers for each")
    choices.add_field("layerscale_value", 0.1, "for few layers")
    choices.add("crop_pct", 1.0, "what is evaluated is the whole image")


def _image_size(choices: Choices, facts: Facts) -> tuple[int, str]:
    """Side of the network's images in pixels, and why."""
    given = choices.given.get("image_size") or choices.given_fields.get("image_size")
    if given is not None:
        return (given if isinstance(given, int) else min(given)), "given"
    seen = f"the images have {facts.width} x {facts.height} pixels (median)"
    shorter = min(facts.height, facts.width)
    if shorter <= _SMALL:
        return max(16, 4 * round(shorter / 4)), seen
    return _SIDE, f"{seen}, and larger ones take longer"


def _patch_size(side: int) -> int:
    """The largest patch that leaves enough of them; even, for the convolutional stem."""
    fitting = [size for size in (16, 8, 4, 2) if side % size == 0]
    if not fitting:
        raise ValueError(
            f"Images of {side} pixels can't be cut into patches of an even size. Give an even --image_size."
        )
    return next((size for size in fitting if side // size >= _PATCHES), fitting[-1])


def _augmentation(choices: Choices, facts: Facts) -> None:
    if min(facts.height, facts.width) <= _SMALL:
        choices.add("crop_min_scale", 0.7, "of a small image, smaller crops often miss what the label means")
    else:
        choices.add("crop_min_scale", 0.4, "a part of a picture often shows what the label means")
    choices.add("rotation", 10.0, "what is turned a little keeps its label")
    choices.add("horizontal_flip", False, "true only where mirrored pictures mean the same: a mirrored letter doesn't")
    if choices.given.get("problem_type") != REGRESSION:
        choices.add("label_smoothing_factor", 0.1, "as in the paper")


def _optimisation(choices: Choices) -> None:
    if choices.learned:
        choices.add("learning_rate", 1e-4, "a network that has learned changes little")
    else:
        choices.add("timm_optim", "nmuon", "gets further than AdamW in the same time")
        choices.add("learning_rate", 0.005, "half and twice as much were equally good for small networks")
    choices.add("per_device_train_batch_size", 64, "enough images for the batch norms' statistics")
    choices.add("per_device_eval_batch_size", 128, "")
    choices.add("lr_scheduler_type", "cosine", "falls to 0 at the end of the time")
    choices.add("warmup_steps", 0.1, "a tenth of the steps")
    choices.add("weight_decay", 0.05, "as in the paper")
    if choices.given.get("problem_type", SINGLE_LABEL) == SINGLE_LABEL:
        choices.add("calibrate", True, "so that a score says how often it is right")


def _fastest(choices: Choices, measure: Measure, has_bf16: bool) -> Speed:
    """Adds in which precision is computed, and says how fast that is."""
    speed = measure(choices.options)
    if not has_bf16 or "bf16" in choices.given:
        return speed
    halved = measure({**choices.options, "bf16": True})
    times = speed.step / halved.step
    choices.add("bf16", times > _WORTH, f"a step is {times:.2g} times as fast with it on this machine")
    return halved if times > _WORTH else speed


def _length(choices: Choices, facts: Facts, seconds: float, speed: Speed | None, processes: int) -> None:
    options = choices.options
    images = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1) * processes
    an_epoch = math.ceil(facts.images / images)  # steps
    evaluations = _MOST_EVALUATIONS
    if speed is None:
        steps = options.get("max_steps") or round(options["num_train_epochs"] * an_epoch)
    else:
        once = speed.evaluated * (facts.evaluated + facts.for_statistics)
        evaluations = max(_FEWEST, min(evaluations, int(_FOR_EVALUATIONS * seconds / once)))
        fitting = max(1, int((_PLANNED * seconds - evaluations * once) / (an_epoch * speed.step)))
        epochs = min(fitting, _MOST_EPOCHS)
        more = ": more were never tried" if fitting > epochs else f": what fits into {_time(seconds)}"
        choices.add("num_train_epochs", epochs, f"{speed.step:.3g} s for a step{more}")
        steps = epochs * an_epoch
    each = max(1, round(steps / evaluations))
    choices.add("eval_strategy", "steps", "")
    choices.add("eval_steps", each, f"{counted(evaluations, 'evaluation')} in {counted(steps, 'step')}")
    choices.add("save_strategy", "steps", "")
    choices.add("save_steps", each, "to continue after an interruption")
    choices.add("save_total_limit", 1, "")
    choices.add("logging_steps", max(1, steps // _LOGGED), "")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
