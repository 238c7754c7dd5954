"""Schedule-free learning: the model is evaluated at an average of the iterates, so that no learning rate has to fall.

z makes the plain steps, x is the average of the z's, and gradients are taken at y = (1 − momentum) · z + momentum · x.
The parameters that are trained are y and z is kept beside them; x follows from both, so there is no mode to switch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fallline.description import described
from fallline.errors import InvalidHyperparameter
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import in_interval, non_negative, pair_of_betas, real
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.schedules import Schedule
from fallline.optim.transform import Number, Numbers, Slots, Transform, cast, per_tensor
from fallline.optim.transforms import above_zero, decay, incoming, mean_of_squares, square_root


@described
def schedule_free_step(
    lr: Number,
    momentum: Number = 0.9,
    warmup_steps: Number = 0,
    r: Number = 0.0,
    weight_lr_power: Number = 2.0,
) -> Transform:
    """A step downhill whose iterates are averaged: the last stage, in the place of `scale_by_learning_rate`.

    z ← z − lr · g, x ← (1 − c)x + c · z, y = (1 − momentum)z + momentum · x, and y is what is trained. The newest z has
    weight w = tʳ · (largest lr so far)^weight_lr_power and the share c = w / (sum of all w).

    Args:
        lr: learning rate, at least 0; it rises to this over the first `warmup_steps`.
        momentum: how near to the average gradients are taken, in (0, 1), the same all through training.
        warmup_steps: how many updates lr · t / warmup_steps is used in, at least 0.
        r: how much more late iterates weigh than early ones.
        weight_lr_power: how much less the iterates of the warm-up weigh, at least 0.

    Source: Defazio et al., "The Road Less Scheduled", 2024.
    """
    non_negative("lr", lr)
    _steady("momentum", momentum)
    non_negative("warmup_steps", warmup_steps)
    real("r", r)
    non_negative("weight_lr_power", weight_lr_power)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        step = slots["step"]
        lr = n["lr"] * torch.clamp(step / n["warmup_steps"], max=1.0)  # without a warm-up step / 0 = ∞
        lr_max = torch.maximum(slots["lr_max"], lr)
        weight = step ** n["r"] * lr_max ** n["weight_lr_power"]
        weight_sum = slots["weight_sum"] + weight
        share = weight / torch.where(weight_sum > 0, weight_sum, 1.0)  # nothing is averaged while lr is 0
        enter, down_y, down_z = cast(g, share, lr * (1 - n["momentum"] * (1 - share)), lr)
        changed = {"z": slots["z"] - g * down_z, "lr_max": lr_max, "weight_sum": weight_sum}
        return (slots["z"] - p) * enter - g * down_y, changed

    def initial(p: Tensor, n: Numbers) -> Slots:
        nothing = torch.zeros((), dtype=torch.float64, device=p.device)
        return {"z": p.clone(), "lr_max": nothing, "weight_sum": nothing.clone()}

    def evaluation(p: Tensor, slots: Slots, n: Numbers) -> Tensor:
        (beyond,) = cast(p, 1 - 1 / n["momentum"])
        return p + (slots["z"] - p) * beyond

    numbers = {
        "lr": lr,
        "momentum": momentum,
        "warmup_steps": warmup_steps,
        "r": r,
        "weight_lr_power": weight_lr_power,
    }
    made = per_tensor(
        "schedule_free_step",
        rule,
        numbers,
        slots=["z", "lr_max", "weight_sum"],
        initial=initial,
        counts=True,
        elementwise=True,
        evaluation=evaluation,
    )
    return replace(made, steady=("momentum",))


@described
def scale_by_second_moment(beta2: Number = 0.999, eps: Number = 1e-8) -> Transform:
    """The gradient by its size, as in Adam without momentum: u = g / (√v̂ + eps).

    v = β₂v + (1 − β₂)g², v̂ = v/(1 − β₂ᵗ). An element whose gradients have all been 0 stays where it is, even with
    eps = 0.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015.
    """
    in_interval("beta2", beta2, 0.0, 1.0, open_high=True)
    non_negative("eps", eps)

    def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
        root_correction = (1 - n["beta2"] ** slots["step"]).sqrt()
        keep, enter, stretch, floor = cast(g, n["beta2"], 1 - n["beta2"], 1 / root_correction, above_zero(g, n["eps"]))
        exp_avg_sq = mean_of_squares(slots["exp_avg_sq"], g, keep, enter)
        return g / (square_root(exp_avg_sq) * stretch + floor), {"exp_avg_sq": exp_avg_sq}

    numbers = {"beta2": beta2, "eps": eps}
    return per_tensor("scale_by_second_moment", rule, numbers, slots=["exp_avg_sq"], counts=True, elementwise=True)


@described
def schedule_free_sgd(
    lr: Number = 1.0,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    warmup_steps: Number = 0,
    r: Number = 0.0,
    weight_lr_power: Number = 2.0,
) -> Optimizer:
    """Gradient descent without a schedule: z ← z − lr · g(y), x = mean of the z's, y = (1 − momentum)z + momentum · x.

    The parameters that are trained are y; the model is evaluated, kept and returned at x, which is
    `optimizer.evaluation_parameters(state, params)`. Running statistics of batch normalisation remain those of y.

    Args:
        lr: learning rate, at least 0; good ones are larger than those of `sgd`.
        momentum: how near to the average gradients are taken, in (0, 1). It is no schedule's: x is found with it.
        weight_decay: at least 0, coupled: weight_decay · y is part of the gradient.
        warmup_steps: over so many updates lr rises in a straight line, from lr / warmup_steps at the first.
        r: the weight of an iterate grows with the r-th power of the number of its update.
        weight_lr_power: it also grows with this power of the largest lr so far, at least 0.

    Raises:
        InvalidHyperparameter: for a number outside its domain, or a momentum that follows a schedule.

    >>> import torch
    >>> optimizer = schedule_free_sgd(lr=0.5)
    >>> p, g = {"w": torch.ones(1)}, {"w": torch.ones(1)}
    >>> state = optimizer.init(p)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(g, state, p)
    ...     p = {"w": p["w"] + updates["w"]}
    >>> p["w"], optimizer.evaluation_parameters(state, p)["w"]
    (tensor([0.2250]), tensor([0.2500]))

    Source: Defazio et al., "The Road Less Scheduled", 2024. Equal to the authors' `schedulefree.SGDScheduleFree`, with
    its y in train mode and its x in eval mode. There the updates are counted for all parameters together, here for
    each parameter: that differs where a parameter has a gradient at some steps only. momentum = 0.9 is not that of
    `torch.optim.SGD`: no buffer is kept, and lr is not to be divided by 1 − momentum.
    """
    _steady("momentum", momentum)
    return chain(*incoming(weight_decay, False), schedule_free_step(lr, momentum, warmup_steps, r, weight_lr_power))


@described
def schedule_free_adamw(
    lr: Number = 0.0025,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    warmup_steps: Number = 0,
    r: Number = 0.0,
    weight_lr_power: Number = 2.0,
) -> Optimizer:
    """AdamW without a schedule: z ← z − lr · (g/(√v̂ + eps) + weight_decay · y), averaged to x; y = (1 − β₁)z + β₁x.

    The parameters that are trained are y; the model is evaluated, kept and returned at x, which is
    `optimizer.evaluation_parameters(state, params)`. Running statistics of batch normalisation remain those of y.

    Args:
        lr: learning rate, at least 0; good ones are up to ten times those of `adamw`.
        betas: β₁ in (0, 1), how near to the average gradients are taken, in place of Adam's momentum and not a
            schedule's; β₂ in [0, 1), the decay rate of the mean of squares.
        eps: added to the denominator, at least 0.
        weight_decay: at least 0, decoupled, at y.
        warmup_steps: over so many updates lr rises in a straight line, from lr / warmup_steps at the first.
        r: the weight of an iterate grows with the r-th power of the number of its update.
        weight_lr_power: it also grows with this power of the largest lr so far, at least 0.

    Raises:
        InvalidHyperparameter: for a number outside its domain, or a β₁ that follows a schedule.

    >>> schedule_free_adamw(lr=0.01, warmup_steps=100)
    fl.optim.schedule_free_adamw(lr=0.01, warmup_steps=100)

    Source: Defazio et al., "The Road Less Scheduled", 2024. Equal to the authors' `schedulefree.AdamWScheduleFree`,
    with its y in train mode and its x in eval mode; updates are counted per parameter, as in `schedule_free_sgd`.
    Unlike in `torch.optim.AdamW`, there is no running mean of the gradient, and weight_decay is 0 by default.
    """
    beta1, beta2 = pair_of_betas(betas)
    _steady("beta1", beta1)
    return chain(
        scale_by_second_moment(beta2, eps),
        *decay(weight_decay),
        schedule_free_step(lr, beta1, warmup_steps, r, weight_lr_power),
    )


def _steady(name: str, value: Number) -> None:
    """A number in (0, 1) that does not change: x is found from y and z with it."""
    if isinstance(value, Schedule):
        raise InvalidHyperparameter(
            f"{name} = {value!r} follows a schedule: give one number, because the average is found with it."
        )
    in_interval(name, value, 0.0, 1.0, open_low=True, open_high=True)


CATALOGUE = (
    OptimizerInfo(
        schedule_free_sgd,
        learning_rates=(1e-2, 100.0),
        formula="z − lr·g(y), x = mean of z, y = (1−β)z + βx",
        paper="Defazio et al.",
        year=2024,
        valid=(
            {"lr": 1e-2},
            {"lr": 1e-2, "momentum": 0.8, "weight_decay": 0.1, "warmup_steps": 5},
            {"lr": 2e-2, "r": 1.0, "weight_lr_power": 0.0},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"momentum": 0.0}, r"momentum = 0.0 is outside"),
            Invalid({"momentum": 1.0}, r"momentum = 1.0 is outside"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
            Invalid({"warmup_steps": -1}, "warmup_steps = -1 is negative"),
            Invalid({"weight_lr_power": -1.0}, "weight_lr_power = -1.0 is negative"),
        ),
        settles={"lr": 5e-3},
    ),
    OptimizerInfo(
        schedule_free_adamw,
        learning_rates=(1e-4, 1e-1),
        formula="z − lr·(g(y)/(√v̂ + eps) + wd·y), x = mean of z, y = (1−β₁)z + β₁x",
        paper="Defazio et al.",
        year=2024,
        valid=(
            {},
            {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1, "warmup_steps": 5},
            {"lr": 1e-2, "eps": 1e-6, "r": 1.0, "weight_lr_power": 0.0},
        ),
        invalid=(
            Invalid({"lr": -1e-2}, "lr = -0.01 is negative"),
            Invalid({"betas": (0.0, 0.999)}, "beta1 = 0.0 is outside"),
            Invalid({"betas": (0.9, 1.0)}, "beta2 = 1.0 is outside"),
            Invalid({"eps": -1.0}, "eps = -1.0 is negative"),
            Invalid({"weight_decay": -1}, "weight_decay = -1 is negative"),
        ),
        settles={"lr": 5e-2},
    ),
)
