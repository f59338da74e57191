# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""The kinds of refinement, by the name that a configuration has for them."""

from .attention_refiner import RefinerMapRefinement
from .configuration_refiner import RefinerConfig
from .convolution_refiner import RefinerConvolution
from .expansion_refiner import RefinerExpansion, RefinerExpansionConvolution
from .relatives_refiner import RefinerFeatureConvolution, RefinerNoReduction, RefinerTalkingHeads


REFINEMENTS: dict[str, type[RefinerMapRefinement]] = {
    "expansion_convolution": RefinerExpansionConvolution,
    "convolution": RefinerConvolution,
    "expansion": RefinerExpansion,
    "no_reduction": RefinerNoReduction,
    "talking_heads": RefinerTalkingHeads,
    "feature_convolution": RefinerFeatureConvolution,
}


def make_refinement(config: RefinerConfig) -> RefinerMapRefinement:
    """The refinement of one layer, of the kind `config.refinement`. Arguments as [`RefinerMapRefinement`]'s."""
    return REFINEMENTS[config.refinement](config)
