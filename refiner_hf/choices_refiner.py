# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""What fields and options can say, in a file that imports nothing, so that `--help` is there at once."""

ATTENTION_TYPES = ("plain", "refined", "shared_refined")

# Their classes are in refinements_refiner.py.
REFINEMENT_NAMES = [
    "expansion_convolution", "convolution", "expansion", "no_reduction", "talking_heads", "feature_convolution",
]  # fmt: skip

# The implementations of a refinement are in attention_refiner.py.
REFINE_IMPLEMENTATION_CHOICES = ("auto", "eager", "native", "blocked", "triton")

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
