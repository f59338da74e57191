"""What is compared: the implementations of the refinement, the same network compiled, and its peers."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig

from ..attention_refiner import REFINE_IMPLEMENTATIONS
from ..configuration_refiner import RefinerConfig
from ..modeling_refiner import RefinerForImageClassification
from ..refinements_refiner import make_refinement
from ..utils.measure import Step
from .engines import ENGINES, engine_step, engines_here


NETWORKS = {
    "S": RefinerConfig.small,
    "M": RefinerConfig.medium,
    "L": RefinerConfig.large,
    "tiny": partial(RefinerConfig, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=10),
}
BASE = "eager"  # what every ratio is to
PLAIN = "plain attention"
COMPILED = {  # by `torch.compile`
    "compiled eager": "eager",
    "compiled auto": "auto",
    "compiled auto, prepacked": "auto",
}
PREPACKED = ("auto, prepacked", "compiled auto, prepacked")  # by `prepack_weights`
VITS = {"ViT eager": "eager", "ViT sdpa": "sdpa"}


@dataclass(frozen=True)
class Case:
    """
    One thing to measure, for every contender.

    `part` is "model" (a network), "op" (one refinement on its own) or "curves" (the same, to be plotted). `kind` is
    "inference" (a forward in evaluation), "forward" (one in training) or "training" (forward, backward and, for a
    network, the optimizer's step).
    """

    part: str
    network: str
    image_size: int
    kind: str
    batch_size: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.part} {self.network} {self.image_size} {self.kind}, batch {self.batch_size}"

    def config(self, **overrides) -> RefinerConfig:
        return NETWORKS[self.network](image_size=self.image_size, **overrides)

    @property
    def tokens(self) -> int:
        rows, columns = self.config().patch_grid
        return 1 + rows * columns


def contender_names(part: str, device: str, among: Collection[str] | None = None) -> list[str]:
    """
    Who takes part: what every ratio is to comes first, peers come last. With `among`, besides the base only those of
    them.
    """
    implementations = [name for name, each in REFINE_IMPLEMENTATIONS.items() if each.runs_on(device)]
    names = [*implementations, "auto"]
    if part == "model":
        others = [PREPACKED[0], *COMPILED, *engines_here(), PLAIN, *VITS]
        names += [name for name in others if device == "cpu" or name not in {*PREPACKED, *ENGINES}]
    return names if among is None else [name for name in names if name == BASE or name in among]


def takes_part(case: Case, contender: str) -> bool:
    """
    Whether a contender can do the case. Engines don't train, nor do all implementations. Of engines those that compute
    in less take part in a case in float32, too; in a case in bfloat16 only those that compute in it.
    """
    if contender in PREPACKED:
        return case.kind == "inference" and case.dtype == "float32"
    if contender not in ENGINES:
        implementation = REFINE_IMPLEMENTATIONS.get(contender)
        return case.kind == "inference" or implementation is None or implementation.trains
    return case.kind == "inference" and case.dtype in ("float32", ENGINES[contender].precision)


def make_network(case: Case, contender: str) -> nn.Module:
    """The contender's network, freshly initialised; nothing is compiled yet, and engines' is still torch's."""
    config = case.config()
    if contender in VITS:
        return AutoModelForImageClassification.from_config(vit_config(config), attn_implementation=VITS[contender])
    if contender == PLAIN:
        return RefinerForImageClassification(case.config(attention_types=["plain"] * config.num_hidden_layers))
    name = COMPILED.get(contender, contender)
    config.refine_implementation = name if name in REFINE_IMPLEMENTATIONS else "auto"
    return RefinerForImageClassification(config)


def vit_config(config: RefinerConfig) -> ViTConfig:
    """A ViT of the same width, depth, heads, MLP, patches and labels."""
    shared = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
        "num_channels", "num_labels", "qkv_bias",
        "image_height_width",  # not a ViT's own: `count_flops` asks for it
    )  # fmt: skip
    return ViTConfig(**{name: copy.copy(getattr(config, name)) for name in shared})


def make_step(case: Case, contender: str) -> Step:
    """What is timed: a call does one step of the case."""
    torch.manual_seed(0)
    return (_network_step if case.part == "model" else make_refinement_step)(case, contender)


def _network_step(case: Case, contender: str) -> Step:
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    config = case.config()
    pixels = torch.randn(case.batch_size, config.num_channels, *config.image_height_width, device=device)
    labels = torch.arange(case.batch_size, device=device) % config.num_labels
    model = make_network(case, contender).to(device).train(case.kind == "training")
    if contender in ENGINES:
        return engine_step(contender, model, pixels)
    if case.kind == "inference":
        model, pixels = model.to(dtype), pixels.to(dtype)
    if contender in PREPACKED:
        model.prepack_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if case.kind == "training" else None
    if contender in COMPILED:
        # What was compiled for earlier cases counts against the compiler's limit of variants.
        torch.compiler.reset()
        # On a GPU with CUDA graphs, which launch all of a step at once.
        model = torch.compile(model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)

    @torch.no_grad()
    def infer() -> None:
        model(pixel_values=pixels)

    def train() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train if case.kind == "training" else infer


def make_refinement_step(case: Case, contender: str, masked: bool = False) -> Step:
    """[`make_step`] of one refinement; `masked` with a mask that hides the last place."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    config, training = case.config(), case.kind != "inference"
    shape = (case.batch_size, config.num_attention_heads, case.tokens, case.tokens)
    attention_map = torch.randn(shape, device=device).softmax(-1).to(dtype).requires_grad_(training)
    gradient = torch.randn(shape, device=device).to(dtype) if case.kind == "training" else None
    config.refine_implementation = contender
    refinement = make_refinement(config).to(device).train(training)
    if not training:
        refinement = refinement.to(dtype)
    mask = None
    if masked:
        mask = torch.ones(case.batch_size, 1, case.tokens, case.tokens, dtype=torch.bool, device=device)
        mask[..., -1] = False

    def step() -> None:
        with (
            torch.set_grad_enabled(training),
            torch.autocast(device.type, dtype, enabled=training and dtype != torch.float32),
        ):
            refined = refinement(attention_map, mask=mask)
        if gradient is not None:
            refined.backward(gradient.to(refined.dtype))
            refinement.zero_grad()
            attention_map.grad = None

    return step
