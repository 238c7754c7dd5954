"""Optimizers made of other optimizers: one inside, and what is done to what comes in or goes out.

`partitions` holds those that give different parameters to different optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fallline.description import described
from fallline.errors import FalllineError, InvalidHyperparameter, Unsupported
from fallline.optim.adam_family import adam, adamw
from fallline.optim.around import around, combinator, inner_optimizer
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import WrongType, in_interval, whole
from fallline.optim.gradient_descent import sgd
from fallline.optim.info import Invalid, OptimizerInfo
from fallline.optim.landscape import Landscape
from fallline.optim.schedules import Schedule
from fallline.optim.signs import lion
from fallline.optim.transform import (
    Grouped,
    Moment,
    Number,
    Numbers,
    Params,
    Seed,
    Slots,
    Stage,
    Transform,
    cast,
    numbers_of,
)

# Stages that come after the direction has been found: they are no part of what `cautious` masks.
AFTER_THE_DIRECTION = ("add_decayed_weights", "scale_by_learning_rate", "ema_of_parameters")


@described
def cautious(optimizer: Optimizer | Transform) -> Optimizer:
    """Moves an element only where the optimizer's direction agrees with the gradient: u ← u · m / max(mean(m), 10⁻³).

    m is 1 where u · g > 0, else 0, and its mean is taken over each parameter tensor. Where what the optimizer gives is
    already a step, which goes against the gradient, m is 1 where u · g < 0; a first step on a bowl tells which it is.
    Where an optimizer ends with the stages `add_decayed_weights` and `scale_by_learning_rate`, as adamw and lion do,
    these stay outside of the mask, so `cautious(adamw())` is the paper's C-AdamW and `cautious(lion())` its C-Lion. Of
    an optimizer that ends otherwise (adan, prodigy, one around another) the whole step is masked, weight decay too.

    Args:
        optimizer: whose direction is masked.

    >>> from fallline.optim import adamw
    >>> cautious(adamw(lr=0.01))
    fl.optim.cautious(optimizer=fl.optim.adamw(lr=0.01))

    Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code", 2024, with the scale of the
    authors' code; others divide by (the sum of m + 1)/n.
    """
    stages = list(inner_optimizer("cautious", optimizer).transforms)
    _refuse_averages("cautious", [stage for stage in stages if stage.name not in AFTER_THE_DIRECTION])
    end = len(stages)
    while end and stages[end - 1].name in AFTER_THE_DIRECTION:
        end -= 1
    return chain(_agreeing.transform(chain(*stages[:end])), *stages[end:])  # type: ignore[attr-defined]


@combinator
def _agreeing(optimizer: Optimizer) -> Transform:
    """The part of an optimizer's updates that agrees with what comes in."""
    against = _goes_against_the_gradient(optimizer)

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        found, slots = parts[0].apply(updates, slots, params, n, moment)
        masked = {}
        for name, u in found.items():
            # The product of the signs, because that of two small numbers may round to 0.
            agreement = u.sign() * updates[name].sign()
            mask = (agreement < 0 if against else agreement > 0).to(u.dtype)
            masked[name] = u * (mask / torch.clamp(mask.mean(), min=1e-3))
        return masked, dict(slots)

    return around("agreeing", [optimizer], apply, elementwise=False)


def _goes_against_the_gradient(optimizer: Optimizer) -> bool:
    """Whether its first updates on ½|p + g|², from p = 0, point to the minimum at −g: then they are steps already."""
    g = {"w": torch.tensor([[2.0, 1.0], [1.0, 1.5]], dtype=torch.float64)}
    p = {"w": torch.zeros_like(g["w"])}
    bowl = Landscape.of(lambda at: (at["w"] + g["w"]).square().sum() / 2, p)
    updates_made = 1000  # the first may be zero: while a learning rate warms up from 0, or accumulate waits
    try:
        state = optimizer.init(p, steps=updates_made)
        for step in range(updates_made):
            updates, state = optimizer.update(g, state, p, steps=updates_made, step=step, landscape=bowl)
            along = float((updates["w"] * g["w"]).sum())
            if along != 0:
                return along < 0
    except (FalllineError, LookupError):
        pass  # a partition that has no place for this parameter: whole optimizers are what partitions are made of
    return True


@combinator
def lookahead(optimizer: Optimizer | Transform, k: Number = 5, alpha: Number = 0.5) -> Transform:
    """k steps forward, 1 step back: at every k-th step slow ← slow + alpha · (fast − slow), fast ← slow.

    The fast weights are those of the optimizer inside. They are what is trained and evaluated, as in the reference
    implementation; after every k-th step they are the slow ones.

    Args:
        optimizer: makes the steps of the fast weights. Its state is kept when the weights go back.
        k: a whole number of at least 1.
        alpha: the part of the way that the slow weights follow, in [0, 1].

    Raises:
        InvalidHyperparameter: for a number outside its domain.

    >>> from fallline.optim import adam
    >>> lookahead(adam(lr=0.01), k=10)
    fl.optim.lookahead(optimizer=fl.optim.adam(lr=0.01), k=10)

    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", 2019, algorithm 1.
    """
    inner = inner_optimizer("lookahead", optimizer)
    _refuse_averages("lookahead", inner.transforms)
    _whole_number("k", k)
    in_interval("alpha", alpha, 0.0, 1.0)

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        found, after = parts[0].apply(updates, slots, params, n, moment)
        moved, changed = {}, {}
        for name, u in found.items():
            own = numbers_of(n, name)
            back = torch.remainder(slots[name]["step"], own["k"]) == 0
            (follows,) = cast(u, own["alpha"])
            slow = slots[name]["slow"]
            synchronised = torch.lerp(slow, params[name] + u, follows)
            moved[name] = torch.where(back, synchronised - params[name], u)
            changed[name] = {**after[name], "slow": torch.where(back, synchronised, slow)}
        return moved, {**after, **changed}

    return around(
        "lookahead",
        [inner],
        apply,
        {"k": k, "alpha": alpha},
        slots=["slow"],
        initial=lambda p, n: {"slow": p.clone()},
        counts=True,
    )


@combinator
def accumulate(optimizer: Optimizer | Transform, every: int) -> Transform:
    """One update for `every` mini-batches, with the mean of their gradients; at the other steps nothing moves.

    Equal to training with mini-batches that are `every` times as large, where the loss is a mean and the mini-batches
    are of one size. The state of the optimizer inside changes only when it makes an update, and its numbers are those
    of the first of the mini-batches: a schedule is as far as it is with the large mini-batches.

    Args:
        optimizer: makes the update.
        every: how many mini-batches make an update; a whole number of at least 1. A sweep may search it, but updates
            each of its values apart.

    Raises:
        InvalidHyperparameter: for an `every` that is none.
        Unsupported: for an optimizer that looks at the loss around the parameters (sam, sophia): it would see that of
            the last mini-batch alone.

    >>> from fallline.optim import sgd
    >>> accumulate(sgd(lr=0.1), every=4)
    fl.optim.accumulate(optimizer=fl.optim.sgd(lr=0.1), every=4)
    """
    inner = inner_optimizer("accumulate", optimizer)
    whole("every", every)
    if inner.looks_around:
        raise Unsupported(
            f"{inner.name} looks at the loss around the parameters, which would be that of one small mini-batch, not "
            f"of all {every}: use larger mini-batches instead of accumulate."
        )
    kept = {name: f"begun_with_{name}" for name in inner.hyperparameters}

    def at_start(parts: Sequence[Stage], n: Numbers, slots: Mapping[str, Slots]) -> Numbers:
        """The numbers with which this update was begun, under the names that the transform has for them."""
        names = {parts[0].numbers[name]: slot for name, slot in kept.items()}

        def begun(own: Numbers, parameter: str) -> Numbers:
            return {**own, **{name: slots[parameter][slot] for name, slot in names.items()}}

        if not isinstance(n, Grouped):
            return begun(n, next(iter(slots)))
        first = {n.group_of[parameter]: parameter for parameter in slots}
        groups = [begun(own, first[i]) if i in first else own for i, own in enumerate(n.groups)]
        return Grouped(groups, n.group_of)

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        is_first, is_last = moment.phase if isinstance(moment.phase, tuple) else (True, True)
        after = dict(slots)
        for name, g in updates.items():
            own = numbers_of(n, name)
            begun = {slot: own[parts[0].numbers[number]] for number, slot in kept.items()} if is_first else {}
            mean = slots[name]["mean_gradient"] + g / every
            after[name] = {**slots[name], "mean_gradient": mean, **begun}
        if not updates or not is_last:
            return {name: torch.zeros_like(g) for name, g in updates.items()}, after
        means = {name: after[name]["mean_gradient"] for name in updates}
        found, after = parts[0].apply(means, after, params, at_start(parts, n, after), moment)
        begun_anew = {name: {**after[name], "mean_gradient": torch.zeros_like(mean)} for name, mean in means.items()}
        return found, {**after, **begun_anew}

    made = around(
        "accumulate",
        [inner],
        apply,
        slots=["mean_gradient", *kept.values()],
        phase=lambda step: (step % every == 0, (step + 1) % every == 0),
        clock=lambda step: step // every,
    )

    def starting(key: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
        own = numbers_of(numbers, key)
        begun = {slot: own[made.parts[0].numbers[number]] for number, slot in kept.items()}
        return {**made.slots(key, parameter, numbers, seed), **begun}

    def evaluation(params: Params, slots: Mapping[str, Slots], n: Numbers) -> dict[str, Tensor]:
        return made.parts[0].evaluation(params, slots, at_start(made.parts, n, {name: slots[name] for name in params}))

    return replace(made, slots=starting, evaluation=evaluation if made.evaluation is not None else None)


@combinator
def skip_not_finite(optimizer: Optimizer | Transform) -> Transform:
    """A step with a gradient that is not finite is left out: parameters and the optimizer's state stay as they are.

    Such a step is left out as a whole, even if only one element of one parameter's gradient is infinite or NaN, and
    counted in the slot "skipped". Schedules go on: they follow the steps of training.

    Args:
        optimizer: makes the other steps.

    >>> import torch
    >>> from fallline.optim import sgd
    >>> rule, p = skip_not_finite(sgd(lr=0.5)), {"w": torch.ones(2)}
    >>> updates, state = rule.update({"w": torch.tensor([1.0, torch.inf])}, rule.init(p), p)
    >>> updates["w"], state["slots"]["w"]["skipped"]
    (tensor([0., 0.]), tensor(1., dtype=torch.float64))
    """
    inner = inner_optimizer("skip_not_finite", optimizer)
    if inner.looks_around:
        raise InvalidHyperparameter(
            f"{inner.name} looks at a second gradient, which would not be looked at here: write "
            f"{inner.name}(skip_not_finite(…)) where it goes around another, or leave skip_not_finite out."
        )
    if any(transform.name == "accumulate" for transform in inner.transforms):
        raise InvalidHyperparameter(
            "skip_not_finite(accumulate(…)) would leave out a mini-batch, not a step: write "
            "accumulate(skip_not_finite(…), every=…)."
        )

    def apply(
        parts: Sequence[Stage],
        updates: dict[str, Tensor],
        slots: Mapping[str, Slots],
        params: Params,
        n: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        if not updates:
            return {}, dict(slots)
        finite = torch.stack([g.isfinite().all() for g in updates.values()]).all()
        found, after = parts[0].apply(updates, slots, params, n, moment)
        kept = {}
        for name, own in after.items():
            before = slots[name]
            kept[name] = {slot: torch.where(finite, tensor, before[slot]) for slot, tensor in own.items()}
            kept[name]["skipped"] = before["skipped"] + torch.where(finite, 0.0, 1.0)
        return {name: torch.where(finite, u, torch.zeros_like(u)) for name, u in found.items()}, kept

    return around(
        "skip_not_finite",
        [inner],
        apply,
        slots=["skipped"],
        initial=lambda p, n: {"skipped": torch.zeros((), dtype=torch.float64, device=p.device)},
        elementwise=False,
        together=True,
    )


def _refuse_averages(taker: str, stages: Sequence[Transform]) -> None:
    """What is evaluated elsewhere follows from parameters that nobody else moves."""
    for stage in stages:
        if stage.evaluation is not None:
            raise InvalidHyperparameter(
                f"{taker} moves parameters from which {stage.name} finds its average: put {stage.name} around it, or "
                "after it in a chain, or leave one of them out."
            )


def _whole_number(name: str, value: Any) -> None:
    """A number of steps that is data, and so may come as 5.0; but it does not move while steps are counted."""
    if isinstance(value, Schedule):
        raise WrongType(f"{name} = {value!r} is a schedule: give one number of steps.")
    in_interval(name, value, 1.0, math.inf)
    if value != int(value):
        raise InvalidHyperparameter(f"{name} = {value!r} is not a whole number: give one of at least 1.")


CATALOGUE = (
    OptimizerInfo(
        cautious,
        learning_rates=(1e-5, 1e-1),
        formula="p + u·m/mean(m), m = [u agrees with g]",
        paper="Liang et al.",
        year=2024,
        valid=({"optimizer": adamw()}, {"optimizer": lion(lr=1e-3)}, {"optimizer": sgd(lr=0.01, momentum=0.9)}),
        invalid=(Invalid({"optimizer": 0.1}, "takes an optimizer, not 0.1", TypeError),),
        settles={"optimizer": adam(lr=2e-2)},
    ),
    OptimizerInfo(
        lookahead,
        learning_rates=(1e-5, 1e-1),
        formula="every k steps: slow + alpha·(fast − slow)",
        paper="Zhang et al.",
        year=2019,
        valid=(
            {"optimizer": adam()},
            {"optimizer": sgd(lr=0.01, momentum=0.9), "k": 3, "alpha": 0.8},
            {"optimizer": lion(), "k": 1, "alpha": 1.0},
        ),
        invalid=(
            Invalid({"optimizer": adam(), "k": 0}, "k = 0 is"),
            Invalid({"optimizer": adam(), "k": 2.5}, "k = 2.5 is not a whole number"),
            Invalid({"optimizer": adam(), "alpha": 1.5}, "alpha = 1.5 is outside"),
            Invalid({"optimizer": 0.1}, "takes an optimizer, not 0.1", TypeError),
        ),
        settles={"optimizer": adam(lr=2e-2)},
    ),
    OptimizerInfo(
        accumulate,
        learning_rates=(1e-5, 1e-1),
        formula="one step for the mean of several gradients",
        paper="",
        year=2017,
        valid=({"optimizer": adam(), "every": 1}, {"optimizer": sgd(lr=0.01, momentum=0.9), "every": 3}),
        invalid=(
            Invalid({"optimizer": adam(), "every": 0}, "every = 0 is"),
            Invalid({"optimizer": adam(), "every": 2.0}, "every = 2.0 is not a whole number", TypeError),
            Invalid({"optimizer": 0.1, "every": 2}, "takes an optimizer, not 0.1", TypeError),
        ),
        settles={"optimizer": adam(lr=5e-2), "every": 2},
    ),
    OptimizerInfo(
        skip_not_finite,
        learning_rates=(1e-5, 1e-1),
        formula="p if a gradient is not finite",
        paper="",
        year=2017,
        valid=({"optimizer": adam()}, {"optimizer": sgd(lr=0.01, momentum=0.9)}),
        invalid=(Invalid({"optimizer": 0.1}, "takes an optimizer, not 0.1", TypeError),),
        settles={"optimizer": adam(lr=2e-2)},
    ),
)
