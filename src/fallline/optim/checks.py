"""The domains of hyperparameters, checked where an optimizer is written down, with torch.optim's limits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Concatenate, ParamSpec

from fallline.errors import InvalidHyperparameter

P = ParamSpec("P")
Check = Callable[Concatenate[str, Any, P], None]
# How finely a schedule is looked at.
PROGRESS_POINTS = 1000


class WrongType(InvalidHyperparameter, TypeError):
    """A value of a type that the hyperparameter cannot take; like torch's, also a TypeError."""


def _along_schedules(check: Check[P]) -> Check[P]:
    """A schedule is in the domain when its values along training are."""

    @functools.wraps(check)
    def wrapper(name: str, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if not hasattr(value, "curve"):
            return check(name, value, *args, **kwargs)
        progress = [i / PROGRESS_POINTS for i in range(PROGRESS_POINTS + 1)]
        values = value(progress).tolist()
        for extreme in (min(values), max(values)):
            at = progress[values.index(extreme)]
            check(f"{name} at {at:.3g} of training", extreme, *args, **kwargs)
        return None

    return wrapper


@_along_schedules
def real(name: str, value: Any) -> None:
    """A finite real number.

    >>> real("lr", "fast")
    Traceback (most recent call last):
    fallline.optim.checks.WrongType: lr = 'fast' is not a number: give a finite one.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongType(f"{name} = {value!r} is not a number: give a finite one.")
    if not math.isfinite(value):
        raise InvalidHyperparameter(f"{name} = {value!r} is not finite: give a finite number.")


@_along_schedules
def non_negative(name: str, value: Any) -> None:
    """A number of at least 0."""
    real(name, value)
    if value < 0:
        raise InvalidHyperparameter(f"{name} = {value!r} is negative: give at least 0.")


@_along_schedules
def positive(name: str, value: Any) -> None:
    """A number above 0."""
    real(name, value)
    if value <= 0:
        raise InvalidHyperparameter(f"{name} = {value!r} is not above 0: give a positive number.")


@_along_schedules
def in_interval(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """A number between `low` and `high`, the ends included unless they are said to be open."""
    real(name, value)
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside:
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise InvalidHyperparameter(
            f"{name} = {value!r} is outside {left}{low:g}, {high:g}{right}: give a number inside."
        )


def pair_of_betas(value: Any) -> tuple[Any, Any]:
    """Two decay rates, each in [0, 1)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise WrongType(f"betas = {value!r} is not a pair: give (beta1, beta2).")
    for index, beta in enumerate(value):
        in_interval(f"beta{index + 1}", beta, 0.0, 1.0, open_high=True)
    return value[0], value[1]


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise WrongType(f"{name} = {value!r} is neither True nor False: give one of them.")


def whole(name: str, value: Any) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongType(f"{name} = {value!r} is not a whole number: give 1 or more.")
    if value < 1:
        raise InvalidHyperparameter(f"{name} = {value!r} is below 1: give a whole number of at least 1.")
