"""What is known about a loss besides its value: each family of losses tells it at the end of its file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Generator

from fallline.description import Invalid as Invalid  # where the families look for it
from fallline.losses.base import Loss


@dataclass(frozen=True)
class LossInfo:
    """A loss and what is known about it; contract tests run over all of these.

    Attributes:
        make: the function that makes it.
        example: draws (prediction, target) as a task would have them: float64, 12 samples or more in the first
            dimension of every tensor, nothing degenerate, nothing that a check could complain of.
        valid: arguments with which the contract tests run it; {} are the defaults.
        invalid: arguments that it must refuse.
        sweeps: each of its numbers with two values that differ in effect on the example.
        over_batch: whether a sample's value depends on the other samples of its batch.
        source: of the formula: the paper's authors, title, where it appeared.
    """

    make: Callable[..., Loss]
    example: Callable[[Generator], tuple[Any, Any]]
    valid: tuple[Mapping[str, Any], ...] = ({},)
    invalid: tuple[Invalid, ...] = ()
    sweeps: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    over_batch: bool = False
    source: str = ""

    def plain(self) -> Loss:
        """The loss as it is without any argument; of a combination of losses, with the first valid ones."""
        needed = any(each.default is each.empty for each in inspect.signature(self.make).parameters.values())
        return self.make(**(self.valid[0] if needed else {}))

    @property
    def name(self) -> str:
        """The name on the command line and in `fl.losses`."""
        return self.make.__name__
