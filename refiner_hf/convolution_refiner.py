# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""One convolution in place of expansion, distributed local attention and reduction."""

import torch
from torch import nn

from .attention_refiner import RefinerMapRefinement, WeightsPanel
from .configuration_refiner import RefinerConfig


class RefinerConvolution(RefinerMapRefinement):
    """One full k x k convolution over the maps, from all heads to all heads. No norm; the map isn't added."""

    @classmethod
    def describe(cls, config: RefinerConfig) -> str:
        kernel = config.refinement_kernel_size
        return f"convolution, kernel {kernel} x {kernel}"

    def build(self, config: RefinerConfig) -> None:
        heads, kernel = config.num_attention_heads, config.refinement_kernel_size
        self.convolution = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, bias=False)

    def refine(self, attention_map: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.convolution(attention_map)

    def start_as_identity(self) -> None:
        nn.init.dirac_(self.convolution.weight)

    def weights_panels(self) -> list[WeightsPanel]:
        return [WeightsPanel("kernels", self.convolution.weight, "from head", "to head")]

    masked_pieces_pay_from = 10 * 2**20

    def why_not_fast(self, masked: bool) -> str | None:
        return None if masked else "without padding, one full convolution has nothing to leave out or to fold"
