"""What the words of the command line mean: learning rates, optimizers with their arguments, run directories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fallline.errors import InvalidHyperparameter, InvalidSweep

if TYPE_CHECKING:
    from fallline.optim import Optimizer
    from fallline.tasks import Task


def learning_rates(text: str) -> Any:
    """A learning rate `0.01`, a list `0.01,0.1`, or `LOW:HIGH:N` learning rates at equal ratios.

    Raises:
        InvalidHyperparameter: for anything else, and for learning rates that are not above 0.

    >>> learning_rates("0.001:0.1:3")
    fl.grid([0.001, 0.01, 0.1])
    """
    from fallline.dimensions import grid, log_grid

    if ":" in text:
        parts = text.split(":")
        if len(parts) not in (2, 3):
            raise InvalidHyperparameter(f"--lr {text!r} is not LOW:HIGH:N: write for example 1e-4:1e-1:13.")
        low, high = (_rate(part, text) for part in parts[:2])
        count = _count(parts[2], text) if len(parts) == 3 else 13
        return log_grid(low, high, count)
    rates = [_rate(part, text) for part in text.split(",")]
    return grid(rates)


def one_learning_rate(text: str) -> float:
    """A single learning rate.

    >>> one_learning_rate("0.01")
    0.01
    """
    return _rate(text, text)


def optimizers(names: Sequence[str], lr: str | None) -> list[Optimizer] | None:
    """The optimizers of a sweep: each as `NAME` or `NAME:argument=value,…`, over the learning rates asked for.

    Without names, None (the default ones) or, where learning rates are given, the default ones over those.
    """
    from fallline.optim.catalogue import learning_rate_grid, parse

    rates = learning_rates(lr) if lr is not None else None
    if not names:
        if rates is None:
            return None
        return [parse(name, lr=rates) for name in ("sgd", "sgd:momentum=0.9", "rmsprop", "adam")]
    for text in names:
        refuse_two_learning_rates(text, lr)
    return [parse(text, lr=rates if rates is not None else learning_rate_grid(text)) for text in names]


def refuse_two_learning_rates(text: str, lr: str | None) -> None:
    """`--lr` beside an optimizer that is written with a learning rate of its own.

    Raises:
        InvalidHyperparameter: because one of the two would be ignored.
    """
    if lr is not None and re.search(r"[:,]\s*lr\s*=", text):
        raise InvalidHyperparameter(f"--lr {lr} and {text!r} both give the learning rate: leave one out.")


def run_directory(out: Path | None, task: Task) -> Path:
    """The directory asked for, or the first of `runs/NAME`, `runs/NAME-2`, … that is not there yet."""
    if out is not None:
        return out
    base = Path("runs") / task.name
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return path


def task_code(reference: str) -> str:
    """How a task named on the command line is written in Python."""
    from fallline.tasks import registry

    return f"fl.tasks.{reference}()" if reference in registry else f"fl.tasks.resolve({reference!r})"


def _rate(part: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        raise InvalidHyperparameter(f"--lr {text!r}: {part!r} is not a number.") from None
    if not 0 < value < float("inf"):
        raise InvalidHyperparameter(f"--lr {text!r}: a learning rate must be a finite number above 0, not {part}.")
    return value


def _count(part: str, text: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise InvalidSweep(f"--lr {text!r}: {part!r} is not a whole number of learning rates.") from None
