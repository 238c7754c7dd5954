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

from fallline.optim.checks import WrongType, in_interval, positive, real
from fallline.optim.description import Call, described, remembers_its_call
from fallline.optim.dimensions import Dimension

Swept = float | Dimension


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
        # The tolerance keeps k/steps divided by k/steps from falling just below a whole number.
        return n["value"] * n["factor"] ** torch.floor(p / n["every"] + 1e-9)

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
