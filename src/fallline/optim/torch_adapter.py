"""An optimizer of fallline as a `torch.optim.Optimizer`: the same rule, on the parameters of a model.

Groups hold the optimizer's arguments under torch's names (`lr`, `betas`, …), so torch's schedulers work on them; they
are read anew at every step. State is kept per parameter, also under torch's names. `p.grad` is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fallline.errors import UnknownArgument, nearest
from fallline.optim.base import Optimizer, State
from fallline.optim.description import substitute

# Keys that torch itself puts into groups.
_TORCH_KEYS = {"params", "param_names", "initial_lr", "updates_done"}


class TorchOptimizer(torch.optim.Optimizer):
    """Made by `Optimizer.as_torch`. Transforms over all parameters (a global norm) act within each group."""

    def __init__(self, params: Any, rule: Optimizer, *, steps: int | None = None) -> None:
        self.rule = rule
        self.steps = steps
        super().__init__(params, _group_arguments(rule))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a key that is not an argument of the optimizer is an error that names the nearest one."""
        for key in param_group.keys() - _TORCH_KEYS - self.defaults.keys():
            hint = nearest(key, self.defaults)
            raise UnknownArgument(f"a parameter group of {self.rule.name} has no {key!r}. {hint}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("updates_done", 0)
        self._rule_of(group)  # an argument outside its domain is refused here, not at the first step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = {str(i): p for i, p in enumerate(group["params"]) if p.grad is not None}
            if not params:
                continue
            rule = self._rule_of(group)
            grads = {name: self._gradient(p) for name, p in params.items()}
            updates, state = rule.update(grads, self._state_of(rule, group, params), params, steps=self.steps)
            for name, p in params.items():
                p.add_(updates[name])
                self.state[p] = state["slots"][name]
            group["updates_done"] += 1
        return loss

    def _rule_of(self, group: dict[str, Any]) -> Optimizer:
        """The optimizer with this group's numbers."""
        call = self.rule.call
        if call is None or call.extra:
            return self.rule
        arguments = {name: group[name] for name in call.arguments}
        if all(arguments[name] is value or arguments[name] == value for name, value in call.arguments.items()):
            return self.rule
        made: Optimizer = call.function(**{name: _plain(value) for name, value in arguments.items()})
        return made

    def _state_of(self, rule: Optimizer, group: dict[str, Any], params: dict[str, Tensor]) -> State:
        step = torch.tensor(float(group["updates_done"]), dtype=torch.float64)
        slots = {name: self.state[p] or rule.init({name: p})["slots"][name] for name, p in params.items()}
        return {"step": step, "slots": slots}

    @staticmethod
    def _gradient(p: Tensor) -> Tensor:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False.")
        return p.grad

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "steps": self.steps}

    def __repr__(self) -> str:
        return f"TorchOptimizer({self.rule!r}, {len(self.param_groups)} parameter group(s))"


def _group_arguments(rule: Optimizer) -> dict[str, Any]:
    """The optimizer's arguments as torch writes them; a chain of transforms has none that a group could change."""
    if rule.call is None or rule.call.extra:
        return {}
    return {name: substitute(value, {}) for name, value in rule.call.arguments.items()}


def _plain(value: Any) -> Any:
    """torch lets lr be a tensor; rules take numbers."""
    return value.item() if isinstance(value, Tensor) else value
