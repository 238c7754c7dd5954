"""Descendants of Adam that change one of its means: what is averaged, how it is, or how many means there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import WrongType, flag, in_interval, non_negative, pair_of_betas
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import above_zero, decay, incoming, mean_of_squares, scale_by_learning_rate, square_root


@described
def scale_by_adabelief(
    betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-16, *, amsgrad: bool = False
) -> Transform:
    """AdaBelief's direction: m̂ / (√ŝ + eps).

    m = β₁m + (1 − β₁)g, s = β₂s + (1 − β₂)(g − m)² + eps, m̂ = m/(1 − β₁ᵗ), ŝ = s/(1 − β₂ᵗ); with amsgrad, ŝ is made
    of the largest s so far. The eps inside s is part of the state, so that it builds up to eps/(1 − β₂).

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", 2020,
    algorithm 2. Arithmetic as in the authors' code without rectification.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)
    flag("amsgrad", amsgrad)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        correction1 = 1 - n["beta1"] ** step
        root_correction2 = (1 - n["beta2"] ** step).sqrt()
        enter1, keep2, enter2, eps = cast(g, 1 - n["beta1"], n["beta2"], 1 - n["beta2"], n["eps"])
        stretch, floor = cast(g, correction1 / root_correction2, above_zero(g, n["eps"] * correction1))
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_var = mean_of_squares(slots["exp_avg_var"], g - exp_avg, keep2, enter2) + eps
        changed = {"exp_avg": exp_avg, "exp_avg_var": exp_avg_var}
        if amsgrad:
            exp_avg_var = changed["max_exp_avg_var"] = torch.maximum(slots["max_exp_avg_var"], exp_avg_var)
        return exp_avg / (square_root(exp_avg_var) * stretch + floor), changed

    slots = ["exp_avg", "exp_avg_var", *(["max_exp_avg_var"] if amsgrad else [])]
    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
    return per_tensor("scale_by_adabelief", rule, numbers, slots=slots, counts=True, elementwise=True)


@described
def adabelief(
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-16,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """AdaBelief: p ← p − lr · (m̂/(√ŝ + eps) + weight_decay · p), where s is the running mean of (g − m)².

    Long steps where the gradient is what its running mean foretold, short ones where it is not.

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the two running means, each in [0, 1).
        eps: at least 0; added to the denominator, and at each step to s.
        weight_decay: at least 0, decoupled.
        amsgrad: divide by the largest s so far.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adabelief(lr=0.01)
    fl.optim.adabelief(lr=0.01)

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", 2020. torch
    has none. The authors' code rectifies early steps as RAdam does, by default since its version 0.2; the paper's
    algorithm does not, nor does this. Rounded to float32, eps = 1e-16 still counts; in half precision give a larger.
    """
    return chain(
        *incoming(0.0, maximize),
        scale_by_adabelief(betas, eps, amsgrad=amsgrad),
        *decay(weight_decay),
        scale_by_learning_rate(lr),
    )


@described
def scale_by_yogi(
    betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-3, initial_accumulator: Number = 1e-6
) -> Transform:
    """Yogi's direction: m̂ / (√v̂ + eps).

    m = β₁m + (1 − β₁)g, v = v − (1 − β₂) sign(v − g²) g², m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ), v₀ = initial_accumulator.
    Where g² is far below v, v shrinks by g² and not by v as in Adam, so that rare gradients do not find it forgotten.

    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization", 2018, algorithm 2, with Adam's bias
    corrections as in TensorFlow Addons.
    """
    beta1, beta2 = pair_of_betas(betas)
    non_negative("eps", eps)
    non_negative("initial_accumulator", initial_accumulator)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        correction1 = 1 - n["beta1"] ** step
        root_correction2 = (1 - n["beta2"] ** step).sqrt()
        enter1, enter2 = cast(g, 1 - n["beta1"], 1 - n["beta2"])
        stretch, floor = cast(g, correction1 / root_correction2, above_zero(g, n["eps"] * correction1))
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        square = g * g
        exp_avg_sq = slots["exp_avg_sq"] - torch.sign(slots["exp_avg_sq"] - square) * (square * enter2)
        update = exp_avg / (square_root(exp_avg_sq) * stretch + floor)
        return update, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def initial(p: Tensor, n: Numbers) -> Slots:
        return {"exp_avg_sq": torch.zeros_like(p) + n["initial_accumulator"].to(p.dtype)}

    numbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "initial_accumulator": initial_accumulator}
    slots = ["exp_avg", "exp_avg_sq"]
    return per_tensor("scale_by_yogi", rule, numbers, slots=slots, initial=initial, counts=True, elementwise=True)


@described
def yogi(
    lr: Number = 1e-2,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-3,
    weight_decay: Number = 0.0,
    initial_accumulator: Number = 1e-6,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Yogi: p ← p − lr · m̂/(√v̂ + eps), where v moves towards g² by at most (1 − β₂)g².

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the mean, and of how far v moves; each in [0, 1).
        eps: added to the denominator, at least 0; far larger than Adam's, as the paper advises.
        weight_decay: at least 0, coupled: passes through the scaling.
        initial_accumulator: v before the first step, at least 0.
        maximize: go uphill.

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> yogi(lr=0.003)
    fl.optim.yogi(lr=0.003)

    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization", 2018. torch has none. The paper's algorithm
    has no bias corrections; the version in TensorFlow Addons has them, and so has this, but eps is added to √v̂ as in
    Adam, there to √v. Some versions (optax, pytorch_optimizer) also start the running mean of the gradients at
    initial_accumulator, by which zero gradients move parameters; here it starts at 0, as in the paper.
    """
    return chain(
        *incoming(weight_decay, maximize),
        scale_by_yogi(betas, eps, initial_accumulator),
        scale_by_learning_rate(lr),
    )


@described
def scale_by_adan(betas: tuple[Number, Number, Number] = (0.98, 0.92, 0.99), eps: Number = 1e-8) -> Transform:
    """Adan's direction: (m̂ + β₂d̂) / (√n̂ + eps).

    δ = g − g₋₁ (0 at the first step), m = β₁m + (1 − β₁)g, d = β₂d + (1 − β₂)δ, n = β₃n + (1 − β₃)(g + β₂δ)², each
    corrected for its start at zero by 1 − βᵗ.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", 2022,
    algorithm 1. As in the authors' code, these betas are one minus the paper's.
    """
    beta1, beta2, beta3 = _three_betas(betas)
    non_negative("eps", eps)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        correction1 = 1 - n["beta1"] ** step
        correction2 = 1 - n["beta2"] ** step
        root_correction3 = (1 - n["beta3"] ** step).sqrt()
        enter1, enter2, keep3, enter3 = cast(g, 1 - n["beta1"], 1 - n["beta2"], n["beta3"], 1 - n["beta3"])
        beta2, share = cast(g, n["beta2"], n["beta2"] * correction1 / correction2)
        stretch, floor = cast(g, correction1 / root_correction3, above_zero(g, n["eps"] * correction1))
        difference = g - torch.where(step == 1, g, slots["previous_grad"])
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_diff = torch.lerp(slots["exp_avg_diff"], difference, enter2)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g + difference * beta2, keep3, enter3)
        update = (exp_avg + exp_avg_diff * share) / (square_root(exp_avg_sq) * stretch + floor)
        return update, {
            "exp_avg": exp_avg,
            "exp_avg_diff": exp_avg_diff,
            "exp_avg_sq": exp_avg_sq,
            "previous_grad": g,
        }

    numbers = {"beta1": beta1, "beta2": beta2, "beta3": beta3, "eps": eps}
    slots = ["exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"]
    return per_tensor("scale_by_adan", rule, numbers, slots=slots, counts=True, elementwise=True)


@described
def scale_by_proximal_learning_rate(lr: Number, weight_decay: Number) -> Transform:
    """A step downhill, then shrunk: u = (p − lr · g)/(1 + lr · weight_decay) − p.

    This is the exact minimum of g·x + |x − p|²/(2 lr) + ½ · weight_decay · |x|², and so decays weights however large lr
    · weight_decay is, where decoupled decay would overshoot zero.

    Args:
        lr: the learning rate, at least 0.
        weight_decay: at least 0.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", 2022.
    """
    non_negative("lr", lr)
    non_negative("weight_decay", weight_decay)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        decay, size = cast(g, n["weight_decay"], -n["lr"] / (1 + n["lr"] * n["weight_decay"]))
        return (g + p * decay) * size, {}

    numbers = {"lr": lr, "weight_decay": weight_decay}
    return per_tensor("scale_by_proximal_learning_rate", rule, numbers, elementwise=True)


@described
def adan(
    lr: Number = 1e-3,
    betas: tuple[Number, Number, Number] = (0.98, 0.92, 0.99),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    no_prox: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adan: p ← (p − lr · (m̂ + β₂d̂)/(√n̂ + eps)) / (1 + lr · weight_decay).

    m and d are running means of the gradient and of its change from step to step, n of (g + β₂(g − g₋₁))².

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the means of the gradient, of its change, and of the square; each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; the authors train with 0.02.
        no_prox: decay weights by p · (1 − lr · weight_decay) before the step, as AdamW does, instead.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> adan(lr=0.01, weight_decay=0.02)
    fl.optim.adan(lr=0.01, weight_decay=0.02)

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", 2022. torch has
    none. Equal to the authors' code, whose max_grad_norm is `chain(clip_by_global_norm(…), adan())` here. The paper
    starts m at the first gradient and n at its square; the code starts both at zero and corrects the bias.
    """
    flag("no_prox", no_prox)
    non_negative("weight_decay", weight_decay)
    proximal = not no_prox and weight_decay != 0
    return chain(
        *incoming(0.0, maximize),
        scale_by_adan(betas, eps),
        *(
            [scale_by_proximal_learning_rate(lr, weight_decay)]
            if proximal
            else [*decay(weight_decay), scale_by_learning_rate(lr)]
        ),
    )


@described
def scale_by_ademamix(
    betas: tuple[Number, Number, Number] = (0.9, 0.999, 0.9999),
    alpha: Number = 5.0,
    beta3_warmup: Number | None = None,
    alpha_warmup: Number | None = None,
    eps: Number = 1e-8,
) -> Transform:
    """AdEMAMix's direction: (m̂ + αs) / (√v̂ + eps).

    m and s are running means of the gradient at the rates β₁ and β₃, v of its square; s is not corrected for its start.
    During the warm-ups, α(t) = α · t/T_α, and β₃(t) goes from β₁ to β₃ so that 1/ln β₃(t), about the number of steps
    that s remembers, is linear in t/T_β₃.

    Source: Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", 2024, algorithm 1.
    """
    beta1, beta2, beta3 = _three_betas(betas)
    for name, value in (("alpha", alpha), ("eps", eps)):
        non_negative(name, value)
    warmups: dict[str, Number] = {}
    for name, warmup in (("beta3_warmup", beta3_warmup), ("alpha_warmup", alpha_warmup)):
        if warmup is not None:
            non_negative(name, warmup)
            warmups[name] = warmup

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        correction1 = 1 - n["beta1"] ** step
        root_correction2 = (1 - n["beta2"] ** step).sqrt()
        alpha, beta3 = n["alpha"], n["beta3"]
        if "alpha_warmup" in warmups:
            alpha = alpha * torch.clamp(step / n["alpha_warmup"], max=1.0)
        if "beta3_warmup" in warmups:
            progress = step / n["beta3_warmup"]
            memory = (1 - progress) / n["beta1"].log() + progress / beta3.log()
            beta3 = torch.where(progress < 1, (1 / memory).exp(), beta3)
        enter1, keep2, enter2, enter3 = cast(g, 1 - n["beta1"], n["beta2"], 1 - n["beta2"], 1 - beta3)
        stretch, floor = cast(g, correction1 / root_correction2, above_zero(g, n["eps"] * correction1))
        (share,) = cast(g, alpha * correction1)
        exp_avg = torch.lerp(slots["exp_avg"], g, enter1)
        exp_avg_slow = torch.lerp(slots["exp_avg_slow"], g, enter3)
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g, keep2, enter2)
        update = (exp_avg + exp_avg_slow * share) / (square_root(exp_avg_sq) * stretch + floor)
        return update, {"exp_avg": exp_avg, "exp_avg_slow": exp_avg_slow, "exp_avg_sq": exp_avg_sq}

    numbers = {"beta1": beta1, "beta2": beta2, "beta3": beta3, "alpha": alpha, "eps": eps, **warmups}
    slots = ["exp_avg", "exp_avg_slow", "exp_avg_sq"]
    return per_tensor("scale_by_ademamix", rule, numbers, slots=slots, counts=True, elementwise=True)


@described
def ademamix(
    lr: Number = 1e-3,
    betas: tuple[Number, Number, Number] = (0.9, 0.999, 0.9999),
    alpha: Number = 5.0,
    beta3_warmup: Number | None = None,
    alpha_warmup: Number | None = None,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """AdEMAMix: p ← p − lr · ((m̂ + αs)/(√v̂ + eps) + weight_decay · p), with a second, slow mean s of the gradients.

    Args:
        lr: learning rate, at least 0.
        betas: decay rates of the fast mean, of the mean of squares, and of the slow mean; each in [0, 1).
        alpha: how much the slow mean counts, at least 0; the paper uses 4 to 10.
        beta3_warmup: the paper's T_β₃: in how many steps the slow mean's rate goes from β₁ to β₃, at least 0. None: β₃
            from the start.
        alpha_warmup: the paper's T_α: in how many steps alpha is reached, at least 0. None: alpha from the start.
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, decoupled.
        maximize: go uphill (weights still decay towards zero).

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    The paper sets both warm-ups to the number of training steps; without them, high betas may diverge early.

    >>> ademamix(lr=0.001, alpha=8.0, beta3_warmup=1000, alpha_warmup=1000)
    fl.optim.ademamix(lr=0.001, alpha=8.0, beta3_warmup=1000, alpha_warmup=1000)

    Source: Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", 2024. torch has none. Arguments in the
    order of the authors' PyTorch code, whose alpha is 2.0 (5.0 in their JAX code) and which adds 10⁻⁸ to β inside the
    logarithms of the warm-up; the paper does not, nor does this.
    """
    return chain(
        *incoming(0.0, maximize),
        scale_by_ademamix(betas, alpha, beta3_warmup, alpha_warmup, eps),
        *decay(weight_decay),
        scale_by_learning_rate(lr),
    )


def _three_betas(value: Any) -> tuple[Number, Number, Number]:
    """Three decay rates, each in [0, 1)."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise WrongType(f"betas = {value!r} are not three: give (beta1, beta2, beta3).")
    for index, beta in enumerate(value):
        in_interval(f"beta{index + 1}", beta, 0.0, 1.0, open_high=True)
    return value[0], value[1], value[2]


NEGATIVE = (
    Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
    Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
    Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
)

CATALOGUE = (
    OptimizerInfo(
        adabelief,
        learning_rates=(1e-5, 1e-1),
        formula="p − lr·(m̂/(√ŝ + eps) + wd·p), s of (g − m)²",
        paper="Zhuang et al.",
        year=2020,
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
            {"amsgrad": True, "eps": 1e-8},
            {"maximize": True},
        ),
        invalid=(*NEGATIVE, Invalid({"betas": (1.0, 0.0)}, "beta1 = 1.0 is outside")),
        settles={"lr": 2e-2, "eps": 1e-12},
    ),
    OptimizerInfo(
        yogi,
        learning_rates=(1e-4, 1.0),
        formula="p − lr·m̂/(√v̂ + eps), v −= (1−β₂)·sign(v − g²)·g²",
        paper="Zaheer et al.",
        year=2018,
        valid=(
            {},
            {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1},
            {"initial_accumulator": 0.1, "eps": 1e-8},
            {"maximize": True},
        ),
        invalid=(
            *NEGATIVE,
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
            Invalid({"initial_accumulator": -1.0}, "initial_accumulator = -1.0 is negative"),
        ),
        settles={"lr": 2e-2},
    ),
    OptimizerInfo(
        adan,
        learning_rates=(1e-5, 1e-1),
        formula="(p − lr·(m̂ + β₂d̂)/(√n̂ + eps))/(1 + lr·wd)",
        paper="Xie et al.",
        year=2022,
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.9, 0.8, 0.95), "weight_decay": 0.1},
            {"weight_decay": 0.1, "no_prox": True},
            {"maximize": True},
        ),
        invalid=(
            *NEGATIVE,
            Invalid({"betas": (0.9, 0.9, 1.0)}, "beta3 = 1.0 is outside"),
            Invalid({"betas": (0.9, 0.9)}, "are not three", TypeError),
        ),
        settles={"lr": 2e-2},
    ),
    OptimizerInfo(
        ademamix,
        learning_rates=(1e-5, 1e-2),
        formula="p − lr·((m̂ + αs)/(√v̂ + eps) + wd·p)",
        paper="Pagliardini et al.",
        year=2024,
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.8, 0.95, 0.99), "weight_decay": 0.1},
            {"alpha": 8.0, "beta3_warmup": 30, "alpha_warmup": 40},
            {"maximize": True},
        ),
        invalid=(
            *NEGATIVE,
            Invalid({"betas": (0.9, 0.9)}, "are not three", TypeError),
            Invalid({"alpha": -1.0}, "alpha = -1.0 is negative"),
            Invalid({"alpha_warmup": -1}, "alpha_warmup = -1 is negative"),
        ),
        settles={"lr": 1e-2, "betas": (0.9, 0.999, 0.99), "alpha": 1.0},
    ),
)
