"""Special functions that keep their digits, and finite gradients, where the plain spelling loses them.

What they have in common: branches are chosen by `torch.where`, and each branch is only ever given arguments at which it
and its derivatives are finite, so that no NaN of the branch not taken reaches a gradient. The likelihoods use them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fallline.losses.base import Number

# From here on Stirling's series, as far as `_rest` takes it, is exact in float64.
_STIRLING = math.log(16.0)


def at_least(value: Tensor, floor: Number) -> Tensor:
    """max(value, floor) with the gradient 1 everywhere, so that what lies below the floor can come back."""
    bounded = torch.maximum(value, floor) if isinstance(floor, Tensor) else value.clamp(min=floor)
    return bounded.detach() + (value - value.detach())


def log_of(number: Number) -> Number:
    """The logarithm of a number ≥ 0, −∞ for 0."""
    if isinstance(number, Tensor):
        return number.log()
    return math.log(number) if number > 0 else -math.inf


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), as exact as the type can hold: torch's is x itself from 20 on, here from 50 on.

    >>> softplus(torch.tensor([-1e4, 0.0, 1e4]))
    tensor([0.0000e+00, 6.9315e-01, 1.0000e+04])
    """
    return functional.softplus(x, threshold=50)


def log_softplus(x: Tensor) -> Tensor:
    """log log(1 + exp x), which is about x where exp x is nothing.

    >>> log_softplus(torch.tensor([-1e4, 0.0, 1e4]))
    tensor([-1.0000e+04, -3.6651e-01,  9.2103e+00])
    """
    low = x < -10
    u = torch.where(low, x, -10).exp()
    series = x - u * (1 / 2 - u * (5 / 24 - u * (1 / 8 - u * (251 / 2880))))
    return torch.where(low, series, softplus(torch.where(low, 0, x)).log())


def log1p_ratio(w: Tensor) -> Tensor:
    """log(1 + w)/w for w ≥ 0, which is 1 at 0.

    >>> log1p_ratio(torch.tensor([0.0, 1e-6, 1.0]))
    tensor([1.0000, 1.0000, 0.6931])
    """
    small = w < 1e-4
    low, high = torch.where(small, w, 0), torch.where(small, 1, w)
    return torch.where(small, 1 - low * (1 / 2 - low * (1 / 3 - low * (1 / 4 - low / 5))), high.log1p() / high)


def expm1_ratio(x: Tensor, k: Number) -> Tensor:
    """(exp(kx) − 1)/k for k ≠ 0."""
    return torch.expm1(k * x) / k


def log_rising(h: Tensor, log_x: Tensor) -> Tensor:
    """log Γ(x + h) − log Γ(x) − h·max(log x, 0) for x = exp(log_x) > 0 and h ≥ 0.

    The difference of two logarithms of the gamma function, of which for a large x little would be left by subtraction,
    without its largest term. It tends to 0 for x → ∞ and to log x + log Γ(h) for x → 0 and h > 0.

    >>> log_rising(torch.tensor([3.0, 3.0, 0.0]), torch.tensor([0.0, 1e4, -1e4]))
    tensor([1.7918, 0.0000, 0.0000])
    """
    large = log_x > _STIRLING
    inverse = (-torch.where(large, log_x, _STIRLING)).exp()
    w = h * inverse
    by_series = h * (log1p_ratio(w) - 1) + (h - 0.5) * w.log1p() + _rest(inverse / (1 + w)) - _rest(inverse)
    # log Γ(x) = log Γ(x + 1) − log x, which is finite where x is no longer distinguished from 0.
    low = torch.where(large, 0, log_x)
    x = low.exp()
    log_sum = torch.where(h > 0, (x + torch.where(h > 0, h, 1)).log(), low)
    direct = torch.lgamma(1 + x + h) - torch.lgamma(1 + x) - log_sum + low - h * torch.where(low < 0, 0, low)
    return torch.where(large, by_series, direct)


def _rest(y: Tensor) -> Tensor:
    """What log Γ(x) is above (x − ½)·log x − x + ½·log 2π, for y = 1/x ≤ 1/16."""
    square = y * y
    return y * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
