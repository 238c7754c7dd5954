"""Parameters side by side in one flat vector.

Most update rules work element by element, so they may see a model's parameters as one long vector: one call of the rule
instead of one per parameter. A leading dimension (the trial) is allowed everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fallline.optim.base import State

FLAT = "parameters"
# Every parameter begins at a multiple of so many numbers: at the border of a cache line, where products read fastest.
ALIGNED = 16


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in the flat vector: names and shapes in order. What lies between them is zero."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Layout:
        """The layout of one model's parameters, in their order."""
        return cls(tuple(params), tuple(p.shape for p in params.values()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each parameter begins, and where the next one would."""
        found = [0]
        for shape in self.shapes:
            found.append(-(-(found[-1] + math.prod(shape)) // ALIGNED) * ALIGNED)
        return tuple(found)

    @property
    def size(self) -> int:
        """How many numbers the flat vector of one model holds."""
        return self.offsets[-1]

    def flatten(self, params: Mapping[str, Tensor], leading: int = 0) -> Tensor:
        """A new tensor [..., size] of the parameters, which have `leading` leading dimensions."""
        first = params[self.names[0]]
        flat = first.new_zeros((*first.shape[:leading], self.size))
        for name, view in self.views(flat).items():  # one pass, whatever the strides
            view.copy_(params[name])
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters as views of a flat tensor [..., size]: writing to one writes to the other."""
        found = {}
        for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=False):
            part = flat[..., offset : offset + math.prod(shape)]
            found[name] = part.unflatten(-1, shape) if shape else flat[..., offset]
        return found

    def split(self, state: State) -> State:
        """The optimizer's state of a flat vector as the state of its parameters."""
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
        for slot, tensor in state["slots"][FLAT].items():
            parts = self.views(tensor) if tensor.shape[-1:] == (self.size,) else dict.fromkeys(self.names, tensor)
            for name, part in parts.items():
                slots[name][slot] = part.clone()
        return {"step": state["step"], "slots": slots}
