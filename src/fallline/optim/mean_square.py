"""Steps divided by the root of a mean, or sum, of squared gradients, without a mean of the gradient itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, in_interval, non_negative
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import (
    above_zero,
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
        keep, enter, floor = cast(g, n["alpha"], 1 - n["alpha"], above_zero(g, n["eps"]))
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


@described
def scale_by_root_of_sum(initial_accumulator_value: Number = 0.0, eps: Number = 1e-10) -> Transform:
    """Adagrad's direction: g / (√s + eps), with s the sum of all squared gradients so far.

    Args:
        initial_accumulator_value: what s starts with, at least 0.
        eps: added to the denominator, at least 0.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    2011. Arithmetic as in `torch.optim.Adagrad`.
    """
    non_negative("initial_accumulator_value", initial_accumulator_value)
    non_negative("eps", eps)

    def starting(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        return {"sum": torch.zeros_like(p) + n["initial_accumulator_value"].to(p.dtype)}

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (floor,) = cast(g, above_zero(g, n["eps"]))
        total = torch.addcmul(slots["sum"], g, g)
        return g / (square_root(total) + floor), {"sum": total}

    numbers = {"initial_accumulator_value": initial_accumulator_value, "eps": eps}
    return per_tensor("scale_by_root_of_sum", rule, numbers, slots=["sum"], initial=starting, elementwise=True)


@described
def scale_by_inverse_time(lr_decay: Number) -> Transform:
    """Shorter steps as time goes on: u = g / (1 + lr_decay · (t − 1)).

    Args:
        lr_decay: at least 0.
    """
    non_negative("lr_decay", lr_decay)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        (shrink,) = cast(g, 1 / (1 + (slots["step"] - 1) * n["lr_decay"]))
        return g * shrink, {}

    return per_tensor("scale_by_inverse_time", rule, {"lr_decay": lr_decay}, counts=True, elementwise=True)


@described
def adagrad(
    lr: Number = 1e-2,
    lr_decay: Number = 0.0,
    weight_decay: Number = 0.0,
    initial_accumulator_value: Number = 0.0,
    eps: Number = 1e-10,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adagrad: p ← p − lr / (1 + lr_decay · (t − 1)) · g/(√s + eps), from the sum s of all squared gradients.

    Args:
        lr: learning rate, at least 0.
        lr_decay: how fast the learning rate falls with time, at least 0.
        weight_decay: at least 0, coupled.
        initial_accumulator_value: what s starts with, at least 0.
        eps: added to the denominator outside the root, at least 0.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adagrad(lr=0.1, initial_accumulator_value=0.1)
    fl.optim.adagrad(lr=0.1, initial_accumulator_value=0.1)

    Source: Duchi, Hazan and Singer, 2011. Equal to `torch.optim.Adagrad`.
    """
    return chain(
        *incoming(weight_decay, maximize),
        scale_by_root_of_sum(initial_accumulator_value, eps),
        *inverse_time(lr_decay),
        scale_by_learning_rate(lr),
    )


def inverse_time(lr_decay: Number) -> list[Transform]:
    """The stage that shortens steps with time, unless there is none."""
    non_negative("lr_decay", lr_decay)
    return [] if lr_decay == 0 else [scale_by_inverse_time(lr_decay)]


@described
def scale_by_adadelta(rho: Number = 0.9, eps: Number = 1e-6) -> Transform:
    """Adadelta's direction: u = g · √(d + eps) / √(v + eps), with means v of the g² and d of the u² before.

    v = ρv + (1 − ρ)g², and after the step d = ρd + (1 − ρ)u².

    Args:
        rho: decay rate of both means, in [0, 1].
        eps: added under both roots, at least 0.

    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012. Arithmetic as in `torch.optim.Adadelta`.
    """
    in_interval("rho", rho, 0.0, 1.0)
    non_negative("eps", eps)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        keep, enter, floor = cast(g, n["rho"], 1 - n["rho"], n["eps"])
        square_avg = mean_of_squares(slots["square_avg"], g, keep, enter)
        u = g * (square_root(slots["acc_delta"] + floor) / square_root(square_avg + floor))
        return u, {"square_avg": square_avg, "acc_delta": mean_of_squares(slots["acc_delta"], u, keep, enter)}

    slots = ["square_avg", "acc_delta"]
    return per_tensor("scale_by_adadelta", rule, {"rho": rho, "eps": eps}, slots=slots, elementwise=True)


@described
def adadelta(
    lr: Number = 1.0,
    rho: Number = 0.9,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adadelta: p ← p − lr · g · √(d + eps)/√(v + eps), so that steps have the unit of the parameters.

    Args:
        lr: factor on the step, at least 0; the paper has none, which is 1.
        rho: decay rate of the means v of squared gradients and d of squared steps, in [0, 1].
        eps: added under both roots, at least 0; the first steps are about √eps long.
        weight_decay: at least 0, coupled.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adadelta(rho=0.95)
    fl.optim.adadelta(lr=1.0, rho=0.95)

    Source: Zeiler, 2012 (where rho is 0.95). Equal to `torch.optim.Adadelta`.
    """
    return chain(*incoming(weight_decay, maximize), scale_by_adadelta(rho, eps), scale_by_learning_rate(lr))


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
    OptimizerInfo(
        adagrad,
        learning_rates=(1e-4, 1.0),
        formula="p − lr·g/(√Σg² + eps)",
        paper="Duchi, Hazan & Singer",
        year=2011,
        torch_name="Adagrad",
        valid=(
            {},
            {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
            {"initial_accumulator_value": 0.1, "eps": 1e-4},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"lr_decay": -0.5}, "lr_decay = -0.5 is negative"),
            Invalid({"initial_accumulator_value": -1.0}, "initial_accumulator_value = -1.0 is negative"),
            Invalid({"eps": -1e-8}, "eps = -1e-08 is negative"),
        ),
        settles={"lr": 0.5},
    ),
    OptimizerInfo(
        adadelta,
        learning_rates=(1e-2, 10.0),
        formula="p − lr·g·√(d + eps)/√(v + eps)",
        paper="Zeiler",
        year=2012,
        torch_name="Adadelta",
        valid=({}, {"lr": 0.01, "weight_decay": 0.1}, {"rho": 0.95, "eps": 1e-4}, {"maximize": True}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"rho": 1.1}, "rho = 1.1 is outside"),
            Invalid({"eps": -1e-8}, "eps = -1e-08 is negative"),
        ),
        settles={"lr": 0.1},
    ),
)
