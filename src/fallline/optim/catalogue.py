"""The list of optimizers: what `fallline optimizers` prints, what names resolve to, what contract tests run over."""

from __future__ import annotations

import ast
from typing import Any

from fallline.errors import UnknownArgument, UnknownName, nearest
from fallline.optim import adam_family, gradient_descent, mean_square, signs
from fallline.optim.base import Optimizer
from fallline.optim.dimensions import Dimension, log_grid
from fallline.optim.info import OptimizerInfo

FAMILIES = (gradient_descent, mean_square, adam_family, signs)
CATALOGUE: dict[str, OptimizerInfo] = {info.name: info for family in FAMILIES for info in family.CATALOGUE}


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
