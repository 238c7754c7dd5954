"""Losses for numbers, element by element: distances between a prediction and a target.

Neighbours: `likelihoods` and `counts` for distributions over numbers, `distributions` for whole distributions,
`classification` for classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from fallline.errors import InvalidHyperparameter
from fallline.losses.arguments import like, number, parts, reduced, same_shape
from fallline.losses.base import Loss, Number, Numbers, Parts, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo


def _squared(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("mse", prediction, target)
    return (prediction - target).square(), None


def _absolute(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("l1", prediction, target)
    return (prediction - target).abs(), None


def _huber(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("huber", prediction, target)
    distance = (prediction - target).abs()
    # With q = min(|d|, δ), q·(|d| − q/2) is both branches in one: |d|²/2 below δ and δ·(|d| − δ/2) above.
    quadratic = _at_most(distance, numbers["delta"])
    return quadratic * (distance - 0.5 * quadratic), None


def _smooth_absolute(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("smooth_l1", prediction, target)
    beta = numbers["beta"]
    distance = (prediction - target).abs()
    # With q = min(|d|, β), q²/2β + (|d| − q) is both branches in one; where β = 0, q is 0 and any divisor will do.
    quadratic = _at_most(distance, beta)
    return quadratic * (0.5 * quadratic / (beta + (beta == 0))) + (distance - quadratic), None


def _log_cosh(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("log_cosh", prediction, target)
    difference = prediction - target
    distance = difference.abs()
    # |d| + log(1 + exp(−2|d|)) − log 2 never overflows, but cancels to nothing where d is small;
    # ½·log(1 + sinh² d) keeps every digit there.
    near = distance < 1
    small = 0.5 * torch.where(near, difference, 0).sinh().square().log1p()
    large = distance + (-2 * distance).exp().log1p() - math.log(2)
    return torch.where(near, small, large), None


def _charbonnier(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("charbonnier", prediction, target)
    eps, difference = numbers["eps"], prediction - target
    # hypot, unlike a root of squares, neither over- nor underflows on the way.
    return torch.hypot(difference, eps if isinstance(eps, Tensor) else difference.new_tensor(eps)), None


def _one_quantile(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("quantile", prediction, target)
    return _pinball(target - prediction, numbers["quantiles"]), None


def _quantiles(prediction: Parts, target: Tensor, numbers: Numbers, *, names: tuple[str, ...]) -> tuple[Tensor, None]:
    columns = [like(column, target) for column in _columns(len(names), prediction)]
    for column in columns:
        same_shape("quantile, for each of its quantiles,", column, target)
    stacked = torch.stack(columns, 1)
    levels = [numbers[name] for name in names]
    if any(isinstance(level, Tensor) for level in levels):
        level = torch.stack([level if isinstance(level, Tensor) else stacked.new_tensor(level) for level in levels])
    else:
        level = stacked.new_tensor(levels)
    return _pinball(target.unsqueeze(1) - stacked, level.reshape(-1, *[1] * (stacked.ndim - 2))), None


def _pinball(difference: Tensor, level: Number) -> Tensor:
    return 0.5 * difference.abs() + (level - 0.5) * difference


def _columns(count: int, prediction: Parts) -> tuple[Tensor, ...]:
    return parts("quantile", prediction, count, f"{count} quantiles")


def _column(prediction: Parts, *, count: int, chosen: int) -> Tensor:
    return _columns(count, prediction)[chosen]


def _at_most(value: Tensor, bound: Number) -> Tensor:
    return torch.minimum(value, bound) if isinstance(bound, Tensor) else value.clamp(max=bound)


def _elementwise(name: str, terms: Any, reduction: str, **more: Any) -> Loss:
    """A loss of a difference between numbers, element by element."""
    return Loss(
        name=name,
        kind="regression",
        terms=terms,
        prediction=Prediction.REAL,
        target=Target.REAL,
        shapes=("[N, …]", "[N, …]"),
        reduction=reduced(name, reduction),
        **more,
    )


@loss_maker
def mse(*, reduction: str = "mean") -> Loss:
    """The mean squared error, (1/n) Σ (p − t)² over all n elements.

    Prediction and target have equal shapes [N, …]; nothing is broadcast. Equal to `torch.nn.MSELoss`.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    >>> mse()(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))
    tensor(2.5000)
    """
    return _elementwise("mse", _squared, reduction, formula="(p − t)²", torch_name="MSELoss")


@loss_maker
def l1(*, reduction: str = "mean") -> Loss:
    """The mean absolute error, (1/n) Σ |p − t| over all n elements.

    Prediction and target have equal shapes [N, …]; nothing is broadcast. Its gradient where p = t is 0. Equal
    to `torch.nn.L1Loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    >>> l1()(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    tensor(1.5000)
    """
    return _elementwise("l1", _absolute, reduction, formula="|p − t|", torch_name="L1Loss")


@loss_maker
def huber(*, delta: Number = 1.0, reduction: str = "mean") -> Loss:
    """The Huber loss: (p − t)²/2 up to the distance δ, and δ·(|p − t| − δ/2), a straight line, beyond.

    Prediction and target have equal shapes [N, …]; nothing is broadcast. Equal to `torch.nn.HuberLoss`.

    Args:
        delta: the distance, > 0, in the target's unit, at which the parabola becomes a line.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `delta` is not a number above 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: P. J. Huber, "Robust estimation of a location parameter", Ann. Math. Statist. 35 (1964).

    >>> huber(delta=1.0)(torch.tensor([0.5, 3.0]), torch.zeros(2))
    tensor(1.3125)
    """
    return _elementwise(
        "huber",
        _huber,
        reduction,
        formula="d²/2 up to d = |p − t| = δ, δ·(d − δ/2) beyond",
        reference="Huber 1964",
        numbers={"delta": number("huber", "delta", delta, above=0)},
        torch_name="HuberLoss",
    )


@loss_maker
def smooth_l1(*, beta: Number = 1.0, reduction: str = "mean") -> Loss:
    """The smooth absolute error: (p − t)²/(2β) up to the distance β, and |p − t| − β/2 beyond.

    It is huber(delta=β)/β: far away its slope is always 1, and for β = 0 it is `l1`. Prediction and target have
    equal shapes [N, …]; nothing is broadcast. Equal to `torch.nn.SmoothL1Loss`.

    Args:
        beta: the distance, ≥ 0, in the target's unit, at which the parabola becomes a line.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `beta` is not a number ≥ 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: R. Girshick, "Fast R-CNN", ICCV 2015 (with β = 1).

    >>> smooth_l1(beta=1.0)(torch.tensor([0.5, 3.0]), torch.zeros(2))
    tensor(1.3125)
    """
    return _elementwise(
        "smooth_l1",
        _smooth_absolute,
        reduction,
        formula="d²/(2β) up to d = |p − t| = β, d − β/2 beyond",
        reference="Girshick 2015",
        numbers={"beta": number("smooth_l1", "beta", beta, low=0)},
        torch_name="SmoothL1Loss",
    )


@loss_maker
def log_cosh(*, reduction: str = "mean") -> Loss:
    """The logarithm of the hyperbolic cosine of the error: log cosh(p − t).

    About d²/2 for a small difference d and |d| − log 2 for a large one, with the slope tanh d and every derivative
    continuous. It has no scale of its own: the change comes at |d| ≈ 1 in the target's unit. Prediction and target
    have equal shapes [N, …]; nothing is broadcast. The value keeps its digits both where cosh would overflow and
    near 0, where |d| + softplus(−2|d|) − log 2 would be round-off alone.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: P. J. Green, "Bayesian reconstructions from emission tomography data using a modified EM algorithm",
    IEEE Trans. Med. Imaging 9 (1990).

    >>> log_cosh(reduction="none")(torch.tensor([1e-3, 1.0, 1e4]), torch.zeros(3))
    tensor([5.0000e-07, 4.3378e-01, 9.9993e+03])
    """
    return _elementwise("log_cosh", _log_cosh, reduction, formula="log cosh(p − t)", reference="Green 1990")


@loss_maker
def charbonnier(*, eps: Number = 1e-3, reduction: str = "mean") -> Loss:
    """The Charbonnier loss, a smooth absolute error: √((p − t)² + ε²).

    About ε + d²/(2ε) for a difference d below ε and |d| beyond it; its least value is ε, not 0. Prediction and
    target have equal shapes [N, …]; nothing is broadcast.

    Args:
        eps: ε > 0, in the target's unit.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `eps` is not a number above 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: P. Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed imaging",
    ICIP 1994; with ε = 0.001, W.-S. Lai et al., "Deep Laplacian pyramid networks for fast and accurate
    super-resolution", CVPR 2017. J. T. Barron, "A general and adaptive robust loss function", CVPR 2019, divides it by
    ε and subtracts 1 (there α = 1).

    >>> charbonnier(eps=3.0)(torch.tensor([4.0]), torch.zeros(1))
    tensor(5.)
    """
    return _elementwise(
        "charbonnier",
        _charbonnier,
        reduction,
        formula="√((p − t)² + ε²)",
        reference="Charbonnier et al. 1994, Lai et al. 2017",
        numbers={"eps": number("charbonnier", "eps", eps, above=0)},
    )


@loss_maker
def quantile(*, quantiles: Number | Sequence[Number] = 0.5, reduction: str = "mean") -> Loss:
    """The quantile (pinball) loss: q·(t − p) where the target is above the prediction, (1 − q)·(p − t) below.

    What minimises it is the q-quantile of the target. At q = 0.5 it is half the absolute error. The gradient where
    p = t is ½ − q, the middle of the slopes beside it.

    With one number, prediction and target have equal shapes [N, …]; nothing is broadcast. With a sequence of Q
    numbers, the prediction holds Q values for each value of the target: [N, Q, …] for a target [N, …]; [N, Q] also for
    a target [N, 1]; [N, Q·d] for a target [N, d], the d values of the first quantile first; or a tuple of Q tensors of
    the target's shape. The values then have the shape [N, Q, …], and the mean is over the quantiles too. Quantiles may
    cross: nothing keeps the prediction for 0.9 above that for 0.1.

    The estimate for metrics is the prediction of the quantile nearest to 0.5; of two as near, the first.

    Args:
        quantiles: one number q above 0 and below 1, or a sequence of them.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for a q outside (0, 1), no q at all, or an unknown `reduction`.
        LossMismatch: when called with shapes that do not fit.

    Source: R. Koenker and G. Bassett, "Regression quantiles", Econometrica 46 (1978).

    >>> quantile(quantiles=(0.1, 0.5, 0.9), reduction="none")(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2.0]))
    tensor([[0.1000, 0.0000, 0.1000]])
    """
    if not isinstance(quantiles, tuple):
        level = _level(quantiles)
        shown: dict[str, Any] = {"numbers": {"quantiles": level}}
        return _elementwise("quantile", _one_quantile, reduction, formula=_PINBALL, reference=_KOENKER, **shown)
    if not quantiles:
        raise InvalidHyperparameter("quantile was given quantiles=(), and expects at least one number.")
    numbers = {f"quantile{i + 1}": _level(each) for i, each in enumerate(quantiles)}
    known = [0.5 if isinstance(each, Tensor) else abs(each - 0.5) for each in numbers.values()]
    middle = known.index(min(known))  # of levels that are being mapped or differentiated nothing is known
    return Loss(
        name="quantile",
        kind="regression",
        terms=partial(_quantiles, names=tuple(numbers)),
        prediction=Prediction.QUANTILES,
        target=Target.REAL,
        shapes=("[N, Q, …]", "[N, …]"),
        formula=_PINBALL,
        reference=_KOENKER,
        numbers=numbers,
        reduction=reduced("quantile", reduction),
        estimate=partial(_column, count=len(quantiles), chosen=middle),
    )


_PINBALL = "q·(t − p) where t ≥ p, (1 − q)·(p − t) where not"
_KOENKER = "Koenker and Bassett 1978"


def _level(value: Any) -> Number:
    level = number("quantile", "quantiles", value, above=0)
    if not isinstance(level, Tensor) and level >= 1:
        raise InvalidHyperparameter(f"quantile was given quantiles={value!r}, and expects numbers above 0 and below 1.")
    return level


def _pair(generator: Generator) -> tuple[Tensor, Tensor]:
    prediction = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return prediction, torch.randn(12, 3, generator=generator, dtype=torch.float64) + 0.5 * prediction


CATALOGUE = (
    LossInfo(mse, _pair),
    LossInfo(l1, _pair),
    LossInfo(
        huber,
        _pair,
        valid=({}, {"delta": 0.3}),
        invalid=(
            Invalid({"delta": 0}, "delta=0"),
            Invalid({"delta": -1.0}, "delta=-1.0"),
            Invalid({"delta": float("nan")}, "delta=nan"),
            Invalid({"delta": "1"}, "delta='1'"),
        ),
        sweeps={"delta": (0.3, 1.5)},
        source="P. J. Huber, Robust estimation of a location parameter, Ann. Math. Statist. 35 (1964)",
    ),
    LossInfo(
        smooth_l1,
        _pair,
        valid=({}, {"beta": 0.3}, {"beta": 0.0}),
        invalid=(Invalid({"beta": -1.0}, "beta=-1.0"), Invalid({"beta": float("inf")}, "beta=inf")),
        sweeps={"beta": (0.0, 0.7)},
        source="R. Girshick, Fast R-CNN, ICCV 2015",
    ),
    LossInfo(
        log_cosh,
        _pair,
        source="P. J. Green, Bayesian reconstructions from emission tomography data, IEEE Trans. Med. Imaging 9 (1990)",
    ),
    LossInfo(
        charbonnier,
        _pair,
        valid=({"eps": 0.5}, {}),
        invalid=(Invalid({"eps": 0.0}, "eps=0.0"), Invalid({"eps": "small"}, "eps='small'")),
        sweeps={"eps": (0.1, 0.8)},
        source="W.-S. Lai et al., Deep Laplacian pyramid networks, CVPR 2017",
    ),
    LossInfo(
        quantile,
        _pair,
        valid=({}, {"quantiles": 0.9}, {"quantiles": (0.2,)}),
        invalid=(
            Invalid({"quantiles": 0}, "quantiles=0"),
            Invalid({"quantiles": 1.0}, "quantiles=1.0"),
            Invalid({"quantiles": (0.1, 50)}, "quantiles=50"),
            Invalid({"quantiles": ()}, "at least one"),
            Invalid({"quantiles": "median"}, "quantiles='median'"),
        ),
        sweeps={"quantiles": (0.2, 0.9)},
        source="R. Koenker and G. Bassett, Regression quantiles, Econometrica 46 (1978)",
    ),
)
