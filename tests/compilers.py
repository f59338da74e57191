"""What `torch.compile` makes of a model."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


class Graphs:
    """A backend for `torch.compile` that keeps what it was given, forward and backward."""

    def __init__(self):
        self.operations = []
        torch._dynamo.reset()

    def backend(self, graph, inputs):
        def keep(graph, inputs):
            self.operations.append(Counter(str(node.target) for node in graph.graph.nodes))
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def count(self, name: str) -> list[int]:
        return [operations[f"refiner_hf.{name}.default"] for operations in self.operations]
