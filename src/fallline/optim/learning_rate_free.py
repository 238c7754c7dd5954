"""Optimizers that estimate their own learning rate: d, how far the solution is from the start, is learnt on the way.

d is one number for all parameters, and every parameter keeps the same copy of it. What else is kept is kept relative to
d (to d² where it is quadratic in it): d begins at 10⁻⁶, whose powers half precision could not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import flag, in_interval, non_negative, pair_of_betas, positive
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import (
    Moment,
    Number,
    Numbers,
    Params,
    Slots,
    Transform,
    cast,
    initially,
    numbers_of,
)
from fallline.optim.transforms import above_zero, add_decayed_weights, mean_of_squares, square_root

# Kept by both, besides sums of their own: d, the d of the update before, and how many updates there were.
SHARED = ("d", "d_before", "updates")


@described
def scale_by_prodigy(
    lr: Number = 1.0,
    betas: tuple[Number, Number] = (0.9, 0.999),
    beta3: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: Number = 1e-6,
    d_coef: Number = 1.0,
    growth_rate: Number | None = None,
) -> Transform:
    """Prodigy's whole step, decoupled weight decay included: see `prodigy`.

    Source: Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023.
    """
    beta1, beta2 = _checked(lr, betas, eps, weight_decay, d0, growth_rate)
    if beta3 is not None:
        in_interval("beta3", beta3, 0.0, 1.0, open_high=True)
    positive("d_coef", d_coef)
    flag("use_bias_correction", use_bias_correction)
    flag("safeguard_warmup", safeguard_warmup)
    decays, limited, own_beta3 = weight_decay != 0, _limits(growth_rate), beta3 is not None

    def apply(
        updates: dict[str, Tensor], slots: Mapping[str, Slots], params: Params, n: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        if not updates:
            return updates, {}
        shared = _shared(slots, (*SHARED, "d_max", "d_numerator"))
        d, count = shared["d"], shared["updates"] + 1
        learns = n["lr"] > 0  # a schedule may begin at 0: such a step is none
        rate = n["lr"] * _bias_correction(n, count) if use_bias_correction else n["lr"]
        shrink = shared["d_before"] / d
        keep3 = torch.where(learns, n["beta3"] if own_beta3 else n["beta2"].sqrt(), 1.0) * shrink**2
        keep1 = torch.where(learns, n["beta1"], 1.0) * shrink
        keep2 = torch.where(learns, n["beta2"], 1.0) * shrink**2
        enter1, enter2 = torch.where(learns, 1 - n["beta1"], 0.0), torch.where(learns, 1 - n["beta2"], 0.0)
        enter3 = torch.where(learns, 1.0, 0.0) if safeguard_warmup else rate

        changed: dict[str, Slots] = {}
        for key, g in updates.items():
            own = slots[key]
            k1, e1, k2, e2, k3, e3 = cast(g, keep1, enter1, keep2, enter2, keep3, enter3)
            changed[key] = {
                "exp_avg": own["exp_avg"] * k1 + g * e1,
                "exp_avg_sq": mean_of_squares(own["exp_avg_sq"], g, k2, e2),
                "s": own["s"] * k3 + g * e3,
                "p0": own["p0"],
            }
        travelled = _total(_inner(g, slots[key]["p0"] - params[key]) for key, g in updates.items())
        numerator = shared["d_numerator"] * keep3 + travelled * rate
        denominator = _total(own["s"].abs().sum(dtype=torch.float64) for own in changed.values())
        moves = learns & (denominator > 0)
        d_hat = torch.where(moves, n["d_coef"] * numerator / torch.where(moves, denominator, 1.0), d)
        d_max = torch.maximum(shared["d_max"], d_hat)
        new_d = d_max
        if limited:
            unlimited = torch.where(d == n["d0"], torch.maximum(d, d_hat), d)  # the first leap is free
            new_d = torch.where(moves, torch.minimum(d_max, unlimited * n["growth_rate"]), d)

        updates_made = torch.where(moves, count, shared["updates"])
        kept = {"d": new_d, "d_before": d, "updates": updates_made, "d_max": d_max, "d_numerator": numerator}
        size = torch.where(moves, -rate * d, 0.0)
        steps = {}
        for key, own in changed.items():
            u = _scaled(own["exp_avg"], own["exp_avg_sq"], numbers_of(n, key)["eps"] * (new_d / d))
            steps[key] = _step(u, params[key], size, numbers_of(n, key)["weight_decay"] if decays else None)
            own.update(kept)
        return steps, changed

    numbers: dict[str, Number] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "d0": d0, "d_coef": d_coef}
    numbers |= {"weight_decay": weight_decay} if decays else {}
    numbers |= {"growth_rate": growth_rate} if growth_rate is not None and limited else {}
    numbers |= {"beta3": beta3} if beta3 is not None else {}

    def initial(p: Tensor, n: Numbers) -> Slots:
        return {"p0": p.clone(), "d_max": _scalar(p, n["d0"]), "d_numerator": _scalar(p), **_start(p, n)}

    names = ("exp_avg", "exp_avg_sq", "s", "p0", *SHARED, "d_max", "d_numerator")
    return Transform("scale_by_prodigy", numbers, apply, names, initially(names, initial), together=True)


@described
def scale_by_d_adaptation(
    lr: Number = 1.0,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    use_bias_correction: bool = False,
    d0: Number = 1e-6,
    growth_rate: Number | None = None,
) -> Transform:
    """The whole step of Adam with D-Adaptation, decoupled weight decay included: see `d_adaptation`.

    Source: Defazio and Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023.
    """
    beta1, beta2 = _checked(lr, betas, eps, weight_decay, d0, growth_rate)
    flag("use_bias_correction", use_bias_correction)
    decays, limited = weight_decay != 0, _limits(growth_rate)

    def apply(
        updates: dict[str, Tensor], slots: Mapping[str, Slots], params: Params, n: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        if not updates:
            return updates, {}
        shared = _shared(slots, (*SHARED, "numerator_weighted"))
        d, count = shared["d"], shared["updates"] + 1
        learns = n["lr"] > 0
        rate = n["lr"] * _bias_correction(n, count) if use_bias_correction else n["lr"]
        shrink = shared["d_before"] / d
        root = n["beta2"].sqrt()
        keep1, enter1 = torch.where(learns, n["beta1"], 1.0) * shrink, (1 - n["beta1"]) * rate
        keep2, enter2 = torch.where(learns, n["beta2"], 1.0), torch.where(learns, 1 - n["beta2"], 0.0)
        keep3, enter3 = torch.where(learns, root, 1.0) * shrink, (1 - root) * rate

        changed: dict[str, Slots] = {}
        overlaps = []
        for key, g in updates.items():
            own = slots[key]
            k1, e1, k2, e2, k3, e3, relative = cast(g, keep1, enter1, keep2, enter2, keep3, enter3, shrink)
            overlaps.append(_inner(g, _scaled(own["s"] * relative, own["exp_avg_sq"], numbers_of(n, key)["eps"])))
            changed[key] = {
                "exp_avg": own["exp_avg"] * k1 + g * e1,
                "exp_avg_sq": mean_of_squares(own["exp_avg_sq"], g, k2, e2),
                "s": own["s"] * k3 + g * e3,
            }
        numerator = shared["numerator_weighted"] * shrink * keep3 + _total(overlaps) * enter3
        denominator = _total(own["s"].abs().sum(dtype=torch.float64) for own in changed.values())
        moves = learns & (denominator > 0)
        d_hat = torch.where(moves, d * numerator / torch.where(moves, (1 - root) * denominator, 1.0), d)
        new_d = torch.maximum(d, torch.minimum(d_hat, d * n["growth_rate"]) if limited else d_hat)

        kept = {"d": new_d, "d_before": d, "updates": torch.where(moves, count, shared["updates"])}
        kept["numerator_weighted"] = numerator
        size = torch.where(moves, -d, 0.0)
        steps = {}
        for key, own in changed.items():
            u = _scaled(own["exp_avg"], own["exp_avg_sq"], numbers_of(n, key)["eps"])
            steps[key] = _step(u, params[key], size, numbers_of(n, key)["weight_decay"] * rate if decays else None)
            own.update(kept)
        return steps, changed

    numbers: dict[str, Number] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "d0": d0}
    numbers |= {"weight_decay": weight_decay} if decays else {}
    numbers |= {"growth_rate": growth_rate} if growth_rate is not None and limited else {}

    def initial(p: Tensor, n: Numbers) -> Slots:
        return {"numerator_weighted": _scalar(p), **_start(p, n)}

    names = ("exp_avg", "exp_avg_sq", "s", *SHARED, "numerator_weighted")
    return Transform("scale_by_d_adaptation", numbers, apply, names, initially(names, initial), together=True)


@described
def prodigy(
    lr: Number = 1.0,
    betas: tuple[Number, Number] = (0.9, 0.999),
    beta3: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decouple: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: Number = 1e-6,
    d_coef: Number = 1.0,
    growth_rate: Number | None = None,
) -> Optimizer:
    """Adam that finds its learning rate d: p ← p − lr · d · (m/(√v + d · eps) + weight_decay · p).

    m = β₁m + (1 − β₁)d · g, v = β₂v + (1 − β₂)d²g². The distance to the solution is estimated from how far the
    parameters have come from their start p₀ along the gradients, one number for all parameters:
    d̂ = d_coef · r / ‖s‖₁ with r = β₃r + lr · d²⟨g, p₀ − p⟩ and s = β₃s + lr · d²g. d is the largest d̂ so far.

    Args:
        lr: multiplies d, at least 0; 1 unless training is unstable. A schedule on it is an ordinary one.
        betas: decay rates of m and v, each in [0, 1).
        beta3: decay rate of r and s, in [0, 1); √β₂ if left out.
        eps: added to the denominator, above 0.
        weight_decay: at least 0.
        decouple: weight decay as in `adamw`; if not, it is part of the gradient.
        use_bias_correction: Adam's bias corrections.
        safeguard_warmup: leaves lr out of s, so that d is not overestimated during a warm-up of lr.
        d0: the d to begin with, above 0 and below what d is to become.
        d_coef: multiplies d̂, above 0: the way to tune it.
        growth_rate: at most so many times larger does d get from one update to the next, after its first leap from
            d0; at least 1, None for no limit.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> prodigy(weight_decay=0.01)
    fl.optim.prodigy(lr=1.0, weight_decay=0.01)

    Source: Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023. Equal to the
    authors' `prodigyopt.Prodigy` with slice_p = 1, except for β₁ = 0: there the package has the new d in m, where the
    paper, and both of them for any other β₁, have the d of before. With parameter groups, eps and weight_decay may
    differ between them; there lr may be 0 in some, here it is one number. A step with lr = 0, or before the first
    gradient that is not 0, changes nothing. Steps of 10⁻⁶ are lost in half-precision parameters: begin with a larger
    d0 there.
    """
    flag("decouple", decouple)
    non_negative("weight_decay", weight_decay)
    return chain(
        *_coupled(weight_decay, decouple),
        scale_by_prodigy(
            lr,
            betas,
            beta3,
            eps,
            weight_decay if decouple else 0.0,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
        ),
    )


@described
def d_adaptation(
    lr: Number = 1.0,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decouple: bool = False,
    use_bias_correction: bool = False,
    d0: Number = 1e-6,
    growth_rate: Number | None = None,
) -> Optimizer:
    """Adam with D-Adaptation: p ← p − m/(√v + eps), where the learning rate lr · d is inside of m.

    m = β₁m + (1 − β₁)lr · d · g, v = β₂v + (1 − β₂)g². d is a lower bound of the distance to the solution, one number
    for all parameters: d ← max(d, r / ((1 − √β₂)‖s‖₁)) with s = √β₂s + (1 − √β₂)lr · d · g and
    r = √β₂r + (1 − √β₂)lr · d⟨g, s/(√v + eps)⟩, where s and v are those before this update.

    Args:
        lr: multiplies d, at least 0; 1 unless training is unstable. A schedule on it is an ordinary one.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the denominator, above 0.
        weight_decay: at least 0.
        decouple: weight decay as in `adamw`; if not, it is part of the gradient.
        use_bias_correction: Adam's bias corrections.
        d0: the d to begin with, above 0 and below what d is to become.
        growth_rate: at most so many times larger does d get from one update to the next, at least 1; None for no limit.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> d_adaptation(growth_rate=1.02)
    fl.optim.d_adaptation(lr=1.0, growth_rate=1.02)

    Source: Defazio and Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023. Equal to the authors'
    `dadaptation.DAdaptAdam`. With parameter groups, eps and weight_decay may differ between them; there lr may be 0 in
    some, here it is one number. A step with lr = 0, or before the first gradient that is not 0, changes nothing.
    """
    flag("decouple", decouple)
    non_negative("weight_decay", weight_decay)
    return chain(
        *_coupled(weight_decay, decouple),
        scale_by_d_adaptation(
            lr,
            betas,
            eps,
            weight_decay if decouple else 0.0,
            use_bias_correction=use_bias_correction,
            d0=d0,
            growth_rate=growth_rate,
        ),
    )


def _checked(
    lr: Number, betas: object, eps: Number, weight_decay: Number, d0: Number, growth_rate: Number | None
) -> tuple[Number, Number]:
    """The two betas, when all of these are in their domains."""
    non_negative("lr", lr)
    positive("eps", eps)
    non_negative("weight_decay", weight_decay)
    positive("d0", d0)
    if _limits(growth_rate):
        in_interval("growth_rate", growth_rate, 1.0, math.inf)
    return pair_of_betas(betas)


def _limits(growth_rate: Number | None) -> bool:
    return growth_rate is not None and growth_rate != math.inf


def _coupled(weight_decay: Number, decouple: bool) -> list[Transform]:
    return [] if decouple or weight_decay == 0 else [add_decayed_weights(weight_decay)]


def _bias_correction(n: Numbers, count: Tensor) -> Tensor:
    return (1 - n["beta2"] ** count).sqrt() / (1 - n["beta1"] ** count)


def _start(p: Tensor, n: Numbers) -> Slots:
    return {"d": _scalar(p, n["d0"]), "d_before": _scalar(p, n["d0"]), "updates": _scalar(p)}


def _scalar(p: Tensor, value: Tensor | None = None) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=p.device)
    return zero if value is None else zero + value


def _shared(slots: Mapping[str, Slots], names: tuple[str, ...]) -> Slots:
    """The numbers that belong to all parameters, from the one updated most: others may have had no gradient."""
    every = list(slots.values())
    latest = torch.stack([own["updates"] for own in every]).argmax().unsqueeze(0)
    return {name: torch.stack([own[name] for own in every]).gather(0, latest).squeeze(0) for name in names}


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ in float64, of products that half precision does not round."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dtype=torch.float64)


def _scaled(m: Tensor, v: Tensor, eps: Tensor) -> Tensor:
    """m / (√v + eps), where half precision may not round eps to 0."""
    (floor,) = cast(v, above_zero(v, eps))
    return m / (square_root(v) + floor)


def _step(u: Tensor, p: Tensor, size: Tensor, decay: Tensor | None) -> Tensor:
    if decay is None:
        return u * size.to(u.dtype)
    return (u + p * decay.to(p.dtype)) * size.to(u.dtype)


CATALOGUE = (
    OptimizerInfo(
        prodigy,
        learning_rates=(0.1, 10.0),
        formula="p − lr·d·m/(√v + d·eps), d = max d_coef·Σ⟨g, p₀ − p⟩/‖Σg‖₁",
        paper="Mishchenko & Defazio",
        year=2023,
        valid=(
            {},
            {"d0": 1e-3, "weight_decay": 0.1, "use_bias_correction": True},
            {"d0": 1e-3, "weight_decay": 0.1, "decouple": False, "safeguard_warmup": True, "beta3": 0.9},
            {"d0": 1e-3, "betas": (0.8, 0.95), "growth_rate": 1.1, "d_coef": 0.5},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
            Invalid({"beta3": 1.0}, "beta3 = 1.0 is outside"),
            Invalid({"eps": 0.0}, "eps = 0.0 is not above 0"),
            Invalid({"d0": 0.0}, "d0 = 0.0 is not above 0"),
            Invalid({"d_coef": 0.0}, "d_coef = 0.0 is not above 0"),
            Invalid({"growth_rate": 0.5}, "growth_rate = 0.5 is outside"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
        ),
        settles={"d0": 1e-3},
    ),
    OptimizerInfo(
        d_adaptation,
        learning_rates=(0.1, 10.0),
        formula="p − m/(√v + eps), m of lr·d·g, d = max of lower bounds of the distance",
        paper="Defazio & Mishchenko",
        year=2023,
        valid=(
            {},
            {"d0": 1e-3, "weight_decay": 0.1, "use_bias_correction": True},
            {"d0": 1e-3, "weight_decay": 0.1, "decouple": True},
            {"d0": 1e-3, "betas": (0.8, 0.95), "growth_rate": 1.1},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
            Invalid({"eps": 0.0}, "eps = 0.0 is not above 0"),
            Invalid({"d0": 0.0}, "d0 = 0.0 is not above 0"),
            Invalid({"growth_rate": 0.5}, "growth_rate = 0.5 is outside"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
        ),
        settles={"d0": 1e-3},
    ),
)
