"""An optimizer of fallline as a `torch.optim.Optimizer`: the same rule, on the parameters of a model.

Groups hold the optimizer's arguments under torch's names (`lr`, `betas`, …), those of a chain under the names of its
`hyperparameters`; they are read anew at every step, so torch's schedulers work on them. Where a hyperparameter follows
a schedule of its own, the group shows its present value. State is kept per parameter, under torch's names, so that a
`state_dict` of `torch.optim.Adam` can be loaded. `p.grad` is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fallline.errors import FalllineError, InvalidHyperparameter, UnknownArgument, nearest
from fallline.optim.base import Optimizer
from fallline.optim.description import plain
from fallline.optim.schedules import Schedule
from fallline.optim.transform import Slots

# Keys that torch itself puts into groups, and one of ours.
_TORCH_KEYS = {"params", "param_names", "initial_lr", "updates_done"}


class TorchOptimizer(torch.optim.Optimizer):
    """Made by `Optimizer.as_torch`. Transforms over all parameters (a global norm) act within each group."""

    def __init__(self, params: Any, rule: Optimizer, *, steps: int | None = None, seed: int = 0) -> None:
        self.rule = rule
        self.steps = steps
        self.seed = seed
        self.arguments = _arguments(rule)
        self.schedules: list[dict[str, Any]] = []  # per group, the arguments that follow a schedule
        self._rules: dict[int, tuple[dict[str, Any], Optimizer]] = {}  # per group, the latest arguments and their rule
        super().__init__(params, dict(self.arguments))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a key that is not an argument of the optimizer is an error that names the nearest one."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group = {param_group!r} is not a dict: give one with the key 'params'.")
        for key in param_group.keys() - _TORCH_KEYS - self.arguments.keys():
            hint = nearest(key, self.arguments) if self.arguments else "It has none."
            raise UnknownArgument(f"a parameter group of {self.rule.name} has no {key!r}. {hint}")
        # A group that joins late is as far in training as the others.
        done = max((group["updates_done"] for group in self.param_groups), default=0)
        given = {name: plain(param_group.get(name, value)) for name, value in self.arguments.items()}
        self._rule_with(
            len(self.param_groups), given
        )  # an argument outside its domain is refused here, not at the first step
        schedules = {name: value for name, value in given.items() if _follows_schedule(value)}
        present = {name: self._present(name, value, done) for name, value in schedules.items()}
        super().add_param_group({"updates_done": done, **param_group, **present})
        self.schedules.append(schedules)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, (group, schedules) in enumerate(zip(self.param_groups, self.schedules, strict=True)):
            self._refuse_second_schedule(group, schedules)
            params = {str(i): p for i, p in enumerate(group["params"]) if p.grad is not None}
            if params:
                rule = self._rule_with(index, {name: plain(group[name]) for name in self.arguments})
                self._update(rule, params)
            group["updates_done"] += 1
            for name, schedule in schedules.items():
                group[name] = self._present(name, schedule, group["updates_done"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of the same optimizer, or of its namesake in torch.optim."""
        for group in state_dict["param_groups"]:
            missing = self.arguments.keys() - group.keys()
            if missing:
                raise FalllineError(
                    f"this state is of another optimizer: {self.rule.name} has {min(missing)!r}, its groups do not."
                )
        super().load_state_dict(state_dict)

    def _update(self, rule: Optimizer, params: dict[str, Tensor]) -> None:
        grads = {name: _gradient(p) for name, p in params.items()}
        slots = {name: self._slots(rule, p) for name, p in params.items()}
        step = torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
        updates, state = rule.update(grads, {"step": step, "slots": slots}, params)
        for name, p in params.items():
            p.add_(updates[name])
            if state["slots"][name]:
                self.state[p] = state["slots"][name]

    def _slots(self, rule: Optimizer, p: Tensor) -> Slots:
        """The state of a parameter; what a change of the group's arguments adds to it starts as at the first step."""
        kept: Slots = self.state.get(p, {})
        return kept if rule.slot_names <= kept.keys() else {**rule.init({"": p})["slots"][""], **kept}

    def _rule_with(self, index: int, arguments: dict[str, Any]) -> Optimizer:
        """The optimizer with these arguments; each group's latest one is kept, because they seldom change."""
        latest, rule = self._rules.get(index, ({}, self.rule))
        if arguments != latest or index not in self._rules:
            call = self.rule.call
            if call is None or _is_chain(self.rule):
                rule = self.rule.with_numbers(arguments)
            else:
                rule = call.function(**arguments)
            self._rules[index] = (arguments, rule)
        return rule

    def _present(self, name: str, value: Any, done: int) -> Any:
        """A schedule's value after so many updates."""
        if isinstance(value, tuple):
            return tuple(self._present(name, item, done) for item in value)
        if not isinstance(value, Schedule):
            return value
        if self.steps is None or not self.steps > 0:
            raise InvalidHyperparameter(
                f"{name} follows a {value.kind} schedule, which needs the number of steps, not {self.steps!r}: "
                "give as_torch(…, steps=…)."
            )
        return value(min(done / self.steps, 1.0)).item()

    def _refuse_second_schedule(self, group: dict[str, Any], schedules: Mapping[str, Any]) -> None:
        for name, schedule in schedules.items():
            expected = self._present(name, schedule, group["updates_done"])
            if plain(group[name]) != expected:
                raise InvalidHyperparameter(
                    f"{name} follows {schedule!r} over {self.steps} steps and is {expected!r} after "
                    f"{group['updates_done']}, but was set to {group[name]!r}: use one schedule, here or outside."
                )

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "steps", "seed", "arguments", "schedules", "_rules")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("updates_done", 0)

    def __repr__(self) -> str:
        return f"TorchOptimizer({self.rule!r}, {len(self.param_groups)} parameter group(s))"


def _is_chain(rule: Optimizer) -> bool:
    """Whether a group changes numbers of transforms, not the arguments of one function."""
    return rule.call is None or bool(rule.call.extra) or not rule.call.arguments


def _arguments(rule: Optimizer) -> dict[str, Any]:
    """What a group may hold: the optimizer's arguments, or the hyperparameters of a chain."""
    return dict(rule.hyperparameters if _is_chain(rule) or rule.call is None else rule.call.arguments)


def _follows_schedule(value: Any) -> bool:
    return isinstance(value, Schedule) or (isinstance(value, tuple) and any(_follows_schedule(item) for item in value))


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False.")
    return p.grad
