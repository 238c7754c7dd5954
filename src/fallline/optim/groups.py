"""What a parameter group of a torch optimizer holds, and the rule that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fallline.description import SinglePrecision
from fallline.errors import InvalidHyperparameter
from fallline.optim.base import Optimizer
from fallline.optim.kernels import Kernel
from fallline.optim.schedules import Schedule
from fallline.optim.transform import Numbers, Transform


@dataclass
class Plan:
    """How a group is updated while its arguments stay as they are.

    Attributes:
        arguments: the group's.
        rule: the optimizer with these arguments.
        program: an optimizer of the same structure, which is run with the rule's numbers: the same object for as long
            as the structure stays, so that a compiled step is not compiled again for another learning rate.
        kernel: what computes the same faster, if there is such a thing.
        numbers: the rule's, on each device where they were needed.
    """

    arguments: dict[str, Any]
    rule: Optimizer
    program: Optimizer
    kernel: Kernel | None
    numbers: dict[torch.device, Numbers] = field(default_factory=dict)

    def numbers_on(self, device: torch.device) -> Numbers:
        if device not in self.numbers:
            values = self.rule.numbers.items()
            self.numbers[device] = {n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in values}
        return self.numbers[device]


def is_chain(rule: Optimizer) -> bool:
    """Whether a group changes numbers of transforms, not the arguments of one function."""
    if rule.call is None or rule.call.extra or not rule.call.arguments:
        return True
    return any(map(_holds_optimizers, rule.call.arguments.values()))


def _holds_optimizers(value: Any) -> bool:
    """Whether an argument is an optimizer or a transform, or holds some: the numbers are those of what is inside."""
    if isinstance(value, Mapping):
        return any(map(_holds_optimizers, value.values()))
    if isinstance(value, tuple):
        return any(map(_holds_optimizers, value))
    return isinstance(value, Optimizer | Transform)


def arguments_of(rule: Optimizer) -> dict[str, Any]:
    """What a group may hold: the optimizer's arguments, or the hyperparameters of a chain."""
    return dict(rule.hyperparameters if is_chain(rule) or rule.call is None else rule.call.arguments)


def follows_schedule(value: Any) -> bool:
    return isinstance(value, Schedule) or (isinstance(value, tuple) and any(follows_schedule(item) for item in value))


def saved_numbers(value: Any) -> Any:
    """A group's value as it is saved: `torch.load` takes Python's own numbers only, unless it is told to trust."""
    if isinstance(value, tuple):
        return tuple(saved_numbers(item) for item in value)
    return float(value) if isinstance(value, SinglePrecision) else value


def refuse_to_move(before: Optimizer, after: Optimizer) -> None:
    """A number that must stay what it is has been changed in a group."""
    for here, there in zip(before.stages, after.stages, strict=False):
        for name in here.transform.steady:
            old, new = (stage.transform.hyperparameters.get(name) for stage in (here, there))
            if old != new:
                raise InvalidHyperparameter(
                    f"{name} of {after.name} was {old!r} and is {new!r} now, but it must stay what it is: give torch's "
                    "scheduler cycle_momentum=False."
                )
