"""Search dimensions: a hyperparameter whose value is yet to be chosen.

Wherever an optimizer, a schedule or a loss takes a number it also takes one of these. A dimension is a plain
value; `sweeps.search` turns optimizers that hold dimensions into concrete configurations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fallline.errors import InvalidHyperparameter


@dataclass(frozen=True, eq=False)
class Dimension:
    """A hyperparameter to be searched: a list of `values`, or a range to draw from.

    Two dimensions are the same only if they are one object: the same one in two places takes the same value in both.

    `values` is None for a range; a range is [`low`, `high`], uniform in the value or (`log`) in its logarithm.
    """

    values: tuple[object, ...] | None
    low: float = math.nan
    high: float = math.nan
    log: bool = False

    @property
    def is_grid(self) -> bool:
        """Whether every value of the dimension is tried (a range is sampled instead)."""
        return self.values is not None

    @property
    def examples(self) -> tuple[object, ...]:
        """Values that stand for all: each value of a grid, both ends of a range."""
        return self.values if self.values is not None else (self.low, self.high)

    def at(self, fraction: float) -> float:
        """The value of a range at `fraction` in [0, 1] of its length (in its logarithm where it is one)."""
        if self.log:
            value = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + fraction * (self.high - self.low)
        return min(max(value, self.low), self.high)  # rounding may not lead out of the range

    def __bool__(self) -> bool:
        raise InvalidHyperparameter(
            "a search dimension has no truth value: it stands for several values, of which a sweep chooses one."
        )

    def __repr__(self) -> str:
        if self.values is not None:
            return f"fl.grid({list(self.values)!r})"
        return f"fl.{'log_uniform' if self.log else 'uniform'}({self.low!r}, {self.high!r})"


def grid(values: Sequence[object]) -> Dimension:
    """Every value of the list is tried.

    Raises:
        InvalidHyperparameter: for an empty list, a value that is there twice or a number that is not finite.

    >>> grid([0.0, 0.9]).values
    (0.0, 0.9)
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidHyperparameter(f"grid({values!r}) is not a list: give the values to be tried in one.")
    chosen = tuple(_hashable(v) for v in values)
    if not chosen:
        raise InvalidHyperparameter("grid([]) has no values: give at least one.")
    for value in chosen:
        if isinstance(value, Real) and not math.isfinite(value):
            raise InvalidHyperparameter(f"grid: {value!r} is not a finite number.")
    if len({(type(value) is bool, value) for value in chosen}) < len(chosen):
        raise InvalidHyperparameter(f"grid({list(chosen)!r}) holds the same value twice: leave one out.")
    return Dimension(chosen)


def _hashable(value: Any) -> object:
    """Lists as tuples, numbers of numpy and torch as Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(_hashable(item) for item in value) if isinstance(value, tuple | list) else value


def log_grid(low: float, high: float, n: int) -> Dimension:
    """`n` values from `low` to `high`, both included, at equal ratios.

    Raises:
        InvalidHyperparameter: unless 0 < low < high (or low = high and n = 1) and n is a whole number ≥ 1.

    >>> log_grid(0.001, 1.0, 4).values
    (0.001, 0.01, 0.1, 1.0)
    """
    _check_range("log_grid", low, high, positive=True)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidHyperparameter(f"log_grid: n = {n!r} is not a whole number of at least 1.")
    if n == 1:
        if low != high:
            raise InvalidHyperparameter(f"log_grid({low}, {high}, 1) has two ends but one value: give n ≥ 2.")
        return Dimension((float(low),))
    if low == high:
        raise InvalidHyperparameter(f"log_grid({low}, {high}, {n}) holds the same value {n} times: widen it.")
    start, stop = math.log10(low), math.log10(high)
    # Rounded to 12 digits so that a power of ten is written as one (0.01, not 0.010000000000000002).
    inner = (float(f"{10 ** (start + (stop - start) * i / (n - 1)):.12g}") for i in range(1, n - 1))
    return grid([float(low), *inner, float(high)])


def uniform(low: float, high: float) -> Dimension:
    """Values drawn uniformly from [low, high].

    >>> uniform(0.0, 0.5).at(0.5)
    0.25
    """
    _check_range("uniform", low, high, positive=False)
    return Dimension(None, float(low), float(high))


def log_uniform(low: float, high: float) -> Dimension:
    """Values drawn from [low, high], uniform in their logarithm.

    >>> round(log_uniform(0.01, 1.0).at(0.5), 12)
    0.1
    """
    _check_range("log_uniform", low, high, positive=True)
    return Dimension(None, float(low), float(high), log=True)


def _check_range(name: str, low: float, high: float, *, positive: bool) -> None:
    for bound in (low, high):
        if isinstance(bound, bool) or not isinstance(bound, Real) or not math.isfinite(bound):
            raise InvalidHyperparameter(f"{name}: {bound!r} is not a finite number.")
    if positive and low <= 0:
        raise InvalidHyperparameter(f"{name}: the low end {low!r} is not above 0, and a logarithm needs that.")
    if low > high:
        raise InvalidHyperparameter(f"{name}: the range {low!r} to {high!r} is inverted: give the low end first.")
