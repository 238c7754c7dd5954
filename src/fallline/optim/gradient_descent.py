"""Gradient descent with one learning rate for all elements."""

from __future__ import annotations

from fallline.errors import InvalidHyperparameter
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, non_negative, real
from fallline.optim.description import described
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number
from fallline.optim.transforms import (
    incoming,
    scale_by_learning_rate,
    trace,
)


@described
def sgd(
    lr: Number = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Stochastic gradient descent with momentum: p ← p − lr · b, where b is a running sum of gradients.

    b = momentum · b + (1 − dampening)(g + weight_decay · p).

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0; 0 keeps no buffer.
        dampening: how much less of each gradient enters the buffer, from the second step on.
        weight_decay: at least 0, coupled (part of the gradient).
        nesterov: look ahead: steps along g + momentum · b. Needs momentum > 0 and dampening 0.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> sgd(lr=0.1, momentum=0.9)
    fl.optim.sgd(lr=0.1, momentum=0.9)

    Source: Robbins and Monro, 1951; Polyak, 1964; Nesterov, 1983. Equal to `torch.optim.SGD`.
    """
    non_negative("momentum", momentum)
    real("dampening", dampening)
    flag("nesterov", nesterov)
    if nesterov and (momentum == 0 or dampening != 0):
        raise InvalidHyperparameter("nesterov=True needs momentum above 0 and dampening 0.")
    stages = incoming(weight_decay, maximize)
    if momentum != 0:
        stages.append(trace(momentum, dampening, nesterov=nesterov))
    return chain(*stages, scale_by_learning_rate(lr))


CATALOGUE = (
    OptimizerInfo(
        sgd,
        learning_rates=(1e-3, 10.0),
        formula="p − lr·b, b = momentum·b + g",
        paper="Robbins & Monro; Polyak",
        year=1951,
        torch_name="SGD",
        valid=(
            {"lr": 1e-2},
            {"momentum": 0.9},
            {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"weight_decay": 0.1, "maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"momentum": -0.5}, "momentum = -0.5 is negative"),
            Invalid({"nesterov": True}, "nesterov=True needs momentum"),
        ),
        settles={"lr": 1e-3, "momentum": 0.9},
    ),
)
