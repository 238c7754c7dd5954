"""What is known about an optimizer besides its rule: each family of optimizers tells it at the end of its file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fallline.description import Invalid as Invalid  # where the families look for it
from fallline.optim.base import Optimizer


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer and what is known about it.

    Attributes:
        make: the function that makes it.
        learning_rates: the range of learning rates that is worth searching when nothing is known of the model.
        formula: its update in one line.
        paper: who it comes from.
        year: of the paper.
        torch_name: its class in torch.optim, or "" where torch has none.
        valid: arguments with which the contract tests run it; {} are the defaults.
        invalid: arguments that it must refuse.
        settles: arguments with which it reaches the bottom of a badly scaled quadratic and of Rosenbrock's valley.
        matrices_only: whether it refuses parameters that are no matrices.
        decays: the numbers that, above 0, move parameters even where gradients are 0.
    """

    make: Callable[..., Optimizer]
    learning_rates: tuple[float, float]
    formula: str
    paper: str
    year: int
    torch_name: str = ""
    valid: tuple[Mapping[str, Any], ...] = ({},)
    invalid: tuple[Invalid, ...] = ()
    settles: Mapping[str, Any] = field(default_factory=dict)
    matrices_only: bool = False
    decays: tuple[str, ...] = ("weight_decay",)

    @property
    def name(self) -> str:
        """The name on the command line and in `fl.optim`."""
        return self.make.__name__

    @property
    def wraps(self) -> bool:
        """Whether it goes around another optimizer: `lookahead(adam)`."""
        return "optimizer" in inspect.signature(self.make).parameters
