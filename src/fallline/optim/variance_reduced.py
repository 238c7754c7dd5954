"""Gradients made less noisy by what the step before knew, then scaled as usual."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import WrongType, flag, in_interval, non_negative, pair_of_betas
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.layerwise import norm
from fallline.optim.transform import (
    Grouped,
    Moment,
    Number,
    Numbers,
    Params,
    Slots,
    Transform,
    cast,
    initially,
    per_tensor,
)
from fallline.optim.transforms import above_zero, decay, mean_of_squares, negate, scale_by_learning_rate, square_root


@described
def scale_by_mars(
    betas: tuple[Number, Number] = (0.95, 0.99),
    eps: Number = 1e-8,
    gamma: Number = 0.025,
    betas_1d: tuple[Number, Number] = (0.9, 0.95),
    *,
    amsgrad: bool = False,
    approximate: bool = True,
    optimize_1d: bool = False,
) -> Transform:
    """MARS-AdamW's direction: m̂ / (√v̂ + eps), Adam's of c = g + γ · β₁/(1 − β₁) · (g − h), shortened to a norm of 1.

    m = β₁m + (1 − β₁)c, v = β₂v + (1 − β₂)c², m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ); with amsgrad, v̂ is made of the
    largest v so far. h is what came in at the step before; with approximate=False, the gradient of the present
    mini-batch at the parameters of the step before, which no stage before this one changes. ‖c‖ is taken over each
    parameter tensor, in float64. Unless optimize_1d, parameters of fewer than two dimensions have c = g, not shortened,
    and betas_1d.

    Source: Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models", 2024.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)
    non_negative("gamma", gamma)
    if not isinstance(betas_1d, tuple) or len(betas_1d) != 2:
        raise WrongType(f"betas_1d = {betas_1d!r} is not a pair: give (beta1, beta2).")
    for index, beta in enumerate(betas_1d):
        in_interval(f"betas_1d{index + 1}", beta, 0.0, 1.0, open_high=True)
    for name, value in (("amsgrad", amsgrad), ("approximate", approximate), ("optimize_1d", optimize_1d)):
        flag(name, value)

    last = "last_grad" if approximate else "last_parameter"

    def reduced(p: Tensor) -> bool:
        return optimize_1d or p.dim() >= 2

    def rule(g: Tensor, h: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        beta1, beta2 = (n["beta1"], n["beta2"]) if reduced(p) else (n["betas_1d1"], n["betas_1d2"])
        correction1 = 1 - beta1**step
        root_correction2 = (1 - beta2**step).sqrt()
        enter1, keep2, enter2 = cast(g, 1 - beta1, beta2, 1 - beta2)
        stretch, floor = cast(g, correction1 / root_correction2, above_zero(g, n["eps"] * correction1))
        c = g
        if reduced(p):
            (strength,) = cast(g, n["gamma"] * beta1 / (1 - beta1))
            c = g + (g - h) * strength
            (shrink,) = cast(g, 1 / torch.clamp(norm(c), min=1.0))
            c = c * shrink
        exp_avg = torch.lerp(slots["exp_avg"], c, enter1)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], c, keep2, enter2)
        changed = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if amsgrad:
            exp_avg_sq = changed["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], exp_avg_sq)
        return exp_avg / (square_root(exp_avg_sq) * stretch + floor), changed

    def apply(
        updates: dict[str, Tensor], state: Mapping[str, Slots], params: Params, n: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        others = [name for name in updates if reduced(params[name])]
        if approximate:
            before = {name: state[name]["last_grad"] for name in others}
        else:
            assert moment.landscape is not None
            # At the first step there are no parameters before; at the present ones the difference is 0.
            places = {
                name: torch.where(state[name]["step"] == 1, params[name], state[name]["last_parameter"])
                for name in others
            }
            before = moment.landscape.gradient(places) if places else {}
        new, changed = {}, {}
        for name, g in updates.items():
            own = n.of(name) if isinstance(n, Grouped) else n
            new[name], changed[name] = rule(g, before.get(name, g), state[name], params[name], own)
            if name in before:
                changed[name][last] = g if approximate else params[name]
        return new, changed

    def initial(p: Tensor, n: Numbers) -> Mapping[str, Tensor | None]:
        return {} if reduced(p) else {last: None}

    slots = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []), last)
    return Transform(
        "scale_by_mars",
        {
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "gamma": gamma,
            "betas_1d1": betas_1d[0],
            "betas_1d2": betas_1d[1],
        },
        apply,
        slots,
        initially(slots, initial),
        counts=True,
        surveys=None if approximate else (lambda step: True),
    )


@described
def mars(
    lr: Number = 3e-3,
    betas: tuple[Number, Number] = (0.95, 0.99),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    gamma: Number = 0.025,
    approximate: bool = True,
    optimize_1d: bool = False,
    lr_1d: Number = 3e-3,
    betas_1d: tuple[Number, Number] = (0.9, 0.95),
    weight_decay_1d: Number = 0.1,
    *,
    maximize: bool = False,
) -> Optimizer:
    """MARS-AdamW: AdamW on c = g + γ · β₁/(1 − β₁) · (g − h), shortened to ‖c‖ ≤ 1; p ← p − lr(m̂/(√v̂+eps) + wd·p).

    h is the gradient of the step before, or with approximate=False the gradient of the present mini-batch at the
    parameters of the step before, which takes a second gradient per step. Without optimize_1d, parameters of fewer than
    two dimensions (biases, scales of normalisations) are trained by AdamW with numbers of their own, whose names end
    in _1d.

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, decoupled.
        amsgrad: divide by the largest second moment so far.
        gamma: how much of the change of the gradient is corrected for, at least 0.
        approximate: take the gradient of the step before for h.
        optimize_1d: train all parameters by MARS; lr_1d, betas_1d and weight_decay_1d then do nothing.
        lr_1d: learning rate of parameters of fewer than two dimensions, at least 0; it does not move with lr.
        betas_1d: their decay rates, each in [0, 1).
        weight_decay_1d: their weight decay, at least 0.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> mars(lr=0.006, optimize_1d=True)
    fl.optim.mars(lr=0.006, optimize_1d=True)

    Source: Yuan et al., "MARS: Unleashing the Power of Variance Reduction for Training Large Models", 2024. torch has
    none. Defaults and the approximate form as in the authors' code (approximate is its is_approx): at the first step h
    is 0, so that c = (1 + γβ₁/(1 − β₁)) g. In the exact form c = g at the first step, as in the paper. The authors'
    code has its own numbers for all parameters but matrices; here convolutions' kernels count as matrices. There a
    schedule of the learning rate moves lr_1d, too; here give lr_1d a schedule of its own.
    """
    if optimize_1d:
        non_negative("lr_1d", lr_1d)
        non_negative("weight_decay_1d", weight_decay_1d)
        after = [*decay(weight_decay), scale_by_learning_rate(lr)]
    else:
        after = [_step_by_dimension(lr, weight_decay, lr_1d, weight_decay_1d)]
    flag("maximize", maximize)
    return chain(
        scale_by_mars(betas, eps, gamma, betas_1d, amsgrad=amsgrad, approximate=approximate, optimize_1d=optimize_1d),
        # After the direction, because h of the exact form is a gradient downhill; the direction is odd in g and h.
        *([negate()] if maximize else []),
        *after,
    )


@described
def _step_by_dimension(lr: Number, weight_decay: Number, lr_1d: Number, weight_decay_1d: Number) -> Transform:
    """A step downhill with decoupled weight decay, with other numbers for parameters of fewer than two dimensions."""
    numbers = {"lr": lr, "weight_decay": weight_decay, "lr_1d": lr_1d, "weight_decay_1d": weight_decay_1d}
    for name, value in numbers.items():
        non_negative(name, value)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        kind = "" if p.dim() >= 2 else "_1d"
        decay, size = cast(g, n[f"weight_decay{kind}"], -n[f"lr{kind}"])
        return (g + p * decay) * size, {}

    return per_tensor("step_by_dimension", rule, numbers)


CATALOGUE = (
    OptimizerInfo(
        mars,
        learning_rates=(1e-5, 1e-1),
        formula="AdamW on c = g + γ·β₁/(1−β₁)·(g − g₋₁), ‖c‖ ≤ 1",
        paper="Yuan et al.",
        year=2024,
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, "amsgrad": True},
            {"optimize_1d": True, "gamma": 0.1},
            {"weight_decay_1d": 0.0, "lr_1d": 1e-2, "maximize": True},
            {"weight_decay_1d": 0.0, "approximate": False},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside"),
            Invalid({"betas_1d": (1.0, 0.0)}, "betas_1d1 = 1.0 is outside"),
            Invalid({"gamma": -1.0}, "gamma = -1.0 is negative"),
            Invalid({"lr_1d": -1.0}, "lr_1d = -1.0 is negative"),
        ),
        settles={"lr": 2e-2, "optimize_1d": True},
        decays=("weight_decay", "weight_decay_1d"),
    ),
)
