"""The list of optimizers: what `fallline optimizers` prints, what names resolve to, what contract tests run over."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fallline.errors import UnknownArgument, UnknownName, nearest
from fallline.optim import optimizers
from fallline.optim.base import Optimizer
from fallline.optim.dimensions import Dimension, log_grid


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer and what is known about it.

    Attributes:
        make: the function that makes it.
        learning_rates: the range of learning rates that is worth searching when nothing is known of the model.
        formula: its update in one line.
        torch_name: its class in torch.optim, or "" where torch has none.
        paper: where it comes from.
    """

    make: Callable[..., Optimizer]
    learning_rates: tuple[float, float]
    formula: str
    torch_name: str
    paper: str

    @property
    def name(self) -> str:
        """The name on the command line and in `fl.optim`."""
        return self.make.__name__


CATALOGUE: dict[str, OptimizerInfo] = {
    info.name: info
    for info in (
        OptimizerInfo(
            optimizers.sgd,
            (1e-3, 10.0),
            "p − lr·b, b = momentum·b + g",
            "SGD",
            "Robbins & Monro 1951; Polyak 1964",
        ),
        OptimizerInfo(optimizers.adam, (1e-5, 1e-1), "p − lr·m̂/(√v̂ + eps)", "Adam", "Kingma & Ba 2015"),
        OptimizerInfo(
            optimizers.adamw,
            (1e-5, 1e-1),
            "p − lr·(m̂/(√v̂ + eps) + wd·p)",
            "AdamW",
            "Loshchilov & Hutter 2019",
        ),
        OptimizerInfo(optimizers.rmsprop, (1e-5, 1e-1), "p − lr·g/(√v + eps)", "RMSprop", "Tieleman & Hinton 2012"),
        OptimizerInfo(optimizers.lion, (1e-6, 1e-2), "p − lr·(sign(β₁m + (1−β₁)g) + wd·p)", "", "Chen et al. 2023"),
    )
}


def get(name: str) -> OptimizerInfo:
    """What is known about the optimizer of that name.

    >>> get("adam").torch_name
    'Adam'
    """
    if name not in CATALOGUE:
        raise UnknownName(f"there is no optimizer {name!r}. {nearest(name, CATALOGUE)}")
    return CATALOGUE[name]


def learning_rate_grid(name: str, n: int = 13) -> Dimension:
    """The learning rates to search for an optimizer about which nothing is known yet."""
    low, high = get(name).learning_rates
    return log_grid(low, high, n)


def parse(text: str, **defaults: Any) -> Optimizer:
    """An optimizer as it is written on the command line: `adam`, or `sgd:momentum=0.9,nesterov=True`.

    Args:
        text: a name, then after a colon `argument=value` pairs separated by commas.
        defaults: arguments for those that the text does not give.

    Raises:
        UnknownName: for a name that is not in the catalogue.
        UnknownArgument: for an argument that the optimizer does not take, one without a value, or one given twice.

    >>> parse("sgd:momentum=0.9", lr=0.1)
    fl.optim.sgd(lr=0.1, momentum=0.9)
    """
    name, _, rest = text.partition(":")
    info = get(name.strip())
    given: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise UnknownArgument(f"{part!r} in {text!r} has no value: write {name}:argument=value,argument=value.")
        key, value = key.strip(), value.strip()
        if key in given:
            raise UnknownArgument(f"{key!r} is given twice in {text!r}: leave one out.")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError):
            given[key] = value
    return info.make(**{**defaults, **given})


def _split(text: str) -> list[str]:
    """The text at its commas, but not at those inside parentheses: `betas=(0.9,0.99),eps=1e-6`."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
