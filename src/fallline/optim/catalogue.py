"""The list of optimizers: what `fallline optimizers` prints, what names resolve to, what contract tests run over."""

from __future__ import annotations

from typing import Any

import torch

from fallline.description import written_arguments
from fallline.dimensions import Dimension, log_grid
from fallline.errors import UnknownArgument, UnknownName, nearest
from fallline.optim import (
    adam_family,
    adam_variants,
    combinators,
    curvature,
    gradient_descent,
    layerwise,
    learning_rate_free,
    matrices,
    mean_square,
    partitions,
    preconditioners,
    schedule_free,
    signs,
    variance_reduced,
)
from fallline.optim.base import Optimizer
from fallline.optim.info import OptimizerInfo

FAMILIES = (
    gradient_descent,
    matrices,
    mean_square,
    adam_family,
    signs,
    schedule_free,
    learning_rate_free,
    adam_variants,
    layerwise,
    variance_reduced,
    curvature,
    preconditioners,
    combinators,
    partitions,
)
CATALOGUE: dict[str, OptimizerInfo] = {info.name: info for family in FAMILIES for info in family.CATALOGUE}


def get(name: str) -> OptimizerInfo:
    """What is known about the optimizer of that name.

    >>> get("adam").torch_name
    'Adam'
    """
    if name not in CATALOGUE:
        raise UnknownName(f"there is no optimizer {name!r}. {nearest(name, CATALOGUE)}")
    return CATALOGUE[name]


def learning_rate_grid(text: str, n: int = 13) -> Dimension:
    """The learning rates to search for an optimizer about which nothing is known yet.

    Args:
        text: the optimizer as `parse` takes it; one around another is searched like the other.

    >>> learning_rate_grid("lookahead(sgd:momentum=0.9)", 3)
    fl.grid([0.001, 0.1, 10.0])
    """
    name, inner, _ = _parts(text)
    if inner:
        return learning_rate_grid(inner, n)
    low, high = get(name).learning_rates
    return log_grid(low, high, n)


def state_of(optimizer: Optimizer) -> tuple[float, tuple[str, ...]]:
    """The state that an optimizer keeps for a matrix of 1024 × 1024: numbers per element, and the tensors' names.

    Single numbers (a count of steps) are left out.

    >>> from fallline.optim import adam
    >>> state_of(adam())
    (2.0, ('exp_avg', 'exp_avg_sq'))
    """
    matrix = torch.empty(1024, 1024, device="meta")
    slots = {name: t for name, t in optimizer.init({"matrix": matrix})["slots"]["matrix"].items() if t.numel() > 1}
    return sum(t.numel() for t in slots.values()) / matrix.numel(), tuple(slots)


def parse(text: str, **defaults: Any) -> Optimizer:
    """An optimizer as it is written on the command line: `adam`, `sgd:momentum=0.9,nesterov=True`, or with another one
    inside, `lookahead(sgd:momentum=0.9):k=10`.

    Args:
        text: a name, then after a colon `argument=value` pairs separated by commas.
        defaults: arguments for those that the text does not give; of the innermost optimizer.

    Raises:
        UnknownName: for a name that is not in the catalogue.
        UnknownArgument: for an argument that the optimizer does not take, one without a value, or one given twice.

    >>> parse("sgd:momentum=0.9", lr=0.1)
    fl.optim.sgd(lr=0.1, momentum=0.9)
    >>> parse("cautious(adamw)", lr=0.1)
    fl.optim.cautious(optimizer=fl.optim.adamw(lr=0.1))
    """
    name, inner, rest = _parts(text)
    info = get(name)
    given: dict[str, Any] = {}
    if info.wraps:
        if not inner:
            raise UnknownArgument(f"{name} goes around another optimizer: write {name}(adam), say.")
        given["optimizer"], defaults = parse(inner, **defaults), {}
    elif inner:
        raise UnknownArgument(f"{name} does not go around another optimizer: write {name}:argument=value.")
    given |= written_arguments(rest, name, text)
    return info.make(**{**defaults, **given})


def _parts(text: str) -> tuple[str, str, str]:
    """`name(inner):rest` as (name, inner, rest)."""
    head, _, rest = text.partition(":")
    if "(" not in head:
        return head.strip(), "", rest
    name, _, tail = text.partition("(")
    depth = 1
    for i, character in enumerate(tail):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            after = tail[i + 1 :].strip()
            if after and not after.startswith(":"):
                break
            return name.strip(), tail[:i].strip(), after.removeprefix(":")
    raise UnknownArgument(f"{text!r} is not name(optimizer):argument=value.")
