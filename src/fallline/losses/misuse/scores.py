"""What is minus a known loss: log-likelihoods, negative cross-entropies, coefficients of overlap.

A callable is a score if, for several predictions, its values are a − b·loss with b > 0. Neighbours: `direction`, which
asks; `recognised`, for callables that are known losses themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Function: TypeAlias = Callable[[Tensor, Tensor], Tensor]
PROBES = 9


def score_of(value: Callable[[Tensor], Tensor], prediction: Tensor, target: Tensor) -> str:
    """In words, minus which loss a callable is; "" if none is known.

    >>> prediction, target = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    >>> score_of(lambda p: 2 - functional.cross_entropy(p, target), prediction, target)
    'minus cross_entropy, and 2 more'
    >>> score_of(lambda p: functional.cross_entropy(-p, target), prediction, target)
    ''
    """
    probes = list(_probes(prediction))
    values = [float(value(probe)) for probe in probes]
    spread = max(values) - min(values)
    if not all(map(math.isfinite, values)) or spread <= 1e-4 * max(map(abs, values)):
        return ""
    for name, function in _losses(prediction, target):
        try:
            others = [float(function(probe, target)) for probe in probes]
        except (RuntimeError, ValueError, IndexError):
            continue
        if not all(map(math.isfinite, others)):
            continue
        constant, slope = _line(others, values)
        off = max(abs(constant + slope * other - one) for other, one in zip(others, values, strict=True))
        if slope < 0 and off <= 1e-4 * spread:
            words = "minus " if math.isclose(slope, -1, rel_tol=1e-3) else f"{slope:.4g} times "
            return words + name + (f", and {constant:.4g} more" if abs(constant) > 1e-3 * spread else "")
    return ""


def _probes(prediction: Tensor) -> Iterator[Tensor]:
    """Predictions of all kinds: values that change places, smaller and larger ones, and what lies between.

    Probabilities stay probabilities.
    """
    unit = bool(((prediction >= 0) & (prediction <= 1)).all())

    def turned(by: int) -> Tensor:
        return prediction.flatten().roll(by).reshape(prediction.shape)

    yield prediction
    yield turned(1)
    yield 0.5 * prediction
    yield 0.5 * (prediction + turned(3))
    yield 0.3 * prediction + 0.7 * turned(7)
    yield prediction.flatten().flip(0).reshape(prediction.shape)
    yield 0.8 * turned(prediction.numel() // 2)
    yield prediction.square() if unit else 3 * prediction
    yield turned(2).sqrt() if unit else -2 * turned(2)


def _line(others: list[float], values: list[float]) -> tuple[float, float]:
    """The straight line through the values."""
    middle, centre = sum(others) / len(others), sum(values) / len(values)
    square = sum((other - middle) ** 2 for other in others)
    if square == 0:
        return centre, 0.0
    product = sum((other - middle) * (one - centre) for other, one in zip(others, values, strict=True))
    slope = product / square
    return centre - slope * middle, slope


def _losses(prediction: Tensor, target: Tensor) -> Iterator[tuple[str, Function]]:
    unit = bool(((prediction >= 0) & (prediction <= 1)).all())
    if target.ndim == prediction.ndim - 1 and prediction.ndim >= 2:
        axis = 1 if [len(target), *prediction.shape[2:]] == list(target.shape) else -1
        named: dict[str, Function] = {
            "cross_entropy": functional.cross_entropy,
            "nll": functional.nll_loss,
            "multi_margin": functional.multi_margin_loss,
        }
        for name, function in named.items():
            yield name, partial(_of_classes, function, axis)
        yield from _overlaps(partial(_softmax, axis), partial(_one_hot, axis))
        if unit:
            yield from _overlaps(_as_it_is, partial(_one_hot, axis))
        return
    elementwise: dict[str, Function] = {
        "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
        "mse": functional.mse_loss,
        "l1": functional.l1_loss,
        "soft_margin": functional.soft_margin_loss,
        "hinge": _hinge,
    }
    if unit:
        elementwise["binary_cross_entropy"] = functional.binary_cross_entropy
    for name, function in elementwise.items():
        yield name, partial(_elementwise, function)
    yield from _overlaps(torch.sigmoid, _like)
    if unit:
        yield from _overlaps(_as_it_is, _like)


def _of_classes(function: Function, axis: int, prediction: Tensor, target: Tensor) -> Tensor:
    return function(prediction.movedim(axis, 1), target)


def _elementwise(function: Function, prediction: Tensor, target: Tensor) -> Tensor:
    return function(prediction, _like(prediction, target))


def _hinge(prediction: Tensor, target: Tensor) -> Tensor:
    return (1 - prediction * target).clamp(min=0).mean()


def _like(prediction: Tensor, target: Tensor) -> Tensor:
    return target.reshape(prediction.shape).to(prediction.dtype)


def _one_hot(axis: int, prediction: Tensor, target: Tensor) -> Tensor:
    return functional.one_hot(target, prediction.shape[axis]).movedim(-1, axis).to(prediction.dtype)


def _softmax(axis: int, prediction: Tensor) -> Tensor:
    return prediction.softmax(axis)


def _as_it_is(prediction: Tensor) -> Tensor:
    return prediction


def _overlaps(squash: Callable[[Tensor], Tensor], coded: Function) -> Iterator[tuple[str, Function]]:
    """Dice's and Jaccard's, over the batch, by images, by classes and by both."""
    for name in ("dice", "jaccard"):
        for kept in ((), (0,), (1,), (0, 1)):
            for smooth in (0.0, 1.0):
                yield name, partial(_overlap, name, kept, smooth, squash, coded)


def _overlap(
    name: str,
    kept: tuple[int, ...],
    smooth: float,
    squash: Callable[[Tensor], Tensor],
    coded: Function,
    prediction: Tensor,
    target: Tensor,
) -> Tensor:
    p, t = squash(prediction), coded(prediction, target)
    over = [axis for axis in range(p.ndim) if axis not in kept]
    if not over:
        raise IndexError("no axis to sum over")
    shared, both = (p * t).sum(over), (p + t).sum(over)
    if name == "dice":
        return 1 - ((2 * shared + smooth) / (both + smooth)).mean()
    return 1 - ((shared + smooth) / (both - shared + smooth)).mean()
