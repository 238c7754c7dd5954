"""An optimizer of fallline as a `torch.optim.Optimizer`: the same rule, on the parameters of a model.

Groups hold the optimizer's arguments under torch's names (`lr`, `betas`, …), those of a chain, or of an optimizer
around others, under the names of its `hyperparameters`; they are read anew at every step, so torch's schedulers work on
them. Where a hyperparameter follows a schedule of its own, the group shows its present value. State is kept per
parameter, under torch's names, so that a `state_dict` of `torch.optim.Adam` can be loaded and the other way round.
`p.grad` is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fallline.description import plain
from fallline.errors import FalllineError, InvalidHyperparameter, UnknownArgument, nearest
from fallline.optim.around_a_closure import landscape
from fallline.optim.base import Optimizer
from fallline.optim.groups import (
    Plan,
    arguments_of,
    follows_schedule,
    is_chain,
    refuse_to_move,
    saved_numbers,
)
from fallline.optim.kernels import DECOUPLED, Kernel, count, kernel_of, suits, suits_fused
from fallline.optim.loading import begun, exactly, in_our_order
from fallline.optim.schedules import Schedule
from fallline.optim.transform import Grouped, Numbers, Slots
from fallline.optim.work import Work, by_rule, gradient_of, in_pieces

P = ParamSpec("P")
R = TypeVar("R")


def _outside_compilation(function: Callable[P, R]) -> Callable[P, R]:
    """Runs as it is when a compiled step calls it. Like torch's own decorator, without importing the compiler yet."""
    return cast(Callable[P, R], torch._disable_dynamo(function))  # type: ignore[attr-defined]


# Keys that torch and its schedulers put into groups, and one of ours.
_TORCH_KEYS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
_OWN_KEY = "updates_done"


class TorchOptimizer(torch.optim.Optimizer):
    """Made by `Optimizer.as_torch`.

    Transforms that act on all parameters together see those of all groups at once.

    Attributes:
        rule: the optimizer that it runs.
        kernels: whether torch's own kernels may do the arithmetic, where torch has the same optimizer; `computed_by`
            tells where they do.
    """

    def __init__(self, params: Any, rule: Optimizer, *, steps: int | None = None, seed: int = 0) -> None:
        self.rule = rule
        self.steps = steps
        self.seed = seed
        self.kernels = True
        self.arguments = arguments_of(rule)
        self.schedules: list[dict[str, Any]] = []  # per group, the arguments that follow a schedule
        self._evaluating = False
        self._start_afresh()
        super().__init__(params, dict(self.arguments))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a key that is not an argument of the optimizer is an error that names the nearest one."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group = {param_group!r} is not a dict: give one with the key 'params'.")
        for key in param_group.keys() - _TORCH_KEYS - {_OWN_KEY} - self.arguments.keys():
            hint = nearest(key, self.arguments) if self.arguments else "It has none."
            raise UnknownArgument(f"a parameter group of {self.rule.name} has no {key!r}. {hint}")
        # A group that joins late is as far in training as the others.
        done = max((group[_OWN_KEY] for group in self.param_groups), default=0)
        given = {name: plain(param_group.get(name, value)) for name, value in self.arguments.items()}
        index = len(self.param_groups)
        rule = self._plan(index, given).rule  # an argument outside its domain is refused here, not at the first step
        schedules = {name: value for name, value in given.items() if follows_schedule(value)}
        present = {name: self._present(name, value, done) for name, value in schedules.items()}
        super().add_param_group({_OWN_KEY: done, **param_group, **present})
        try:
            rule.check(dict(self._named(index)))
        except Exception:
            self.param_groups.pop()
            raise
        self.schedules.append(schedules)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure.

        Args:
            closure: zeroes the gradients, computes the loss, goes backward and returns the loss. Optimizers that look
                at gradients elsewhere (`sam`) call it again there.
        """
        if torch.compiler.is_compiling():
            loss, works = _begin(self, closure)
            _end(self, works, [by_rule(work) if work.landscape is None else _uncompiled(work) for work in works])
            return loss
        loss = _evaluated(closure)
        for work in self._works(closure, kernels=self.kernels):
            self._keep([work], [by_rule(work)])
        self._advance()
        return loss

    @contextmanager
    def evaluation_parameters(self) -> Iterator[None]:
        """The model has the parameters that it is to be evaluated with, for as long as the block lasts.

        They are others than those that are trained for optimizers that average them (`schedule_free`,
        `ema_of_parameters`); for all others nothing happens.

        >>> import torch
        >>> from fallline.optim import adam
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = adam().as_torch(model.parameters())
        >>> with optimizer.evaluation_parameters():
        ...     prediction = model(torch.ones(1, 2))
        """
        if self._evaluating or not self.rule.moves_evaluation:
            yield
            return
        before: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for index in range(len(self.param_groups)):
                for p, tensor in self._evaluation_parameters(index):
                    before.append((p, p.detach().clone()))
                    p.copy_(tensor)
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False
            with torch.no_grad():
                for p, tensor in before:
                    p.copy_(tensor)

    @property
    def computed_by(self) -> list[str]:
        """What makes each group's step: the name of a torch function, or "the rule".

        A function steps back for single steps: for gradients that it cannot take, and under torch.compile.
        """
        plans = [self._plan(i, self._given(group)) for i, group in enumerate(self.param_groups)]
        return [plan.kernel.name if self.kernels and plan.kernel is not None else "the rule" for plan in plans]

    def state_dict(self) -> dict[str, Any]:
        """The state, in torch's form."""
        saved = super().state_dict()
        groups = [{name: saved_numbers(v) for name, v in group.items()} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of the same optimizer, or of its namesake in torch.optim.

        Where the parameters have names in both, each gets the state of its name, else that of its place. State follows
        the dtype and the device of its parameter, except for counts and other numbers that are kept in float64.

        Raises:
            FalllineError: when the state is of another optimizer, or of a parameter that is not there.
        """
        if self._evaluating:
            raise FalllineError(
                "the model has its evaluation parameters: leave evaluation_parameters() before loading."
            )
        found: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            for group in saved["param_groups"]:
                missing = self.arguments.keys() - group.keys() - {DECOUPLED}
                if missing:
                    raise FalllineError(
                        f"this state is of another optimizer: {self.rule.name} has {min(missing)!r}, its groups do not."
                    )
            found.update(in_our_order(saved, self.param_groups))
            if DECOUPLED in self.arguments:  # Adam's state from before torch 2.7
                old = {DECOUPLED: self.arguments[DECOUPLED]}
                found["param_groups"] = [{**old, **group} for group in found["param_groups"]]
            return found

        def after(_: torch.optim.Optimizer) -> None:
            groups = zip(self.param_groups, found["param_groups"], strict=True)
            for index, (group, saved) in enumerate(groups):
                plan = self._plan(index, self._given(group))
                for name, p, number in zip(self._names(index), group["params"], saved["params"], strict=True):
                    if number in found["state"]:
                        self.state[p] = exactly(found["state"][number], p, self._first_slots(plan, name, p))
                if _OWN_KEY not in saved:
                    counts = [float(self.state[p]["step"]) for p in group["params"] if "step" in self.state.get(p, {})]
                    group[_OWN_KEY] = int(max(counts, default=0))

        hooks = [  # after the user's own hooks that come before, and before those that come after
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _works(self, closure: Callable[[], Any] | None, *, kernels: bool) -> list[Work]:
        """What is to be done in this step: the parameters with a gradient, those together that the rule sees so.

        Args:
            kernels: what a kernel can do is done, and not among it.
        """
        if self._evaluating:
            raise FalllineError("the model has its evaluation parameters: leave evaluation_parameters() before step().")
        plans, present = [], []
        for index, (group, schedules) in enumerate(zip(self.param_groups, self.schedules, strict=True)):
            if schedules:
                self._refuse_second_schedule(group, schedules)
            plan = self._plan(index, self._given(group))
            if kernels and plan.kernel is not None and self._made_by_kernel(plan.kernel, plan, index):
                continue
            params = {name: p for name, p in self._named(index) if p.grad is not None}
            if params:
                plans.append(plan)
                present.append(params)
        if len(plans) > 1 and (plans[0].rule.together or plans[0].rule.looks_around):
            return [self._joint_work(plans, present, closure)]
        works = []
        for plan, params in zip(plans, present, strict=True):
            pieces = [params] if plan.rule.together else in_pieces(params)
            works += [
                self._work(plan, own, plan.numbers_on(next(iter(own.values())).device), closure) for own in pieces
            ]
        return works

    def _made_by_kernel(self, kernel: Kernel, plan: Plan, index: int) -> bool:
        """Makes a group's step with torch's kernel, if that takes its tensors as they are."""
        params, grads = [], []
        for p in self.param_groups[index]["params"]:
            grad = p.grad
            if grad is not None:
                params.append(p)
                grads.append(grad)
        if not params:
            return True
        if not suits(kernel, params, grads):
            return False
        needed = plan.program.slot_names | {"step"} if kernel.counts else plan.program.slot_names
        slots = []
        for i, p in enumerate(self.param_groups[index]["params"]):
            if p.grad is not None and needed:
                own = self.state.get(p)
                if own is None or not needed <= own.keys():
                    own = self.state[p] = self._slots(plan, self._names(index)[i], p)
                slots.append(own)
        if not needed:
            slots = [{}] * len(params)
        fused = kernel.fused and suits_fused(params, grads, slots)
        kernel.run(params, grads, slots, kernel.numbers(plan.arguments), fused)
        return True

    def _joint_work(
        self, plans: list[Plan], present: list[dict[str, Tensor]], closure: Callable[[], Any] | None
    ) -> Work:
        """All groups in one call of the rule, each with its own numbers."""
        first = max(plans, key=lambda plan: len(plan.rule.hyperparameters))
        alike = first.rule.structure
        if any(alike not in (plan.rule.structure, self._as_if_decaying(plan).structure) for plan in plans):
            raise InvalidHyperparameter(
                f"{self.rule.name} acts on all parameters together, so its groups may differ in numbers, but not in "
                "what is done with them (an option such as use_bias_correction)."
            )
        params = {name: p for own in present for name, p in own.items()}
        device = next(iter(params.values())).device
        group_of = {name: index for index, own in enumerate(present) for name in own}
        slots = {name: self._slots(plans[group_of[name]], name, p) for name, p in params.items()}
        none = torch.zeros((), dtype=torch.float64, device=device)  # the weight decay of a group that has none
        each = [{**dict.fromkeys(first.rule.numbers, none), **plan.numbers_on(device)} for plan in plans]
        return self._work(first, params, Grouped(each, group_of), closure, slots)

    def _as_if_decaying(self, plan: Plan) -> Optimizer:
        """The rule of a group with weight decay, be it 0: groups may differ in whether they have some."""
        if is_chain(self.rule) or plan.arguments.get("weight_decay") != 0:
            return plan.rule
        return self._rule({**plan.arguments, "weight_decay": 1.0})

    def _work(
        self,
        plan: Plan,
        params: dict[str, Tensor],
        numbers: Numbers,
        closure: Callable[[], Any] | None,
        slots: dict[str, Slots] | None = None,
    ) -> Work:
        step, around = None, None
        if plan.program.has_phases:
            done = max(group[_OWN_KEY] for group in self.param_groups)
            # Steps of one phase go under the number of the first of them, so that they are compiled once.
            step = self._first_of_phase.setdefault(plan.program.phase(done), done)
            if plan.program.surveys(step):
                around = landscape(self.rule.name, params, closure)
        device = next(iter(params.values())).device
        if device not in self._begun:
            self._begun[device] = torch.zeros((), dtype=torch.float64, device=device)
        if slots is None:
            slots = {name: self._slots(plan, name, p) for name, p in params.items()}
        grads = {name: gradient_of(p) for name, p in params.items()}
        return Work(plan, params, grads, slots, numbers, self._begun[device], step, around)

    def _keep(self, works: list[Work], made: list[dict[str, Slots]]) -> None:
        """Keeps the new state."""
        for work, new in zip(works, made, strict=True):
            for name, p in work.params.items():
                if new[name]:
                    self.state[p] = new[name]
            if work.plan.kernel is not None and work.plan.kernel.counts and "step" not in work.plan.rule.slot_names:
                count([new[name]["step"] for name in work.params])

    def _advance(self) -> None:
        for group, schedules in zip(self.param_groups, self.schedules, strict=True):
            group[_OWN_KEY] += 1
            for name, schedule in schedules.items():
                group[name] = self._present(name, schedule, group[_OWN_KEY])

    def _slots(self, plan: Plan, name: str, p: Tensor) -> Slots:
        """The state of a parameter; what a change of the group's arguments adds to it starts as at the first step."""
        kept: Slots = self.state.get(p, {})
        program, needed = self._needed.get(p, (None, frozenset()))
        if program is plan.program and needed <= kept.keys():
            return kept
        first = self._first_slots(plan, name, p)  # not all parameters need all slots of the rule
        self._needed[p] = plan.program, frozenset(first)
        return {**first, **begun(kept, first)}

    def _first_slots(self, plan: Plan, name: str, p: Tensor) -> Slots:
        """The state of a parameter before its first update."""
        started = plan.program.init({name: p.detach()}, plan.numbers_on(p.device), steps=self.steps, seed=self.seed)
        made: Slots = started["slots"][name]
        if plan.kernel is not None and plan.kernel.counts and "step" not in made:
            made["step"] = torch.zeros((), dtype=torch.float64, device=p.device)
        return made

    def _evaluation_parameters(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """The parameters of a group that are evaluated elsewhere, each with the tensor that it is evaluated with."""
        group, schedules = self.param_groups[index], self.schedules[index]
        latest = max(group[_OWN_KEY] - 1, 0)
        given = {**self._given(group), **{n: self._present(n, value, latest) for n, value in schedules.items()}}
        rule = self._rule(given)
        first = {name: rule.init({name: p.detach()})["slots"][name] for name, p in self._named(index)}
        trained = {name: p for name, p in self._named(index) if first[name].keys() <= self.state.get(p, {}).keys()}
        if not trained:
            return []
        state = {"step": torch.zeros((), dtype=torch.float64), "slots": {n: self.state[p] for n, p in trained.items()}}
        found = rule.evaluation_parameters(state, {name: p.detach() for name, p in trained.items()})
        return [(p, found[name]) for name, p in trained.items()]

    def _names(self, index: int) -> list[str]:
        """The names of a group's parameters where each has its own, or else their running numbers over all groups."""
        group = self.param_groups[index]
        if "param_names" in group:
            if len(self._names_of) != len(self.param_groups):
                every = [name for each in self.param_groups for name in each["param_names"]]
                apart = len(set(every)) == len(every)
                self._names_of[:] = [list(each["param_names"]) if apart else [] for each in self.param_groups]
            if self._names_of[index] or not group["params"]:
                return self._names_of[index]
        before = sum(len(each["params"]) for each in self.param_groups[:index])
        return [str(before + i) for i in range(len(group["params"]))]

    def _named(self, index: int) -> Iterator[tuple[str, Tensor]]:
        return zip(self._names(index), self.param_groups[index]["params"], strict=True)

    def _given(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {name: plain(group[name]) for name in self.arguments}

    def _plan(self, index: int, arguments: dict[str, Any]) -> Plan:
        """How the group is updated with these arguments; the latest plan is kept, because they seldom change."""
        plan = self._plans.get(index)
        if plan is None or plan.arguments != arguments:
            rule = self._rule(arguments)
            if plan is not None and any(group[_OWN_KEY] for group in self.param_groups):
                refuse_to_move(plan.rule, rule)
            others = (other.program for other in self._plans.values())
            program = next((other for other in others if other.structure == rule.structure), rule)
            kernel = kernel_of(rule) if not any(follows_schedule(value) for value in arguments.values()) else None
            plan = self._plans[index] = Plan(arguments, rule, program, kernel)
        return plan

    def _rule(self, arguments: dict[str, Any]) -> Optimizer:
        call = self.rule.call
        if call is None or is_chain(self.rule):
            return self.rule.with_numbers(arguments)
        made: Optimizer = call.function(**arguments)
        return made

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
            expected = self._present(name, schedule, group[_OWN_KEY])
            if plain(group[name]) != expected:
                raise InvalidHyperparameter(
                    f"{name} follows {schedule!r} over {self.steps} steps and is {expected!r} after "
                    f"{group[_OWN_KEY]}, but was set to {group[name]!r}: use one schedule, here or outside."
                )

    def _start_afresh(self) -> None:
        """What is only remembered to save time, and is not copied or saved."""
        self._plans: dict[int, Plan] = {}
        self._names_of: list[list[str]] = []  # of each group, where names do not repeat
        self._needed: dict[Tensor, tuple[Optimizer, frozenset[str]]] = {}  # the slots that a parameter has
        self._begun: dict[torch.device, Tensor] = {}
        self._first_of_phase: dict[Any, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "steps", "seed", "kernels", "arguments", "schedules")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._evaluating = False
        self._start_afresh()
        for group in self.param_groups:
            group.setdefault(_OWN_KEY, 0)

    def __repr__(self) -> str:
        return f"TorchOptimizer({self.rule!r}, {len(self.param_groups)} parameter group(s))"


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


# A compiled step: what comes before and after the arithmetic runs as it is, so that numbers reach it as tensors.
@_outside_compilation
def _begin(optimizer: TorchOptimizer, closure: Callable[[], Any] | None) -> tuple[Any, list[Work]]:
    return _evaluated(closure), optimizer._works(closure, kernels=False)


@_outside_compilation
def _end(optimizer: TorchOptimizer, works: list[Work], made: list[dict[str, Slots]]) -> None:
    optimizer._keep(works, made)
    optimizer._advance()


_uncompiled = _outside_compilation(by_rule)
