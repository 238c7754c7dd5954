"""Adam and its closest kin: running means of the gradient and of its square, both corrected for their start."""

from __future__ import annotations

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, non_negative, pair_of_betas
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import (
    above_zero,
    as_torch_keeps_it,
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
        stretch, floor = cast(g, correction1 / root_correction2, above_zero(g, n["eps"] * correction1))
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
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Adam: p ← p − lr · m̂/(√v̂ + eps), from running means of the gradient and of its square.

    Args:
        lr: learning rate, at least 0: about the largest change of an element per step.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, coupled: passes through the scaling.
        amsgrad: divide by the largest second moment so far.
        maximize: go uphill.
        decoupled_weight_decay: decay the weights outside of the scaling, as `adamw` does.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adam(lr=0.01, betas=(0.8, 0.999))
    fl.optim.adam(lr=0.01, betas=(0.8, 0.999))

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Equal to `torch.optim.Adam`.
    """
    scaling = scale_by_adam(betas, eps, amsgrad=amsgrad)
    return chain(*_decaying(scaling, weight_decay, decoupled_weight_decay, maximize), scale_by_learning_rate(lr))


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
    scaling = scale_by_adam(betas, eps, amsgrad=amsgrad)
    return chain(*_decaying(scaling, weight_decay, True, maximize), scale_by_learning_rate(lr))


@described
def scale_by_adamax(betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8) -> Transform:
    """Adamax's direction: m̂ / s, with s the decaying maximum of the gradient's size.

    m = β₁m + (1 − β₁)g, m̂ = m/(1 − β₁ᵗ), s = max(β₂s, |g| + eps).

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 2 (where there is no eps).
    Arithmetic as in `torch.optim.Adamax`.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        correction = 1 - n["beta1"] ** slots["step"]
        enter, keep, floor, stretch = cast(g, 1 - n["beta1"], n["beta2"], above_zero(g, n["eps"]), 1 / correction)
        exp_avg = torch.lerp(slots["exp_avg"], g, enter)
        exp_inf = torch.maximum(slots["exp_inf"] * keep, g.abs() + floor)
        return exp_avg / exp_inf * stretch, {"exp_avg": exp_avg, "exp_inf": exp_inf}

    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return per_tensor("scale_by_adamax", rule, numbers, slots=["exp_avg", "exp_inf"], counts=True, elementwise=True)


@described
def adamax(
    lr: Number = 2e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adamax: p ← p − lr · m̂/s, Adam with the decaying maximum s of |g| in place of the root of a mean square.

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the mean and of the maximum, each in [0, 1).
        eps: added to |g|, at least 0.
        weight_decay: at least 0, coupled.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adamax(betas=(0.8, 0.99))
    fl.optim.adamax(lr=0.002, betas=(0.8, 0.99))

    Source: Kingma and Ba, 2015. Equal to `torch.optim.Adamax`.
    """
    return chain(*incoming(weight_decay, maximize), scale_by_adamax(betas, eps), scale_by_learning_rate(lr))


@described
def scale_by_nadam(
    betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8, momentum_decay: Number = 4e-3
) -> Transform:
    """NAdam's direction: (m·μₜ₊₁/(1 − Πₜ₊₁) + g·(1 − μₜ)/(1 − Πₜ)) / (√v̂ + eps).

    μₜ = β₁(1 − ½·0.96^(t·momentum_decay)) warms the momentum up, Πₜ = μ₁·…·μₜ; m and v̂ are Adam's.

    Args:
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        momentum_decay: how fast the warm-up goes, at least 0.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", 2016. Arithmetic as in `torch.optim.NAdam`.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)
    non_negative("momentum_decay", momentum_decay)

    def starting(p: Tensor, n: Numbers) -> dict[str, Tensor | None]:
        return {"mu_product": as_torch_keeps_it(torch.ones_like(n["beta1"]))}

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        mu = n["beta1"] * (1 - 0.5 * 0.96 ** (step * n["momentum_decay"]))
        mu_next = n["beta1"] * (1 - 0.5 * 0.96 ** ((step + 1) * n["momentum_decay"]))
        mu_product = slots["mu_product"] * mu.to(slots["mu_product"].dtype)
        product = mu_product.double()
        of_mean, of_gradient = cast(g, mu_next / (1 - product * mu_next), (1 - mu) / (1 - product))
        enter1, keep2, enter2, floor = cast(g, 1 - n["beta1"], n["beta2"], 1 - n["beta2"], above_zero(g, n["eps"]))
        (stretch,) = cast(g, (1 - n["beta2"] ** step).rsqrt())
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g, keep2, enter2)
        direction = (g * of_gradient + exp_avg * of_mean) / (square_root(exp_avg_sq) * stretch + floor)
        return direction, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "mu_product": mu_product}

    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "momentum_decay": momentum_decay}
    slots = ["exp_avg", "exp_avg_sq", "mu_product"]
    return per_tensor("scale_by_nadam", rule, numbers, slots=slots, initial=starting, counts=True, elementwise=True)


@described
def nadam(
    lr: Number = 2e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum_decay: Number = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """NAdam: Adam with Nesterov's momentum, p ← p − lr · (m·μₜ₊₁/(1 − Πₜ₊₁) + g·(1 − μₜ)/(1 − Πₜ)) / (√v̂ + eps).

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0.
        momentum_decay: how fast the momentum μₜ = β₁(1 − ½·0.96^(t·momentum_decay)) warms up, at least 0.
        decoupled_weight_decay: decay the weights outside of the scaling, as `adamw` does.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> nadam(weight_decay=0.1, decoupled_weight_decay=True)
    fl.optim.nadam(lr=0.002, weight_decay=0.1, decoupled_weight_decay=True)

    Source: Dozat, 2016. Equal to `torch.optim.NAdam`, whose product Πₜ has the default dtype and is float64 here.
    """
    scaling = scale_by_nadam(betas, eps, momentum_decay)
    return chain(*_decaying(scaling, weight_decay, decoupled_weight_decay, maximize), scale_by_learning_rate(lr))


@described
def scale_by_radam(betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8) -> Transform:
    """RAdam's direction: r · m̂ · √(1 − β₂ᵗ) / (√v + eps) once the second moment can be trusted, m̂ before.

    That is where ρₜ = ρ − 2tβ₂ᵗ/(1 − β₂ᵗ) is above 5, with ρ = 2/(1 − β₂) − 1;
    r = √((ρₜ − 4)(ρₜ − 2)ρ / ((ρ − 4)(ρ − 2)ρₜ)).

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, which rectifies from 4 on.
    Arithmetic as in `torch.optim.RAdam`.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step, decayed = slots["step"], n["beta2"] ** slots["step"]
        longest = 2 / (1 - n["beta2"]) - 1
        length = longest - 2 * step * decayed / (1 - decayed)
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        enter1, keep2, enter2, floor = cast(g, 1 - n["beta1"], n["beta2"], 1 - n["beta2"], above_zero(g, n["eps"]))
        mean, scaled = cast(g, 1 / (1 - n["beta1"] ** step), (rectified * (1 - decayed)).sqrt())
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g, keep2, enter2)
        direction = exp_avg * mean
        adaptive = direction * scaled / (square_root(exp_avg_sq) + floor)
        return torch.where(length > 5, adaptive, direction), {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return per_tensor("scale_by_radam", rule, numbers, slots=["exp_avg", "exp_avg_sq"], counts=True, elementwise=True)


@described
def radam(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """RAdam: Adam whose first steps are plain momentum, p ← p − lr · m̂, until v has seen enough gradients.

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0.
        decoupled_weight_decay: decay the weights outside of the scaling, as `adamw` does.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> radam(eps=1e-6)
    fl.optim.radam(lr=0.001, eps=1e-06)

    Source: Liu et al., 2020. Equal to `torch.optim.RAdam`.
    """
    scaling = scale_by_radam(betas, eps)
    return chain(*_decaying(scaling, weight_decay, decoupled_weight_decay, maximize), scale_by_learning_rate(lr))


def _decaying(scaling: Transform, weight_decay: Number, decoupled: bool, maximize: bool) -> list[Transform]:
    """The scaling with weight decay before it, or after it if that is decoupled."""
    flag("decoupled_weight_decay", decoupled)
    if decoupled:
        return [*incoming(0.0, maximize), scaling, *decay(weight_decay)]
    return [*incoming(weight_decay, maximize), scaling]


CATALOGUE = (
    OptimizerInfo(
        adam,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·m̂/(√v̂ + eps)",
        paper="Kingma & Ba",
        year=2015,
        torch_name="Adam",
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.8, 0.95)},
            {"weight_decay": 0.1, "amsgrad": True},
            {"maximize": True},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
        ),
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
    OptimizerInfo(
        adamax,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·m̂/max(β₂s, |g| + eps)",
        paper="Kingma & Ba",
        year=2015,
        torch_name="Adamax",
        valid=({}, {"lr": 0.1, "betas": (0.8, 0.95)}, {"weight_decay": 0.1}, {"maximize": True}),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside"),
            Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
        ),
        settles={"lr": 2e-2},
    ),
    OptimizerInfo(
        nadam,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·(μ'·m̂' + (1 − μ)·ĝ)/(√v̂ + eps)",
        paper="Dozat",
        year=2016,
        torch_name="NAdam",
        valid=(
            {},
            {"lr": 1e-3, "betas": (0.8, 0.95), "momentum_decay": 6e-3},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside"),
            Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
            Invalid({"momentum_decay": -0.2}, "momentum_decay = -0.2 is negative"),
        ),
        settles={"lr": 5e-3},
    ),
    OptimizerInfo(
        radam,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·r·m̂/(√v̂ + eps), at first p − lr·m̂",
        paper="Liu et al.",
        year=2020,
        torch_name="RAdam",
        valid=(
            {},
            {"lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-6},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            {"maximize": True},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside"),
            Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
        ),
        settles={"lr": 5e-3},
    ),
)
