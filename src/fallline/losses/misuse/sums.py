"""Whether the numbers of a tensor are probabilities: what they sum to, along which axis, and how sure that is.

Neighbours: `predictions` and `targets`, whose rules ask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fallline.losses.misuse.given import extremes, thinned


@dataclass(frozen=True)
class Sums:
    """What the sums along an axis say.

    Attributes:
        rows: how many sums were looked at.
        off: how far the worst of them is from 1 (their logarithm, for log-probabilities, from 0).
        low, high: the extremes of the tensor.
        sure: how many powers of ten lie between this and chance; 0 where the sums are not 1 within rounding.
        uniform: whether all rows are the same and constant, as after a layer of zeros.
        certain: whether all values are 0 or 1.
    """

    rows: int
    off: float
    low: float
    high: float
    sure: float
    uniform: bool
    certain: bool

    def __bool__(self) -> bool:
        return self.sure >= 4.5

    @property
    def seen(self) -> str:
        """In words, the end of a sentence that begins with the rows."""
        return f"sum to 1 (within {max(self.off, 1e-9):.0e}) and lie in [{self.low:.3g}, {self.high:.3g}]"


def rounding(dtype: torch.dtype) -> float:
    """How far the sum of a softmax may be from 1."""
    return max(1e-5, 4 * torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-5


def probabilities(tensor: Tensor, axis: int | tuple[int, ...], bounds: tuple[float, float] | None = None) -> Sums:
    """Whether the values along an axis are probabilities: none is negative and each row sums to 1.

    >>> found = probabilities(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).softmax(1), 1)
    >>> bool(found), found.rows
    (True, 64)
    >>> bool(probabilities(torch.tensor([[0.5, 0.25, 0.4]]), 1))
    False
    """
    low, high = bounds or extremes(tensor)
    if not (low >= 0 and high <= 1 + rounding(tensor.dtype)) or tensor.numel() == 0:
        return Sums(0, math.inf, low, high, 0.0, False, False)
    part = _part(tensor, axis)
    sums = part.sum(axis)
    return _judged(part, axis, (sums - 1).abs(), rounding(tensor.dtype), low, high)


def log_probabilities(tensor: Tensor, axis: int | tuple[int, ...], bounds: tuple[float, float] | None = None) -> Sums:
    """Whether the values along an axis are log-probabilities: none is positive and their exponentials sum to 1."""
    low, high = bounds or extremes(tensor)
    tolerance = max(1e-4, 4 * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 1e-4
    if not high <= tolerance or tensor.numel() == 0:
        return Sums(0, math.inf, low, high, 0.0, False, False)
    part = _part(tensor, axis)
    return _judged(part, axis, part.logsumexp(axis).abs(), tolerance, low, high)


def _part(tensor: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    """A sample of the rows, in a type whose sums are exact enough."""
    over = {each % tensor.ndim for each in ((axis,) if isinstance(axis, int) else axis)}
    part = tensor if 0 in over else thinned(tensor)
    return part if part.dtype in (torch.float32, torch.float64) else part.float()


def _judged(part: Tensor, axis: int | tuple[int, ...], off: Tensor, tolerance: float, low: float, high: float) -> Sums:
    rows = off.numel()
    worst = float(off.max())
    uniform = high - low <= tolerance
    certain = low >= 0 and bool(((part == 0) | (part == 1)).all())
    sure = 0.0
    if math.isfinite(worst):
        # A row of chance numbers sums to 1 within the tolerance with about that probability. Rows that are all the
        # same count as one.
        distinct = rows if rows > 1 and _differ(part, axis) else 1
        if worst <= tolerance:
            sure = -math.log10(tolerance) * min(distinct, 1000)
        elif worst <= 2e-2 and distinct >= 8:  # rounded to half precision on the way, or an ε was added
            sure = -math.log10(2e-2) * min(distinct, 1000)
    return Sums(rows, worst, low, high, sure, uniform, certain)


def _differ(part: Tensor, axis: int | tuple[int, ...]) -> bool:
    """Whether the rows along the axis are not all the same."""
    over = {each % part.ndim for each in ((axis,) if isinstance(axis, int) else axis)}
    first = part
    for dimension in range(part.ndim):
        if dimension not in over:
            first = first.narrow(dimension, 0, 1)
    return bool((part != first).any())


def sigmoid_odds(tensor: Tensor) -> float:
    """The probability, as a power of ten, that real numbers with this mean and spread all lie in [0, 1].

    Near 0 it says nothing; at −4, numbers like these are not logits: they have a wall at 0 and at 1.
    """
    part = thinned(tensor).double()
    mean, spread = float(part.mean()), float(part.std(correction=0))
    if spread == 0 or not math.isfinite(spread):
        return 0.0
    inside = 0.5 * (math.erf((1 - mean) / spread / math.sqrt(2)) + math.erf(mean / spread / math.sqrt(2)))
    return part.numel() * math.log10(max(inside, 1e-12))
