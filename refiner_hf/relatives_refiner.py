# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""
Relatives of the paper's refinement, to compare it with: talking heads, convolution on features, and the paper's own
without attention reduction. They run only module by module (`"eager"`).

Shapes: B batch, H heads, E = H * expansion ratio, N tokens, D width of a head, k the side of the kernel.
"""

import torch
from torch import nn

from .attention_refiner import RefinerMapRefinement, WeightsPanel, batch_norm
from .configuration_refiner import RefinerConfig
from .expansion_refiner import RefinerExpansionConvolution


class RefinerNoReduction(RefinerExpansionConvolution):
    """
    The paper's refinement without attention reduction (an ablation of section 3): the expanded maps, with the map of
    their head added, weight the values. For this each head's values are divided among its expanded maps.
    """

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        return f"{super().describe(config)}, no reduction"

    def build_reduction(self, config: RefinerConfig, expanded: int) -> None:
        self.ratio = config.expansion_ratio
        self.reduction_norm = batch_norm(config, expanded)

    def refine(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, N, N) -> (B, E, N, N): those of the first head first."""
        expanded = self.reduction_norm(self.expanded_maps(attention_map, mask), mask)
        return expanded + attention_map.repeat_interleave(self.ratio, 1)

    def refine_values(self, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, N, D) -> (B, E, N, D / ratio)."""
        return value.unflatten(-1, (self.ratio, -1)).transpose(2, 3).flatten(1, 2)

    def reduction_panels(self) -> list[WeightsPanel]:
        return []

    @classmethod
    def refined_heads(cls, config: RefinerConfig) -> int:
        return config.num_attention_heads * config.expansion_ratio

    def why_not_fast(self, masked: bool) -> str | None:
        return RefinerMapRefinement.why_not_fast(self, masked)


class RefinerTalkingHeads(RefinerMapRefinement):
    """
    Talking heads (Shazeer et al., 2020, arXiv 2003.02436): a matrix mixes the heads' scores before the softmax, and
    another their maps after it. No norm.

    The scores that are mixed have a bias of positions in them where the model hands it over by itself. Where it comes
    together with the mask, as in BEiT, it is added after the mixing.
    """

    has_output_norm = False

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        return "talking heads"

    def build(self, config: RefinerConfig) -> None:
        heads = config.num_attention_heads
        # To head, from head.
        self.scores_mixing, self.maps_mixing = (nn.Parameter(torch.eye(heads)) for _ in range(2))

    def refine_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return _mix(self.scores_mixing, scores)

    def refine(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return _mix(self.maps_mixing, attention_map)

    def start_as_identity(self) -> None:
        nn.init.eye_(self.scores_mixing)
        nn.init.eye_(self.maps_mixing)

    def weights_panels(self) -> list[WeightsPanel]:
        mixing = {"scores": self.scores_mixing, "maps": self.maps_mixing}
        return [WeightsPanel(f"mixing of {name}", each, "from head", "to head") for name, each in mixing.items()]


class RefinerFeatureConvolution(RefinerMapRefinement):
    """
    Convolution on features in place of maps: depthwise over the values, each kernel over k neighbouring tokens, in the
    order of a map's columns. The map stays as it is. No norm.
    """

    has_output_norm = False

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        return f"convolution on features, kernel {config.refinement_kernel_size}"

    def build(self, config: RefinerConfig) -> None:
        self.kernels = nn.Parameter(torch.empty(config.hidden_size, 1, config.refinement_kernel_size))
        self.start_as_identity()

    def refine(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return attention_map

    def refine_values(self, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:  # a token is real if it may look at itself
            value = value.masked_fill(~mask.diagonal(dim1=-2, dim2=-1)[..., None], 0)
        channels = value.transpose(2, 3)  # (B, H, D, N)
        flat = channels.flatten(1, 2).to(self.kernels.dtype)
        convolved = nn.functional.conv1d(flat, self.kernels, padding=self.kernels.shape[-1] // 2, groups=flat.shape[1])
        return convolved.to(value.dtype).view(channels.shape).transpose(2, 3)

    def start_as_identity(self) -> None:
        nn.init.dirac_(self.kernels, groups=len(self.kernels))

    def weights_panels(self) -> list[WeightsPanel]:
        kernels = self.kernels[:, 0].unflatten(0, (self.config.num_attention_heads, -1))  # (H, D, k)
        return [WeightsPanel("kernels over tokens, mean of a head's", kernels.mean(1), "place in the kernel", "head")]


def _mix(matrix: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Maps or scores of all heads mixed; beside an adapter they may be in half precision, and the matrix not."""
    return nn.functional.conv2d(maps.to(matrix.dtype), matrix[:, :, None, None]).to(maps.dtype)
