"""Adam and its closest kin: running means of the gradient and of its square, both corrected for their start."""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, non_negative, pair_of_betas
from fallline.optim.description import described
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import (
    decay,
    incoming,
    mean_of_squares,
    scale_by_learning_rate,
    square_root,
)


@described
def scale_by_adam(
    betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8, *, amsgrad: bool = False
) -> Transform:
    """Adam's direction: m̂ / (√v̂ + eps).

    m = β₁m + (1 − β₁)g, v = β₂v + (1 − β₂)g², m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ); with amsgrad, v̂ is made of the
    largest v so far. The bias corrections are computed in float64 whatever the parameters are.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; Reddi et al., "On the Convergence of
    Adam and Beyond", 2018. Arithmetic as in `torch.optim.Adam`.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)
    flag("amsgrad", amsgrad)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        correction1 = 1 - n["beta1"] ** step
        root_correction2 = (1 - n["beta2"] ** step).sqrt()
        # u = (m / correction1) / (√v / root_correction2 + eps), with the corrections moved into two numbers per step.
        enter1, keep2, enter2 = cast(g, 1 - n["beta1"], n["beta2"], 1 - n["beta2"])
        stretch, floor = cast(g, correction1 / root_correction2, n["eps"] * correction1)
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g, keep2, enter2)
        changed = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if amsgrad:
            exp_avg_sq = changed["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], exp_avg_sq)
        return exp_avg / (square_root(exp_avg_sq) * stretch + floor), changed

    slots = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return per_tensor("scale_by_adam", rule, numbers, slots=slots, counts=True, elementwise=True)


@described
def adam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam: p ← p − lr · m̂/(√v̂ + eps), from running means of the gradient and of its square.

    Args:
        lr: learning rate, at least 0: about the largest change of an element per step.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, coupled: passes through the scaling. Decoupled: `adamw`.
        amsgrad: divide by the largest second moment so far.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adam(lr=0.01, betas=(0.8, 0.999))
    fl.optim.adam(lr=0.01, betas=(0.8, 0.999))

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Equal to `torch.optim.Adam`.
    """
    return chain(
        *incoming(weight_decay, maximize),
        scale_by_adam(betas, eps, amsgrad=amsgrad),
        scale_by_learning_rate(lr),
    )


@described
def adamw(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay: p ← p − lr · (m̂/(√v̂ + eps) + weight_decay · p).

    Args:
        lr: learning rate, at least 0; it also scales the weight decay.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; 0.01 by default, as in torch.
        amsgrad: divide by the largest second moment so far.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adamw(weight_decay=0.1)
    fl.optim.adamw(lr=0.001, weight_decay=0.1)

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. Equal to `torch.optim.AdamW`.
    """
    return chain(
        *incoming(0.0, maximize),
        scale_by_adam(betas, eps, amsgrad=amsgrad),
        *decay(weight_decay),
        scale_by_learning_rate(lr),
    )


CATALOGUE = (
    OptimizerInfo(
        adam,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·m̂/(√v̂ + eps)",
        paper="Kingma & Ba",
        year=2015,
        torch_name="Adam",
        valid=({}, {"lr": 1e-2, "betas": (0.8, 0.95)}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside"),
            Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
        ),
        settles={"lr": 2e-2},
    ),
    OptimizerInfo(
        adamw,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·(m̂/(√v̂ + eps) + wd·p)",
        paper="Loshchilov & Hutter",
        year=2019,
        torch_name="AdamW",
        valid=({}, {"lr": 1e-2, "weight_decay": 0.3}, {"amsgrad": True}, {"weight_decay": 0.0, "maximize": True}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
        ),
        settles={"lr": 2e-2, "weight_decay": 0.0},
    ),
)
