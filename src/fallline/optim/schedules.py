"""Schedules: how a hyperparameter moves with training progress.

A schedule is a pure function of progress, which runs from 0 at the first update to 1 after the last. Its own numbers
are data like every hyperparameter, so a sweep can search them. Give one wherever an optimizer takes a number:
`adam(lr=cosine(1e-3))`. `fit` and `sweep` know how many steps there are; outside of them give `steps=` to the
optimizer's `update` or `as_torch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fallline.description import Call, described, leaves, remembers_its_call
from fallline.dimensions import Dimension
from fallline.errors import InvalidHyperparameter, nearest
from fallline.optim.checks import WrongType, flag, in_interval, positive, real

Swept = float | Dimension
# k/steps divided by k/steps may fall just below a whole number: what is missing less than this counts as there.
WHOLE = 1e-9
# How much of a cool-down's height is gone, when a share of its time is.
COOL_DOWNS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda q: q,
    "square_root": torch.sqrt,
    "cosine": lambda q: (1 - torch.cos(math.pi * q)) / 2,
}


@remembers_its_call
@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A hyperparameter as a function of progress: `curve(progress, numbers)`, with `numbers` its data.

    `curve` takes progress (a tensor, 0 to 1) and the numbers as tensors that broadcast with it.
    """

    kind: str
    numbers: Mapping[str, Swept]
    curve: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    call: Call | None = None

    def __post_init__(self) -> None:
        for name, number in self.numbers.items():
            if isinstance(number, Schedule):
                raise WrongType(f"{name} = {number!r} is a schedule: the numbers of a schedule do not move, give one.")

    def __call__(self, progress: float | Sequence[float] | Tensor) -> Tensor:
        """The value at `progress` in [0, 1], or at each of several.

        >>> float(cosine(1.0)(0.5))
        0.5
        """
        at = torch.as_tensor(progress, dtype=torch.float64)
        searched = [name for name, value in leaves(self) if isinstance(value, Dimension)]
        if searched:
            raise InvalidHyperparameter(f"{self!r} leaves {', '.join(searched)} to be searched: give numbers.")
        numbers = {name: torch.tensor(v, dtype=torch.float64) for name, v in self.numbers.items()}
        return self.curve(at, numbers)


@described
def constant(value: Swept) -> Schedule:
    """The same value throughout: v(p) = value.

    >>> float(constant(0.1)(0.7))
    0.1
    """
    real("value", value)
    return Schedule("constant", {"value": value}, lambda p, n: n["value"] + torch.zeros_like(p))


@described
def step(value: Swept, every: Swept = 1 / 3, factor: Swept = 0.1) -> Schedule:
    """Multiplied by `factor` each time another `every` of training has passed: v(p) = value · factor^⌊p / every⌋.

    Args:
        value: the value at the start.
        every: a fraction of training, in (0, 1]. `torch.optim.lr_scheduler.StepLR(step_size=k)` is `every = k / steps`.
        factor: what the value is multiplied by, above 0 (torch's `gamma`).

    >>> float(step(1.0, every=0.5)(0.5))
    0.1
    """
    real("value", value)
    in_interval("every", every, 0.0, 1.0, open_low=True)
    positive("factor", factor)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        return n["value"] * n["factor"] ** torch.floor(p / n["every"] + WHOLE)

    return Schedule("step", {"value": value, "every": every, "factor": factor}, curve)


@described
def cosine(value: Swept, end: Swept = 0.0) -> Schedule:
    """Half a cosine from `value` to `end`: v(p) = end + (value − end)(1 + cos πp)/2.

    The same as `torch.optim.lr_scheduler.CosineAnnealingLR(T_max=steps, eta_min=end)`.
    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.

    >>> [round(float(cosine(1.0, end=0.5)(p)), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.75, 0.5]
    """
    real("value", value)
    real("end", end)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        return n["end"] + (n["value"] - n["end"]) * (1 + torch.cos(math.pi * p)) / 2

    return Schedule("cosine", {"value": value, "end": end}, curve)


@described
def linear(value: Swept, end: Swept = 0.0) -> Schedule:
    """A straight line from `value` to `end`: v(p) = value + (end − value)p.

    The same as `torch.optim.lr_scheduler.LinearLR(start_factor=1, end_factor=end / value, total_iters=steps)`, and as
    optax's `linear_schedule`.

    >>> [round(float(linear(1.0, end=0.5)(p)), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.75, 0.5]
    """
    real("value", value)
    real("end", end)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        return n["value"] * (1 - p) + n["end"] * p  # exactly `value` at 0 and `end` at 1

    return Schedule("linear", {"value": value, "end": end}, curve)


@described
def polynomial(value: Swept, end: Swept = 0.0, power: Swept = 1.0) -> Schedule:
    """A power of what is left of training: v(p) = end + (value − end)(1 − p)^power.

    The same as `torch.optim.lr_scheduler.PolynomialLR(total_iters=steps, power=power)`, which ends at 0, and as optax's
    `polynomial_schedule`. The default power is torch's: a straight line.

    Args:
        value: the value at the start.
        end: the value after the last update.
        power: above 0. Above 1 it falls fast first, below 1 it falls fast at the end.

    >>> [round(float(polynomial(1.0, power=2.0)(p)), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.25, 0.0]
    """
    real("value", value)
    real("end", end)
    positive("power", power)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        return n["end"] + (n["value"] - n["end"]) * (1 - p) ** n["power"]

    return Schedule("polynomial", {"value": value, "end": end, "power": power}, curve)


@described
def exponential(value: Swept, factor: Swept = 0.01) -> Schedule:
    """The same ratio from each update to the next: v(p) = value · factor^p.

    `torch.optim.lr_scheduler.ExponentialLR(gamma)` over `steps` updates is `factor = gamma ** steps`.

    Args:
        value: the value at the start.
        factor: what it has been multiplied by after the last update, above 0.

    >>> [round(float(exponential(1.0, factor=0.01)(p)), 3) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.1, 0.01]
    """
    real("value", value)
    positive("factor", factor)
    return Schedule(
        "exponential", {"value": value, "factor": factor}, lambda p, n: n["value"] * torch.pow(n["factor"], p)
    )


@described
def cosine_restarts(value: Swept, every: Swept = 1 / 3, factor: Swept = 1.0, end: Swept = 0.0) -> Schedule:
    """Half cosines from `value` to `end`, one after the other: v(p) = end + (value − end)(1 + cos πr)/2.

    r is how much of the present cycle is over, in [0, 1). The first cycle is `every` long, each other one `factor`
    times as long as the one before. The last is cut short where training ends.

    `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(T_0, T_mult, eta_min)` is `every = T_0 / steps`,
    `factor = T_mult`, `end = eta_min`; here the factor need not be a whole number.
    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.

    Args:
        value: the value at the start of every cycle.
        every: the length of the first cycle as a fraction of training, in (0, 1].
        factor: at least 1.
        end: the value towards which each cycle falls.

    >>> [round(float(cosine_restarts(1.0, every=0.5)(p)), 3) for p in (0.0, 0.25, 0.5, 0.75)]
    [1.0, 0.5, 1.0, 0.5]
    """
    real("value", value)
    in_interval("every", every, 0.0, 1.0, open_low=True)
    in_interval("factor", factor, 1.0, math.inf)
    real("end", end)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        cycles = p / n["every"]  # how many there would be, were they all as long as the first
        even = n["factor"] == 1
        growth = torch.where(even, 2.0, n["factor"])  # any, where the lengths are even: it is not used there
        # Cycle i begins at (factorⁱ − 1)/(factor − 1), in lengths of the first.
        which = torch.where(even, cycles, torch.log1p((growth - 1) * cycles) / torch.log(growth))
        index = torch.floor(which + WHOLE)
        begin = torch.where(even, index, (growth**index - 1) / (growth - 1))
        over = torch.clamp((cycles - begin) / n["factor"] ** index, min=0.0)
        return n["end"] + (n["value"] - n["end"]) * (1 + torch.cos(math.pi * over)) / 2

    numbers = {"value": value, "every": every, "factor": factor, "end": end}
    return Schedule("cosine_restarts", numbers, curve)


@described
def one_cycle(
    value: Swept,
    fraction: Swept = 0.3,
    div_factor: Swept = 25.0,
    final_div_factor: Swept = 1e4,
    *,
    linear: bool = False,
    three_phase: bool = False,
) -> Schedule:
    """Up to `value` and down to almost nothing: from value/div_factor to value to value/(div_factor·final_div_factor).

    Each way is half a cosine, or a straight line. With `three_phase` the way down is first as long as the way up and
    ends where that began; then it goes on to the end.

    With `fraction` f over S steps, it is torch's `OneCycleLR(max_lr=value, total_steps=S + 1, pct_start=(fS + 1)/(S +
    1))`: torch reaches its end at the last step, and counts the peak's step from 1. A momentum that moves the other
    way, as torch cycles it between 0.85 and 0.95: `one_cycle(0.85, div_factor=0.85 / 0.95, final_div_factor=1.0)`.
    Source: Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
    2018.

    Args:
        value: the peak (torch's `max_lr`).
        fraction: the part of training that goes up, in (0, 1); with `three_phase` at most 0.5.
        div_factor: the peak divided by the first value, above 0.
        final_div_factor: the first value divided by the last, above 0.
        linear: straight lines instead of cosines (torch's `anneal_strategy="linear"`).

    >>> [round(float(one_cycle(1.0, fraction=0.5, div_factor=10.0)(p)), 4) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.1, 0.55, 1.0, 0.5, 0.0]
    """
    real("value", value)
    flag("linear", linear)
    flag("three_phase", three_phase)
    in_interval("fraction", fraction, 0.0, 0.5 if three_phase else 1.0, open_low=True, open_high=not three_phase)
    positive("div_factor", div_factor)
    positive("final_div_factor", final_div_factor)

    def between(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
        gone = torch.clamp(share, 0.0, 1.0)
        return torch.lerp(start, end, gone if linear else (1 - torch.cos(math.pi * gone)) / 2)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        peak, up = n["value"] + 0 * p, n["fraction"]
        start = peak / n["div_factor"]
        end = start / n["final_div_factor"]
        rising = between(start, peak, p / up)
        if not three_phase:
            return torch.where(p < up, rising, between(peak, end, (p - up) / (1 - up)))
        # At fraction 0.5 there is no third phase: its end falls on the end of training.
        last = between(start, end, (p - 2 * up) / torch.clamp(1 - 2 * up, min=WHOLE))
        falling = torch.where(p < 2 * up, between(peak, start, (p - up) / up), last)
        return torch.where(p < up, rising, falling)

    numbers = {"value": value, "fraction": fraction, "div_factor": div_factor, "final_div_factor": final_div_factor}
    options = [name for name, on in (("linear", linear), ("three_phase", three_phase)) if on]
    return Schedule("+".join(["one_cycle", *options]), numbers, curve)


@described
def warmup_stable_decay(
    value: Swept, warmup: Swept = 0.05, decay: Swept = 0.2, end: Swept = 0.0, *, shape: str = "linear"
) -> Schedule:
    """A warm-up from 0, then the value, then a cool-down to `end`.

    With q how much of the cool-down is over: v(p) = value · min(p / warmup, 1) until p = 1 − decay, then v(p) =
    end + (value − end)(1 − s(q)), where s(q) is q ("linear"), √q ("square_root") or (1 − cos πq)/2 ("cosine").
    The same as torch's `SequentialLR` of `LinearLR`, `ConstantLR` and `LinearLR`.

    Source: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
    2024; Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024, who find
    "square_root" best. There the cool-down may begin at any time; here it ends with training.

    Args:
        value: the value between warm-up and cool-down.
        warmup: the part of training that warms up, in [0, 1).
        decay: the part of training that cools down, in (0, 1]; together with `warmup` at most 1.
        end: the value after the last update.
        shape: of the cool-down.

    >>> [round(float(warmup_stable_decay(1.0, warmup=0.2, decay=0.4)(p)), 3) for p in (0.0, 0.1, 0.2, 0.6, 0.8, 1.0)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    real("value", value)
    in_interval("warmup", warmup, 0.0, 1.0, open_high=True)
    in_interval("decay", decay, 0.0, 1.0, open_low=True)
    real("end", end)
    if not warmup + decay <= 1 + WHOLE:  # type: ignore[operator]
        raise InvalidHyperparameter(
            f"warmup = {warmup!r} and decay = {decay!r} are more than the whole of training: give at most 1 together."
        )
    if not isinstance(shape, str) or shape not in COOL_DOWNS:
        raise InvalidHyperparameter(f"shape = {shape!r} is no shape of a cool-down. {nearest(str(shape), COOL_DOWNS)}")

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        ramp = torch.where(p < n["warmup"], p / torch.clamp(n["warmup"], min=WHOLE), 1.0)
        gone = torch.clamp((p - 1 + n["decay"]) / n["decay"], 0.0, 1.0)
        return ramp * (n["value"] + (n["end"] - n["value"]) * COOL_DOWNS[shape](gone))

    numbers = {"value": value, "warmup": warmup, "decay": decay, "end": end}
    return Schedule(f"warmup_stable_decay+{shape}", numbers, curve)


@described
def inverse_square_root(value: Swept, fraction: Swept = 0.05) -> Schedule:
    """A warm-up from 0, then a fall with the root of time: v(p) = value · min(p / fraction, √(fraction / p)).

    The schedule of the Transformer: with w updates of warm-up and d numbers per token, the paper's learning rate is
    `value = (d · w) ** -0.5` and `fraction = w / steps`. In torch it is a `LambdaLR`.
    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 3 (whose first update is number 1, not 0).

    Args:
        value: the peak.
        fraction: the part of training that warms up, in (0, 1).

    >>> [round(float(inverse_square_root(1.0, fraction=0.25)(p)), 3) for p in (0.0, 0.125, 0.25, 1.0)]
    [0.0, 0.5, 1.0, 0.5]
    """
    real("value", value)
    in_interval("fraction", fraction, 0.0, 1.0, open_low=True, open_high=True)

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        ramp = torch.clamp(p / n["fraction"], max=1.0)
        return n["value"] * ramp * (n["fraction"] / torch.maximum(p, n["fraction"])).sqrt()

    return Schedule("inverse_square_root", {"value": value, "fraction": fraction}, curve)


@described
def linear_warmup(value: Swept | Schedule, fraction: Swept = 0.05, start: Swept = 0.0) -> Schedule:
    """A straight line from `start` times the value up to the value, then the value (or its own schedule).

    For p < fraction: v(p) = (start + (1 − start) p / fraction) · w(0); afterwards v(p) = w((p − fraction)/(1 −
    fraction)), where w is `value` as a schedule. The same as torch's `SequentialLR` of `LinearLR` and what follows.

    Args:
        value: a number, or the schedule that follows the warm-up.
        fraction: the part of training that warms up, in (0, 1).
        start: the first value as a share of the full one, in [0, 1].

    >>> [round(float(linear_warmup(1.0, fraction=0.5)(p)), 3) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.5, 1.0, 1.0]
    """
    after = value if isinstance(value, Schedule) else constant(value)
    in_interval("fraction", fraction, 0.0, 1.0, open_low=True, open_high=True)
    in_interval("start", start, 0.0, 1.0)
    inner = {f"after.{name}": number for name, number in after.numbers.items()}

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        numbers = {name.removeprefix("after."): t for name, t in n.items() if name.startswith("after.")}
        ramp = n["start"] + (1 - n["start"]) * torch.clamp(p / n["fraction"], max=1.0)
        rest = torch.clamp((p - n["fraction"]) / (1 - n["fraction"]), min=0.0)
        return ramp * after.curve(rest, numbers)

    return Schedule(f"linear_warmup+{after.kind}", {"fraction": fraction, "start": start, **inner}, curve)


@described
def join(pieces: Sequence[Swept | Schedule], at: Sequence[Swept]) -> Schedule:
    """Schedules one after the other: v(p) = wᵢ((p − aᵢ)/(aᵢ₊₁ − aᵢ)) for aᵢ ≤ p < aᵢ₊₁.

    a₁, a₂ … are `at`; before them comes 0, after them 1. Each piece runs through the whole of its own progress, from 0
    to 1, in its part of training.

    The same as torch's `SequentialLR(milestones=[a₁ · steps, …])`; with numbers as pieces, as its `MultiStepLR`.

    Args:
        pieces: at least two schedules, or numbers, which stay as they are.
        at: where all but the first begin, as fractions of training: ascending, each in (0, 1), one fewer than pieces.

    >>> [float(join([linear(0.0, end=1.0), 0.25], at=[0.5])(p)) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.5, 0.25, 0.25]
    """
    for name, several in (("pieces", pieces), ("at", at)):
        if not isinstance(several, tuple | list):
            raise WrongType(f"{name} = {several!r} is not a list: give one.")
    if len(pieces) < 2 or len(at) != len(pieces) - 1:
        raise InvalidHyperparameter(
            f"there are {len(pieces)} pieces and {len(at)} places where one begins: give at least two pieces, and one "
            "place fewer."
        )
    for index, place in enumerate(at):
        in_interval(f"at{index + 1}", place, 0.0, 1.0, open_low=True, open_high=True)
    if list(at) != sorted(set(at)):  # type: ignore[type-var]
        raise InvalidHyperparameter(f"at = {tuple(at)!r} does not ascend: give the places in order, each once.")
    whole = [piece if isinstance(piece, Schedule) else constant(piece) for piece in pieces]
    places = {f"at{index + 1}": place for index, place in enumerate(at)}
    inner = {f"piece{i + 1}.{name}": number for i, piece in enumerate(whole) for name, number in piece.numbers.items()}

    def curve(p: Tensor, n: Mapping[str, Tensor]) -> Tensor:
        ends = [n[name] for name in places]
        begins = [torch.zeros_like(p), *ends]
        found = torch.zeros_like(p)
        for index, (piece, begin, end) in enumerate(zip(whole, begins, [*ends, torch.ones_like(p)], strict=True)):
            prefix = f"piece{index + 1}."
            numbers = {name.removeprefix(prefix): t for name, t in n.items() if name.startswith(prefix)}
            own = piece.curve(torch.clamp((p - begin) / (end - begin), 0.0, 1.0), numbers)
            found = torch.where(p + WHOLE >= begin, own, found)
        return found

    return Schedule(f"join({', '.join(piece.kind for piece in whole)})", {**places, **inner}, curve)
