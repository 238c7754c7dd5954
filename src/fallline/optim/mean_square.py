"""Steps divided by the root of a mean, or sum, of squared gradients, without a mean of the gradient itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, non_negative
from fallline.optim.description import described
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import (
    incoming,
    mean_of_squares,
    scale_by_learning_rate,
    square_root,
    trace,
)


@described
def scale_by_rms(alpha: Number = 0.99, eps: Number = 1e-8, *, centered: bool = False) -> Transform:
    """RMSprop's direction: g / (√v + eps), with v = αv + (1 − α)g², less (the running mean of g)² if centered.

    Source: Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012; centered: Graves,
    "Generating Sequences With Recurrent Neural Networks", 2013. Arithmetic as in `torch.optim.RMSprop`.
    """
    non_negative("alpha", alpha)
    non_negative("eps", eps)
    flag("centered", centered)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        keep, enter, floor = cast(g, n["alpha"], 1 - n["alpha"], n["eps"])
        square_avg = mean_of_squares(slots["square_avg"], g, keep, enter)
        changed = {"square_avg": square_avg}
        spread = square_avg
        if centered:
            changed["grad_avg"] = torch.lerp(slots["grad_avg"], g, enter)
            spread = square_avg - changed["grad_avg"] * changed["grad_avg"]
        return g / (square_root(spread) + floor), changed

    slots = ["square_avg", *(["grad_avg"] if centered else [])]
    return per_tensor("scale_by_rms", rule, {"alpha": alpha, "eps": eps}, slots=slots, elementwise=True)


@described
def rmsprop(
    lr: Number = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """RMSprop: p ← p − lr · b, b = momentum · b + g/(√v + eps), from a running mean v of the squared gradient.

    Args:
        lr: learning rate, at least 0.
        alpha: decay rate of the running mean, at least 0.
        eps: added to the denominator outside the root, at least 0.
        weight_decay: at least 0, coupled.
        momentum: at least 0; 0 keeps no buffer.
        centered: subtract the squared running mean of the gradient from v.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> rmsprop(lr=0.001, centered=True)
    fl.optim.rmsprop(lr=0.001, centered=True)

    Source: Tieleman and Hinton, 2012. Equal to `torch.optim.RMSprop`.
    """
    non_negative("momentum", momentum)
    stages = [*incoming(weight_decay, maximize), scale_by_rms(alpha, eps, centered=centered)]
    if momentum != 0:
        stages.append(trace(momentum))
    return chain(*stages, scale_by_learning_rate(lr))


CATALOGUE = (
    OptimizerInfo(
        rmsprop,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·g/(√v + eps)",
        paper="Tieleman & Hinton",
        year=2012,
        torch_name="RMSprop",
        valid=(
            {},
            {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.1},
            {"momentum": 0.5, "centered": True, "eps": 1e-4},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"momentum": -1.0}, "momentum = -1.0 is negative"),
            Invalid({"alpha": -0.1}, "alpha = -0.1 is negative"),
        ),
        settles={"lr": 1e-3},
    ),
)
