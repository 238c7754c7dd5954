"""Losses for numbers: the squared, the absolute and the Huber distance. Neighbour: `classification`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fallline.errors import InvalidHyperparameter
from fallline.losses.base import Loss, checked_reduction, spelled
from fallline.losses.checks import check_elementwise, require_same_shape
from fallline.losses.keywords import knows_its_keywords


def _squared(prediction: Tensor, target: Tensor) -> tuple[Tensor, None]:
    require_same_shape("mse", prediction, target)
    return (prediction - target).square(), None


def _absolute(prediction: Tensor, target: Tensor) -> tuple[Tensor, None]:
    require_same_shape("l1", prediction, target)
    return (prediction - target).abs(), None


def _huber(prediction: Tensor, target: Tensor, *, delta: float | Tensor) -> tuple[Tensor, None]:
    require_same_shape("huber", prediction, target)
    distance = (prediction - target).abs()
    # With q = min(|d|, δ), q·(|d| − q/2) is both branches in one: |d|²/2 below δ and δ·(|d| − δ/2) above.
    quadratic = torch.minimum(distance, delta) if isinstance(delta, Tensor) else distance.clamp(max=delta)
    return quadratic * (distance - 0.5 * quadratic), None


@knows_its_keywords
def mse(*, reduction: str = "mean") -> Loss:
    """The mean squared error, (1/n) Σ (p − t)² over all n elements.

    Prediction and target have equal shapes [N, …]; nothing is broadcast. Equal to `torch.nn.MSELoss`.

    Raises:
        InvalidHyperparameter: if `reduction` is neither "mean" nor "sum".
        LossMismatch: when called with shapes that differ.

    >>> mse()(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))
    tensor(2.5000)
    """
    source = partial(spelled, "torch.nn.MSELoss", {"reduction": reduction}, {"reduction": "mean"})
    return Loss(
        "mse",
        "regression",
        _squared,
        {},
        checked_reduction(reduction),
        partial(check_elementwise, "mse"),
        source,
    )


@knows_its_keywords
def l1(*, reduction: str = "mean") -> Loss:
    """The mean absolute error, (1/n) Σ |p − t| over all n elements.

    Prediction and target have equal shapes [N, …]; nothing is broadcast. Its gradient where p = t is 0. Equal
    to `torch.nn.L1Loss`.

    Raises:
        InvalidHyperparameter: if `reduction` is neither "mean" nor "sum".
        LossMismatch: when called with shapes that differ.

    >>> l1()(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    tensor(1.5000)
    """
    source = partial(spelled, "torch.nn.L1Loss", {"reduction": reduction}, {"reduction": "mean"})
    return Loss(
        "l1",
        "regression",
        _absolute,
        {},
        checked_reduction(reduction),
        partial(check_elementwise, "l1"),
        source,
    )


@knows_its_keywords
def huber(*, delta: float | Tensor = 1.0, reduction: str = "mean") -> Loss:
    """The Huber loss: (p − t)²/2 up to the distance δ, and δ·(|p − t| − δ/2), a straight line, beyond.

    Prediction and target have equal shapes [N, …]; nothing is broadcast. Equal to `torch.nn.HuberLoss`.

    Args:
        delta: the distance, > 0, in the target's unit, at which the parabola becomes a line; a number or a
            0-dimensional tensor.
        reduction: "mean" or "sum".

    Raises:
        InvalidHyperparameter: if `delta` is not a number above 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: P. J. Huber, "Robust estimation of a location parameter", Ann. Math. Statist. 35 (1964).

    >>> huber(delta=1.0)(torch.tensor([0.5, 3.0]), torch.zeros(2))
    tensor(1.3125)
    """
    number = isinstance(delta, int | float) and not isinstance(delta, bool)
    if not isinstance(delta, Tensor) and not (number and 0 < delta < float("inf")):
        raise InvalidHyperparameter(f"huber was given delta={delta!r}, and expects a finite number above 0.")
    arguments = {"delta": delta}
    source = partial(
        spelled,
        "torch.nn.HuberLoss",
        {"reduction": reduction, **arguments},
        {"reduction": "mean", "delta": 1.0},
    )
    check = partial(check_elementwise, "huber")
    return Loss(
        "huber",
        "regression",
        partial(_huber, delta=delta),
        arguments,
        checked_reduction(reduction),
        check,
        source,
    )
