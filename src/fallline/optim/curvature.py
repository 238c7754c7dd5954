"""Optimizers that look at the loss around the parameters: at a second gradient (SAM), at its curvature (Sophia)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.adam_family import adam
from fallline.optim.around import around, combinator, inner_optimizer
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, non_negative, pair_of_betas, positive, whole
from fallline.optim.gradient_descent import sgd
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.random import CURVATURE, rademacher
from fallline.optim.transform import (
    Moment,
    Number,
    Numbers,
    Params,
    Slots,
    Stage,
    Transform,
    cast,
    initially,
)
from fallline.optim.transforms import above_zero, decay, scale_by_learning_rate


@combinator
def sam(optimizer: Optimizer, rho: Number = 0.05, adaptive: bool = False, eta: Number = 0.01) -> Transform:
    """Sharpness-aware minimisation: the optimizer's step at p, with the gradient at p + rho · g / ‖g‖.

    ‖·‖ is the Euclidean norm over all parameters. With `adaptive` the ascent is measured in units of the weights:
    p + rho · s²g / ‖sg‖, s = |p| + eta. Every step evaluates the gradient twice. What the optimizer does to gradients
    (clipping, weight decay, momentum) it does to the second one.

    Args:
        optimizer: makes the step.
        rho: how far uphill the second gradient is taken, at least 0.
        adaptive: ASAM; the paper then takes a rho about ten times larger.
        eta: with `adaptive`, added to the size of a weight, at least 0.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> from fallline.optim import sgd
    >>> sam(sgd(lr=0.1, momentum=0.9), rho=0.1)
    fl.optim.sam(optimizer=fl.optim.sgd(lr=0.1, momentum=0.9), rho=0.1)

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021, with p = 2;
    Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    2021. Here s is that of all parameters; the authors' code of ASAM takes 1 for biases.
    """
    inner = inner_optimizer("sam", optimizer)
    non_negative("rho", rho)
    flag("adaptive", adaptive)
    non_negative("eta", eta)

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        if updates:
            assert moment.landscape is not None
            uphill = moment.landscape.gradient(_ascended(updates, params, n))
            updates = {name: uphill[name] for name in updates if name in uphill}
        return parts[0].apply(updates, slots, params, n, moment)

    def _ascended(grads: Mapping[str, Tensor], params: Params, n: Numbers) -> dict[str, Tensor]:
        directions, lengths = dict(grads), dict(grads)
        if adaptive:
            scales = {name: params[name].abs() + n["eta"].to(g.dtype) for name, g in grads.items()}
            lengths = {name: g * scales[name] for name, g in grads.items()}
            directions = {name: g * scales[name] for name, g in lengths.items()}
        norm = torch.stack([g.to(torch.float64).square().sum() for g in lengths.values()]).sum().sqrt()
        distance = n["rho"] / (norm + 1e-12)  # as in the authors' code: no way up where there is no gradient
        return {name: params[name] + g * distance.to(g.dtype) for name, g in directions.items()}

    numbers = {"rho": rho, **({"eta": eta} if adaptive else {})}
    return around("sam", [inner], apply, numbers, elementwise=False, together=True, surveys=lambda step: True)


@described
def scale_by_sophia(
    betas: tuple[Number, Number] = (0.965, 0.99),
    gamma: Number = 0.01,
    eps: Number = 1e-12,
    update_period: int = 10,
) -> Transform:
    """Sophia's direction: m / max(gamma · h, eps), each element clipped to [−1, 1].

    m = β₁m + (1 − β₁)g. At the first step and every `update_period` steps after it, h = β₂h + (1 − β₂) u · (Hu), where
    H is the Hessian of the mini-batch's loss, u holds −1 and 1 at random and · is taken element by element
    (Hutchinson's estimate of H's diagonal). Where h is not positive, the direction is the sign of m.

    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", 2023.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("gamma", gamma)
    positive("eps", eps)
    whole("update_period", update_period)

    def apply(
        updates: dict[str, Tensor], slots: Mapping[str, Slots], params: Params, n: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        curvatures = {name: slots[name]["hessian"] for name in updates}
        if updates and moment.landscape is not None:
            signs = {
                name: rademacher(params[name], slots[name]["seed"], slots[name]["step"], CURVATURE) for name in updates
            }
            products = moment.landscape.curvature(signs)
            for name, mean in curvatures.items():
                (enter,) = cast(mean, 1 - n["beta2"])
                curvatures[name] = torch.lerp(mean, signs[name] * products[name], enter)
        directions, changed = {}, {}
        for name, g in updates.items():
            enter, floor, scale = cast(g, 1 - n["beta1"], above_zero(g, n["eps"]), n["gamma"])
            exp_avg = torch.lerp(slots[name]["exp_avg"], g, enter)
            bent = torch.maximum(curvatures[name] * scale, floor)
            directions[name] = torch.clamp(exp_avg / bent, -1, 1)
            changed[name] = {"exp_avg": exp_avg, "hessian": curvatures[name]}
        return directions, changed

    names = ("exp_avg", "hessian")
    numbers = {"beta1": beta1, "beta2": beta2, "gamma": gamma, "eps": eps}
    return Transform(
        "scale_by_sophia", numbers, apply, names, initially(names, None),
        counts=True, draws=True, together=True, surveys=lambda step: step % update_period == 0,
        curves=True,
    )  # fmt: skip


@described
def sophia(
    lr: Number = 1e-4,
    betas: tuple[Number, Number] = (0.965, 0.99),
    gamma: Number = 0.01,
    eps: Number = 1e-12,
    weight_decay: Number = 0.1,
    update_period: int = 10,
) -> Optimizer:
    """Sophia-H: p ← p − lr · (clip(m / max(gamma · h, eps), 1) + weight_decay · p), h the Hessian's estimated diagonal.

    Every `update_period`-th step also computes a Hessian-vector product, about the price of two more gradients.

    Args:
        lr: learning rate, at least 0: the largest change of an element per step, decay apart.
        betas: decay rates of the running means of the gradient and of the Hessian's diagonal, each in [0, 1).
        gamma: at least 0; the smaller, the more elements are clipped.
        eps: the least denominator, above 0.
        weight_decay: at least 0, decoupled.
        update_period: how many steps one estimate of the curvature serves.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> sophia(lr=0.001, gamma=0.05)
    fl.optim.sophia(lr=0.001, gamma=0.05)

    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", 2023,
    algorithm 3 with its estimator 1 (Hutchinson). Estimator 2 (Gauss-Newton-Bartlett) samples labels from the model's
    own predictions and squares the gradients of their loss: it needs no Hessian-vector product and is never negative,
    but it is defined for classification with a likelihood only. Hutchinson's works with every loss, so it is the one
    taken here. Its u are −1 and 1, which estimate the diagonal with less variance than the paper's normal numbers. The
    paper's own settings are gamma 0.01 and weight_decay 0.2 with betas (0.96, 0.99); these are those of its code.
    """
    return chain(
        scale_by_sophia(betas, gamma, eps, update_period),
        *decay(weight_decay),
        scale_by_learning_rate(lr),
    )


CATALOGUE = (
    OptimizerInfo(
        sam,
        learning_rates=(1e-3, 10.0),
        formula="an optimizer's step, with the gradient at p + rho·g/‖g‖",
        paper="Foret et al.",
        year=2021,
        valid=(
            {"optimizer": sgd(lr=1e-2)},
            {"optimizer": sgd(lr=1e-2, momentum=0.9, weight_decay=0.1), "rho": 0.2},
            {"optimizer": sgd(lr=1e-2, momentum=0.9), "rho": 0.5, "adaptive": True},
            {"optimizer": adam(lr=1e-2), "rho": 0.5, "adaptive": True, "eta": 0.1},
        ),
        invalid=(
            Invalid({"optimizer": sgd(), "rho": -0.1}, "rho = -0.1 is negative"),
            Invalid({"optimizer": sgd(), "adaptive": True, "eta": -1.0}, "eta = -1.0 is negative"),
        ),
        settles={"optimizer": sgd(lr=1e-3, momentum=0.9), "rho": 1e-7},
    ),
    OptimizerInfo(
        sophia,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·(clip(m/max(gamma·h, eps), 1) + wd·p)",
        paper="Liu et al.",
        year=2023,
        valid=(
            {"lr": 1e-2},
            {"lr": 1e-2, "betas": (0.8, 0.5), "gamma": 1.0, "update_period": 1},
            {"lr": 1e-2, "weight_decay": 0.0, "update_period": 3},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
            Invalid({"gamma": -1.0}, "gamma = -1.0 is negative"),
            Invalid({"eps": 0.0}, "eps = 0.0 is not above 0"),
            Invalid({"update_period": 0}, "update_period = 0 is below 1"),
            Invalid({"update_period": 2.5}, "update_period = 2.5 is not a whole number", TypeError),
        ),
        settles={"lr": 1e-2, "weight_decay": 0.0},
    ),
)
