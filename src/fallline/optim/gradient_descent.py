"""Gradient descent with one learning rate for all elements, and Rprop, which needs only the gradient's signs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fallline.description import described
from fallline.errors import InvalidHyperparameter
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import WrongType, flag, in_interval, non_negative, real
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import (
    as_torch_keeps_it,
    incoming,
    negate,
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


@described
def scale_by_asgd(lr: Number = 1e-2, lambd: Number = 1e-4, alpha: Number = 0.75, t0: Number = 1e6) -> Transform:
    """Averaged descent: u = η · (g + λ · p), with η = lr at first, then lr / (1 + λ · lr · t)^alpha.

    The slot `ax` is the mean of the parameters p − u from update t0 + 1 on, and the parameters themselves before that.
    This must be the last stage but for `negate`, because it has to know where the parameters go.

    Args:
        lr: learning rate of the first step, at least 0.
        lambd: the λ that shrinks the parameters and the learning rate.
        alpha: how fast the learning rate falls.
        t0: number of updates before averaging begins.

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the learning rate is
    that of Bottou's sgd. Arithmetic as in `torch.optim.ASGD`: λ stands for both, and η is one step behind lr.
    Like torch, η is kept in float32 unless torch's default dtype is float64.
    """
    non_negative("lr", lr)
    for name, value in (("lambd", lambd), ("alpha", alpha), ("t0", t0)):
        real(name, value)

    def starting(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        return {"eta": as_torch_keeps_it(n["lr"].clone()), "mu": as_torch_keeps_it(torch.ones_like(n["lr"]))}

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step, mu, eta = slots["step"], slots["mu"], slots["eta"].double()
        shrink, size, share = cast(g, n["lambd"] * eta, eta, mu)
        u = p * shrink + g * size
        moved = p - u
        return u, {
            "ax": torch.where(mu == 1, moved, slots["ax"] + (moved - slots["ax"]) * share),
            "eta": (n["lr"] / (1 + n["lambd"] * n["lr"] * step) ** n["alpha"]).to(slots["eta"].dtype),
            "mu": (1 / torch.clamp(step - n["t0"], min=1)).to(mu.dtype),
        }

    numbers = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0}
    slots = ["eta", "mu", "ax"]
    return per_tensor("scale_by_asgd", rule, numbers, slots=slots, initial=starting, counts=True, elementwise=True)


@described
def asgd(
    lr: Number = 1e-2,
    lambd: Number = 1e-4,
    alpha: Number = 0.75,
    t0: Number = 1e6,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Averaged stochastic gradient descent: p ← (1 − λη)p − ηg, with η = lr / (1 + λ · lr · t)^alpha.

    The mean of the parameters since update t0 is kept in the slot `ax`, as torch keeps it; the model has the latest
    ones.

    Args:
        lr: learning rate of the first step, at least 0.
        lambd: the λ that shrinks the parameters and the learning rate.
        alpha: how fast the learning rate falls.
        t0: number of updates before averaging begins.
        weight_decay: at least 0, coupled.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> asgd(lr=0.1, t0=100)
    fl.optim.asgd(lr=0.1, t0=100)

    Source: Polyak and Juditsky, 1992. Equal to `torch.optim.ASGD`, whose η and μ have the default dtype and are
    float64 here.
    """
    return chain(*incoming(weight_decay, maximize), scale_by_asgd(lr, lambd, alpha, t0), negate())


@described
def scale_by_rprop(
    lr: Number = 1e-2,
    etas: tuple[Number, Number] = (0.5, 1.2),
    step_sizes: tuple[Number, Number] = (1e-6, 50.0),
) -> Transform:
    """Rprop's step: u = sign(g) · s, where every element has its own step size s.

    s grows by η₊ where the gradient keeps its sign and shrinks by η₋ where it turns; where it turns, there is no step,
    and the next one counts as unturned.

    Args:
        lr: the first step size, at least 0.
        etas: (η₋, η₊), with 0 < η₋ < 1 < η₊.
        step_sizes: smallest and largest s, at least 0.

    Source: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
    1993, in the variant without backtracking (iRprop⁻: Igel and Hüsken, 2000). Arithmetic as in `torch.optim.Rprop`.
    """
    non_negative("lr", lr)
    _pair("etas", etas)
    in_interval("eta1", etas[0], 0.0, 1.0, open_low=True, open_high=True)
    in_interval("eta2", etas[1], 1.0, math.inf, open_low=True)
    _pair("step_sizes", step_sizes)
    for index, size in enumerate(step_sizes):
        non_negative(f"step_size{index + 1}", size)

    def starting(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        return {"step_size": torch.zeros_like(p) + n["lr"].to(p.dtype)}

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        shrink, grow, smallest, largest = cast(g, n["eta1"], n["eta2"], n["step_size1"], n["step_size2"])
        sign = (g * slots["prev"]).sign()
        scaled = slots["step_size"] * torch.where(sign > 0, grow, torch.where(sign < 0, shrink, 1.0))
        size = torch.minimum(torch.maximum(scaled, smallest), largest)
        kept = torch.where(sign < 0, 0.0, g)
        return kept.sign() * size, {"prev": kept, "step_size": size}

    numbers = {"lr": lr, "eta1": etas[0], "eta2": etas[1], "step_size1": step_sizes[0], "step_size2": step_sizes[1]}
    slots = ["prev", "step_size"]
    return per_tensor("scale_by_rprop", rule, numbers, slots=slots, initial=starting, elementwise=True)


@described
def rprop(
    lr: Number = 1e-2,
    etas: tuple[Number, Number] = (0.5, 1.2),
    step_sizes: tuple[Number, Number] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> Optimizer:
    """Resilient backpropagation: p ← p − sign(g) · s, with a step size s of its own for every element.

    Made for gradients of the whole data set: those of mini-batches turn too often.

    Args:
        lr: the first step size, at least 0.
        etas: (η₋, η₊), by which s shrinks where the gradient turns and grows where it does not; 0 < η₋ < 1 < η₊.
        step_sizes: smallest and largest s, at least 0.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> rprop(etas=(0.5, 1.5))
    fl.optim.rprop(lr=0.01, etas=(0.5, 1.5))

    Source: Riedmiller and Braun, 1993. Equal to `torch.optim.Rprop`.
    """
    return chain(*incoming(0.0, maximize), scale_by_rprop(lr, etas, step_sizes), negate())


def _pair(name: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise WrongType(f"{name} = {value!r} is not a pair: give two numbers.")


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
    OptimizerInfo(
        asgd,
        learning_rates=(1e-3, 10.0),
        formula="(1 − λη)p − ηg, η = lr/(1 + λ·lr·t)^α",
        paper="Polyak & Juditsky",
        year=1992,
        torch_name="ASGD",
        valid=(
            {},
            {"lambd": 0.1, "alpha": 0.5, "weight_decay": 0.1},
            {"lr": 0.02, "t0": 3},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -0.5}, "weight_decay = -0.5 is negative"),
            Invalid({"alpha": "slow"}, "alpha = 'slow' is not a number", TypeError),
        ),
        settles={"lr": 1.5e-3, "lambd": 0.0},
        decays=("weight_decay", "lambd"),
    ),
    OptimizerInfo(
        rprop,
        learning_rates=(1e-5, 1e-1),
        formula="p − sign(g)·s, s grows by η₊ or shrinks by η₋",
        paper="Riedmiller & Braun",
        year=1993,
        torch_name="Rprop",
        valid=({}, {"lr": 2e-4, "etas": (0.5, 1.5)}, {"step_sizes": (2e-6, 100.0)}, {"maximize": True}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"etas": (1.0, 0.5)}, "eta1 = 1.0 is outside"),
            Invalid({"etas": (0.5, 1.0)}, "eta2 = 1.0 is outside"),
            Invalid({"step_sizes": 1e-6}, "step_sizes = 1e-06 is not a pair", TypeError),
        ),
        settles={},
    ),
)
