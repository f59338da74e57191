"""Refinements away from their initial state, maps for them, and all that a call of one gives."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from refiner_hf import RefinerConfig, refinements_refiner
from refiner_hf.attention_refiner import RefinerMapRefinement, eager_refine


def make_refinement(heads: int = 4, ratio: int = 3, kernel: int = 3, **fields) -> RefinerMapRefinement:
    """A refinement in float32 and training; with every weight and statistic random, in the range that maps give."""
    torch.manual_seed(0)
    config = RefinerConfig(
        hidden_size=4 * heads, num_attention_heads=heads, expansion_ratio=ratio, refinement_kernel_size=kernel,
        refine_implementation="eager", **fields,
    )  # fmt: skip
    refinement = refinements_refiner.make_refinement(config)
    for name, norm in refinement.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            # The maps that the first norm sees are small and alike.
            size = 0.03 if name == "expansion_norm" else 1
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
            nn.init.normal_(norm.running_mean, std=0.1 * size)
            nn.init.uniform_(norm.running_var, 0.5 * size**2, 2 * size**2)
    return refinement


def make_maps(images: int = 3, heads: int = 4, tokens: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Attention maps (images, heads, tokens, tokens)."""
    torch.manual_seed(1)
    return (2 * torch.randn(images, heads, tokens, tokens)).softmax(-1).to(dtype)


def step(
    refine: Callable, refinement: RefinerMapRefinement, maps: torch.Tensor, scale: float = 0.7
) -> dict[str, torch.Tensor]:
    """The output of a call, the gradients of the maps and of every parameter, and the buffers after it."""
    refinement, maps = copy.deepcopy(refinement), maps.clone().requires_grad_()
    output = refine(refinement, maps, scale)
    torch.manual_seed(2)
    output.backward(torch.randn(output.shape).to(output))
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in refinement.named_parameters()}
    return {
        "output": output.detach(),
        "gradient of the maps": maps.grad,
        **gradients,
        **dict(refinement.named_buffers()),
    }


def exact_step(refinement: RefinerMapRefinement, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """[`step`] module by module in float64."""
    return step(eager_refine, copy.deepcopy(refinement).double(), maps.double())


def differences(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, relative to the exact one's largest value."""
    assert ours.keys() == exact.keys()
    assert all(ours[name].shape == exact[name].shape for name in exact)
    return {
        name: ((ours[name].double() - exact[name]).abs().max() / (exact[name].abs().max() + 1e-30)).item()
        for name in exact
        # What a norm takes out of its input has a gradient of 0, of which only rounding is left.
        if exact[name].double().abs().max() > 1e-3
    }


def assert_exact(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Outputs and buffers within 1e-5 of the tensor's largest value, gradients within 1e-4."""
    for name, difference in differences(ours, exact).items():
        assert difference <= (1e-4 if "gradient" in name else 1e-5), f"{name}: off by {difference}"


def assert_exact_but_for_kinks(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """
    [`assert_exact`] for large maps. Among millions of activations one or the other lies so near a kink of relu6 that
    rounding decides on which side. That puts the maps' gradient off at a few places around it, and sums a little.
    """
    differing = differences(ours, exact)
    for name in differing:
        difference, size = (ours[name].double() - exact[name]).abs(), exact[name].abs().max()
        if name == "gradient of the maps":
            assert (difference > 1e-4 * size).double().mean() <= 1e-3, name
        if "gradient" in name:
            assert difference.norm() <= 1e-2 * exact[name].norm(), name
        else:
            assert differing[name] <= 1e-5, f"{name}: off by {differing[name]}"


def assert_no_further(
    ours: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """No tensor is further from the exact one than eager's, all its values taken together."""

    def distance(result: dict[str, torch.Tensor], name: str) -> float:
        return ((result[name].double() - exact[name]).norm() / exact[name].double().norm()).item()

    # The last rounding, which both do, is the same for neither: a tenth of a unit is for luck.
    slack = 0.1 * torch.finfo(ours["output"].dtype).eps
    distances = {name: (distance(ours, name), distance(eager, name)) for name in differences(ours, exact)}
    further = {name: pair for name, pair in distances.items() if pair[0] > 1.05 * pair[1] + slack}
    assert not further, further
