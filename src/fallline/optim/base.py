"""What an optimizer is: a chain of transforms, a pure value, bound to no model.

A transform takes gradients (or the updates of the transform before it) to updates. It is written once, out of place,
for one parameter tensor (`per_tensor`) or for all of them together. Hyperparameters reach it as float64 tensors that
broadcast against the parameter, so the same lines serve one model (0-dimensional numbers), and a population whose
parameters are stacked (one number per trial). The torch optimizer that users take away, the vectorised engine and the
sequential engine all run these rules; nothing else in fallline knows how an optimizer updates.

State is a plain dictionary: `{"step": updates done, "slots": {parameter name: {slot name: tensor}}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fallline.errors import FalllineError, InvalidHyperparameter
from fallline.optim.checks import real
from fallline.optim.description import Call, described, leaves, remembers_its_call, search_dimensions, substitute
from fallline.optim.dimensions import Dimension
from fallline.optim.schedules import Schedule

if TYPE_CHECKING:
    from fallline.optim.torch_adapter import TorchOptimizer

Number = float | Schedule | Dimension
Params = Mapping[str, Tensor]
Slots = dict[str, Tensor]
Numbers = Mapping[str, Tensor]
State = dict[str, Any]
Rule = Callable[[Tensor, Slots, Tensor, Numbers], tuple[Tensor, Slots]]
Apply = Callable[[dict[str, Tensor], dict[str, Slots], Params, Numbers], tuple[dict[str, Tensor], dict[str, Slots]]]


@remembers_its_call
@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """One stage of an optimizer.

    Attributes:
        name: what it does: `scale_by_adam`.
        hyperparameters: its numbers by name; a number or a `Schedule`.
        slots: per parameter, makes the initial state tensors.
        apply: (updates, slots, parameters, numbers) -> (updates, slots that changed), each by parameter name; pure.
        elementwise: whether an element's update depends on that element alone, so that parameters may be laid out in
            one flat vector.
        counts: whether `apply` reads the slot "step", the number of the parameter's update counted from 1.
    """

    name: str
    hyperparameters: Mapping[str, Number]
    slots: Callable[[Tensor], Slots]
    apply: Apply
    elementwise: bool = False
    counts: bool = False
    call: Call | None = None

    @property
    def structure(self) -> tuple[object, ...]:
        """What is static: the function that made it and its arguments that are no numbers of the rule (nesterov)."""
        if self.call is None:
            return (self,)  # nothing is known of its rule, so it is like no other
        static = {k: v for k, v in leaves(self.call) if k.partition(".")[0] not in self.hyperparameters}
        return (Call(self.call.function, static), *self.hyperparameters)

    def with_numbers(self, values: Mapping[str, Number]) -> Transform:
        """The same transform with other hyperparameters."""
        made: Transform = self if self.call is None else self.call.with_arguments(values)
        changed = {name: values.get(name, value) for name, value in made.hyperparameters.items()}
        return made if changed == made.hyperparameters else replace(made, hyperparameters=changed)


def per_tensor(
    name: str,
    rule: Rule,
    hyperparameters: Mapping[str, Number],
    *,
    slots: Iterable[str] = (),
    counts: bool = False,
    elementwise: bool = False,
) -> Transform:
    """A transform from a rule for one tensor: `rule(update, slots, parameter, numbers) -> (update, changed slots)`.

    Args:
        slots: names of state tensors shaped like the parameter that start at zero.
        counts: whether the rule needs `slots["step"]`, the number of this update counted from 1.
        elementwise: whether an element's update depends on that element alone (no norm or mean over the tensor):
            such rules run many times faster, because they see all parameters of all trials as one tensor.

    >>> import torch
    >>> sign = per_tensor("sign", lambda g, slots, p, n: (-n["lr"].to(g.dtype) * g.sign(), {}), {"lr": 0.5})
    >>> p = {"w": torch.zeros(2)}
    >>> chain(sign).update({"w": torch.tensor([3.0, -4.0])}, chain(sign).init(p), p)[0]["w"]
    tensor([-0.5000,  0.5000])
    """
    names = tuple(slots)
    for number, value in hyperparameters.items():
        if not isinstance(value, Schedule):
            real(number, value)

    def initial(parameter: Tensor) -> Slots:
        return {slot: torch.zeros_like(parameter) for slot in names}

    def apply(
        updates: dict[str, Tensor], state: dict[str, Slots], parameters: Params, numbers: Numbers
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        new_updates, changed = {}, {}
        for key, update in updates.items():
            new_updates[key], changed[key] = rule(update, state[key], parameters[key], numbers)
        return new_updates, changed

    return Transform(name, hyperparameters, initial, apply, elementwise, counts)


def cast(like: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers computed in float64 (bias corrections lose digits in float32), rounded once to the tensor's dtype."""
    return tuple(number.to(like.dtype) for number in numbers)


@dataclass(frozen=True)
class Stage:
    """A transform in its place: under which names the optimizer keeps its numbers and its slots."""

    transform: Transform
    numbers: Mapping[str, str]
    slots: Mapping[str, str]

    def apply(
        self, updates: dict[str, Tensor], state: dict[str, Slots], params: Params, numbers: Numbers
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        """What the transform makes of the updates, and the whole state after it."""
        own = {key: {name: state[key][kept] for name, kept in self.slots.items()} for key in updates}
        updates, changed = self.transform.apply(
            updates, own, params, {name: numbers[kept] for name, kept in self.numbers.items()}
        )
        new = {key: {self.slots[name]: slot for name, slot in slots.items()} for key, slots in changed.items()}
        return updates, {key: {**slots, **new.get(key, {})} for key, slots in state.items()}


@remembers_its_call
@dataclass(frozen=True, eq=False, repr=False)
class Optimizer:
    """An update rule and its hyperparameters: transforms applied one after the other.

    Made by `chain` and by the named optimizers (`sgd`, `adam`, …). With a search dimension among its arguments it is a
    template: a sweep makes concrete optimizers of it, and it cannot be run itself.
    """

    transforms: tuple[Transform, ...]
    call: Call | None = None

    @property
    def name(self) -> str:
        """The name of the function that made it: `adam`, `chain` …"""
        return self.call.name if self.call is not None else "chain"

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument by name, tuples and schedules spelt out: `{"lr": 0.001, "beta1": 0.9, …}`."""
        found: dict[str, Any] = {}
        for name, value in leaves(self):
            found[_free(name, found)] = value
        return found

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The search dimensions among the arguments, by the argument's name."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Dimension)}

    @property
    def structure(self) -> tuple[object, ...]:
        """What is static: optimizers of equal structure differ only in numbers and are updated together."""
        kinds = [(name, number.kind) for name, number in self.hyperparameters.items() if isinstance(number, Schedule)]
        return (*(transform.structure for transform in self.transforms), *kinds)

    @property
    def elementwise(self) -> bool:
        """Whether each element of a parameter is updated by itself."""
        return all(transform.elementwise for transform in self.transforms)

    @property
    def hyperparameters(self) -> dict[str, Number]:
        """The numbers that the rule reads, by name; of two with one name the second is `eps_2`."""
        return {
            kept: stage.transform.hyperparameters[name] for stage in self.stages for name, kept in stage.numbers.items()
        }

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The transforms with the names under which their numbers and slots are kept apart."""
        numbers: dict[str, None] = {}
        slots: dict[str, None] = {"step": None}
        made = []
        for transform in self.transforms:
            own_numbers = {name: _free(name, numbers) for name in transform.hyperparameters}
            own_slots = {name: _free(name, slots) for name in transform.slots(torch.zeros(1))}
            numbers.update(dict.fromkeys(own_numbers.values()))
            slots.update(dict.fromkeys(own_slots.values()))
            made.append(Stage(transform, own_numbers, own_slots | ({"step": "step"} if transform.counts else {})))
        return tuple(made)

    @cached_property
    def slot_names(self) -> frozenset[str]:
        """The names of the state tensors that each parameter has."""
        return frozenset(kept for stage in self.stages for kept in stage.slots.values())

    def with_numbers(self, values: Mapping[str, Number]) -> Optimizer:
        """The chain of the same transforms with other `hyperparameters`."""
        return chain(
            *(
                stage.transform.with_numbers({name: values[kept] for name, kept in stage.numbers.items()})
                for stage in self.stages
            )
        )

    @property
    def numbers(self) -> dict[str, float]:
        """`hyperparameters` as plain data: a schedule's numbers stand under `name:number`."""
        data: dict[str, float] = {}
        for name, value in self.hyperparameters.items():
            if isinstance(value, Schedule):
                data.update({f"{name}:{n}": float(v) for n, v in value.numbers.items() if not isinstance(v, Dimension)})
            elif not isinstance(value, Dimension):
                data[name] = float(value)
        return data

    def chosen(self, values: Mapping[int, object]) -> Optimizer:
        """The concrete optimizer in which dimension `d` has become `values[id(d)]`."""
        made: Optimizer = substitute(self, values)
        return made

    def init(self, params: Params) -> State:
        """The state before the first update.

        Args:
            params: parameter tensors by name.

        >>> import torch
        >>> from fallline.optim import adam
        >>> state = adam().init({"w": torch.ones(2)})
        >>> sorted(state["slots"]["w"])
        ['exp_avg', 'exp_avg_sq', 'step']
        """
        self._refuse_template()
        for name, parameter in params.items():
            if not parameter.is_floating_point():
                raise FalllineError(
                    f"parameter {name!r} is {parameter.dtype}: an optimizer moves real floating-point ones."
                )
        device = next(iter(params.values())).device if params else None
        slots = {name: self._slots(parameter) for name, parameter in params.items()}
        return {"step": torch.zeros((), dtype=torch.float64, device=device), "slots": slots}

    def update(
        self,
        grads: Params,
        state: State,
        params: Params,
        numbers: Numbers | None = None,
        *,
        steps: float | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """One step, pure: `new = params + updates`. Nothing that is passed in is changed.

        Args:
            grads: gradients by parameter name; a parameter without one is left as it is.
            state: from `init` or from the update before.
            params: the parameters at which the gradients were taken.
            numbers: replaces `self.numbers`, as float64 tensors (the engines pass one value per trial).
            steps: how many updates training has in all; needed where a hyperparameter is a schedule.

        Returns:
            The updates, by the names in `grads`, and the new state.

        >>> import torch
        >>> from fallline.optim import sgd
        >>> p, g = {"w": torch.ones(2)}, {"w": torch.ones(2)}
        >>> updates, _ = sgd(lr=0.5).update(g, sgd(lr=0.5).init(p), p)
        >>> updates["w"]
        tensor([-0.5000, -0.5000])
        """
        self._refuse_template()
        for name, grad in grads.items():
            if name not in params or name not in state["slots"]:
                where = "parameter in params" if name not in params else "parameter in the state: make it with init"
                raise FalllineError(f"there is a gradient for {name!r}, but no such {where}.")
            if grad.shape != params[name].shape:
                shapes = f"{tuple(grad.shape)}, the parameter {tuple(params[name].shape)}"
                raise FalllineError(f"the gradient of {name!r} has shape {shapes}: they must be the same.")
        if numbers is None:
            like = state["step"]
            numbers = {n: torch.tensor(v, dtype=torch.float64, device=like.device) for n, v in self.numbers.items()}
        current = self._at(numbers, state["step"], steps)
        updates = dict(grads)
        slots = {name: state["slots"][name] for name in grads}
        if "step" in self.slot_names:
            slots = {name: {**own, "step": own["step"] + 1} for name, own in slots.items()}
        for stage in self.stages:
            updates, slots = stage.apply(updates, slots, params, current)
        return updates, {"step": state["step"] + 1, "slots": {**state["slots"], **slots}}

    def as_torch(self, params: Any, *, steps: int | None = None) -> TorchOptimizer:
        """A `torch.optim.Optimizer` that runs this rule on a model's parameters.

        Args:
            params: `model.parameters()`, `model.named_parameters()` or parameter groups.
            steps: how many steps training has in all; needed where a hyperparameter is a schedule.

        >>> import torch
        >>> from fallline.optim import adam
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = adam(lr=0.01).as_torch(model.parameters())
        >>> isinstance(optimizer, torch.optim.Optimizer)
        True
        """
        from fallline.optim.torch_adapter import TorchOptimizer

        self._refuse_template()
        return TorchOptimizer(params, self, steps=steps)

    def _slots(self, parameter: Tensor) -> Slots:
        made: Slots = {}
        if "step" in self.slot_names:
            made["step"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
        for stage in self.stages:
            made.update({stage.slots[name]: slot for name, slot in stage.transform.slots(parameter).items()})
        return made

    @cached_property
    def _schedules(self) -> dict[str, Schedule]:
        return {name: value for name, value in self.hyperparameters.items() if isinstance(value, Schedule)}

    @cached_property
    def _is_template(self) -> bool:
        return self.call is not None and any(True for _ in search_dimensions(self.call))

    def _at(self, numbers: Numbers, step: Tensor, steps: float | None) -> Numbers:
        """The numbers that the rule reads at this step: schedules evaluated, the rest as they are."""
        current = dict(numbers)
        for name, schedule in self._schedules.items():
            own = {inner: numbers[f"{name}:{inner}"] for inner in schedule.numbers}
            current[name] = schedule.curve(torch.clamp(step / self._checked(steps), max=1.0), own)
        return current

    def _checked(self, steps: float | None) -> float:
        """The number of steps, which schedules need."""
        if steps is None or not steps > 0:
            name, schedule = next(iter(self._schedules.items()))
            raise InvalidHyperparameter(
                f"{name} follows a {schedule.kind} schedule, which needs the number of steps, not {steps!r}: "
                "give steps=…."
            )
        return steps

    def _refuse_template(self) -> None:
        if self._is_template:
            names = ", ".join(self.dimensions)
            raise InvalidHyperparameter(
                f"{self!r} leaves {names} to be searched: give numbers, or pass the optimizer to fl.sweep."
            )


@described
def chain(*transforms: Transform | Optimizer) -> Optimizer:
    """Transforms applied one after the other, as one optimizer.

    Two transforms with a hyperparameter or a state tensor of one name keep them apart: the second `eps` is `eps_2`.

    >>> from fallline.optim import clip_by_global_norm, scale_by_adam, scale_by_learning_rate
    >>> chain(clip_by_global_norm(1.0), scale_by_adam(), scale_by_learning_rate(1e-3)).numbers["max_norm"]
    1.0
    """
    stages: list[Transform] = []
    for part in transforms:
        if not isinstance(part, Transform | Optimizer):
            raise FalllineError(f"chain() takes transforms and optimizers, not {part!r}.")
        stages.extend(part.transforms if isinstance(part, Optimizer) else [part])
    return Optimizer(tuple(stages))


def _free(name: str, used: Mapping[str, object]) -> str:
    """The name, or the first of `name_2`, `name_3` … that is not in use."""
    count, candidate = 1, name
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
