"""
What a case costs on paper: floating-point operations, and bytes that have to go through memory.

Operations are those of matrix products and convolutions, 2 per multiply-add; a step with backward counts as three
forwards (each product has two gradients of its own cost). What an implementation recomputes isn't counted: nobody
needs it.

Bytes are a lower bound: what every implementation that keeps its tensors in memory must read and write. Notation as in
`attention_refiner.py`; b bytes an element, M = B * N * N.
"""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..attention_refiner import eager_refine
from ..configuration_refiner import RefinerConfig
from ..refinements_refiner import make_refinement
from ..utils.flops import count_flops
from .contenders import BASE, PLAIN, VITS, Case, make_network
from .engines import ENGINES


def costs(case: Case, contender: str) -> dict[str, float]:
    """
    `flops` and `bytes` of one step, and for the refinement module by module also `bytes_moved`, what it really reads
    and writes.
    """
    # Weights and optimizer stay in float32 in training; what passes between layers is counted as `dtype` throughout.
    size = getattr(torch, case.dtype).itemsize
    forwards = 3 if case.kind == "training" else 1
    if case.part == "model":
        flops, weights, elements = _network_costs(case.network, case.image_size, _architecture(contender))
        of_weights, size = _sizes(contender, size)
        moved = of_weights * weights + size * case.batch_size * elements
        # Backward reads or writes at least a gradient for each tensor, and reads the weights again.
        return {"flops": forwards * case.batch_size * flops, "bytes": moved * (2 if case.kind == "training" else 1)}

    config, positions = case.config(), case.batch_size * case.tokens**2
    row = {
        "flops": forwards * refinement_flops(config, positions),
        "bytes": size * positions * least_channels(config, case.kind),
    }
    if contender == BASE:
        row["bytes_moved"] = size * positions * eager_channels(config, case.kind)
    return row


def refinement_flops(config: RefinerConfig, positions: int) -> int:
    """A forward of the refinement over so many places of a map, whatever its kind; 2 M (H E + k² E + E H) for ours."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        eager_refine(make_refinement(config).eval(), torch.empty(1, config.num_attention_heads, 1, 1))
    return positions * counter.get_total_flops()


def least_channels(config: RefinerConfig, kind: str) -> int:
    """
    Maps that any refinement reads or writes, by the channel: forward reads A and writes the result, 2 H. With
    backward 5 H: A is read again (no cache holds it so long), the result's gradient read, A's gradient written.
    """
    return (5 if kind == "training" else 2) * config.num_attention_heads


def eager_channels(config: RefinerConfig, kind: str) -> int:
    """
    The same for the paper's refinement (`"expansion_convolution"`) module by module, where each module reads its input
    and writes its output.

    - In evaluation: expansion H + E; norm 2 E; relu6 2 E; local attention 2 E; norm 2 E; relu6 2 E; reduction E + H;
      norm 2 H; sum 3 H; output norm 2 H: 12 E + 9 H.
    - In training each norm reads its input once more, for the statistics: 14 E + 11 H.
    - Backward: a norm reads input and gradient twice and writes a gradient (5), relu6 takes 3, a convolution reads
      input and gradient for its weight, and the gradient again to write its input's; A's two gradients are added
      (3 H): 24 E + 17 H.
    """
    heads = config.num_attention_heads
    expanded = heads * config.expansion_ratio
    evaluation, training = 12 * expanded + 9 * heads, 14 * expanded + 11 * heads
    return {
        "inference": evaluation,
        "forward": training,
        "training": training + 24 * expanded + 17 * heads,
    }[kind]


def _sizes(contender: str, size: int) -> tuple[int, int]:
    """Bytes of a weight, and of what passes between layers, which is `size` but in engines that compute in less."""
    if contender not in ENGINES:
        return size, size
    _, precision, int8 = ENGINES[contender]
    size = getattr(torch, precision).itemsize
    return (1 if int8 else size), size


def _architecture(contender: str) -> str:
    """The contender whose numbers on paper are the same."""
    return next(iter(VITS)) if contender in VITS else PLAIN if contender == PLAIN else BASE


@lru_cache
def _network_costs(network: str, image_size: int, contender: str) -> tuple[int, int, int]:
    """
    For a forward: operations for an image, number of weights, and elements of an image's tensors that pass through
    memory: each of a layer's two branches reads and writes the tokens, 4 N D a layer; a map (H N N) is written and
    read to weight the values, read and written once more where it is refined, and read once more where it is added
    to the next one. A ViT's maps needn't be in memory at all.
    """
    case = Case("model", network, image_size, "inference", 1, "float32", "meta")
    with torch.device("meta"):
        model = make_network(case, contender)
    config = case.config()
    passes = 0
    if contender not in VITS:
        for layer in model.base_model.layers:
            attention = layer.attention
            # A shared map was written by the layer before; its refined form is written and read here.
            passes += {"plain": 2, "refined": 4, "shared_refined": 3}[attention.attention_type]
        if config.accumulate_attention:
            passes += sum(layer.attention.attention_type != "shared_refined" for layer in model.base_model.layers) - 1
    elements = config.num_hidden_layers * 4 * case.tokens * config.hidden_size
    elements += passes * config.num_attention_heads * case.tokens**2
    return count_flops(model), sum(p.numel() for p in model.parameters()), elements
