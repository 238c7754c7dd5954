"""A step on a GPU as one CUDA graph: launched at once, where its kernels one by one would keep the CPU busy.

What a graph reads and writes stays where it was captured, so a step's inputs are copied to places of their own first.
Capturing runs nothing, and needs what it captures to have run before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class NotCaptured(RuntimeError):
    """A function could not be captured; nothing was computed."""


class Captured:
    """A function of tensors that is captured at its second call, and replayed from then on.

    Args:
        function: takes a list of tensors and returns one; whatever else it touches must stay where it is.

    Raises:
        NotCaptured: at the second call.
    """

    def __init__(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        self.function = function
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        if not self.inputs:
            self.inputs = [tensor.clone() for tensor in inputs]
            return self.function(self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.output = self.function(self.inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotCaptured(str(error)) from error
            self.graph = graph
        self.graph.replay()
        assert self.output is not None
        return self.output
