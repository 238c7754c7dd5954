"""Parameters side by side in one flat vector.

Most update rules work element by element, so they may see a model's parameters as one long vector: one call of the rule
instead of one per parameter. A leading dimension (the trial) is allowed everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fallline.optim.base import State

FLAT = "parameters"


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat vector: names and shapes in order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Layout:
        """The layout of one model's parameters, in their order."""
        return cls(tuple(params), tuple(p.shape for p in params.values()))

    @property
    def size(self) -> int:
        """How many numbers the flat vector of one model holds."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, params: Mapping[str, Tensor], leading: int = 0) -> Tensor:
        """A new tensor [..., size] of the parameters, which have `leading` leading dimensions."""
        first = params[self.names[0]]
        flat = first.new_empty((*first.shape[:leading], self.size))
        for name, view in self.views(flat).items():  # one pass, whatever the strides
            view.copy_(params[name])
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as views of a flat tensor [..., size]: writing to one writes to the other."""
        found, offset = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            count = math.prod(shape)
            found[name] = flat[..., offset : offset + count].unflatten(-1, shape) if shape else flat[..., offset]
            offset += count
        return found

    def split(self, state: State) -> State:
        """The optimizer's state of a flat vector as the state of its parameters."""
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
        for slot, tensor in state["slots"][FLAT].items():
            parts = self.views(tensor) if tensor.shape[-1:] == (self.size,) else dict.fromkeys(self.names, tensor)
            for name, part in parts.items():
                slots[name][slot] = part.clone()
        return {"step": state["step"], "slots": slots}
