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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fallline.errors import FalllineError, InvalidHyperparameter
from fallline.optim.description import Call, code, described, leaves, search_dimensions, substitute
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


@dataclass(frozen=True)
class Transform:
    """One stage of an optimizer.

    Attributes:
        name: what it does: `scale_by_adam`.
        hyperparameters: its numbers by name; a number or a `Schedule`.
        slots: per parameter, makes the initial state tensors.
        apply: (updates, slots, parameters, numbers) -> (updates, slots), each by parameter name; pure.
        elementwise: whether an element's update depends on that element alone, so that parameters may be laid out in
            one flat vector.
        structure: what is static about it (flags such as nesterov); trials of one structure are updated together.
    """

    name: str
    hyperparameters: Mapping[str, Number]
    slots: Callable[[Tensor], Slots]
    apply: Apply
    elementwise: bool
    structure: tuple[object, ...] = ()
    call: Call | None = None

    def __repr__(self) -> str:
        return code(self, "fl.optim.")


def per_tensor(
    name: str,
    rule: Rule,
    hyperparameters: Mapping[str, Number],
    *,
    slots: Iterable[str] = (),
    counts: bool = False,
    elementwise: bool = True,
    structure: tuple[object, ...] = (),
) -> Transform:
    """A transform from a rule for one tensor: `rule(update, slots, parameter, numbers) -> (update, slots)`.

    Args:
        slots: names of state tensors shaped like the parameter that start at zero.
        counts: whether the rule needs `slots["step"]`, the number of this update counted from 1.
    """
    names = tuple(slots)

    def initial(parameter: Tensor) -> Slots:
        made = {slot: torch.zeros_like(parameter) for slot in names}
        if counts:
            made["step"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
        return made

    def apply(
        updates: dict[str, Tensor], state: dict[str, Slots], parameters: Params, numbers: Numbers
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        new_updates, new_state = {}, {}
        for key, update in updates.items():
            own = state[key]
            if counts:
                own = {**own, "step": own["step"] + 1}
            new_updates[key], changed = rule(update, own, parameters[key], numbers)
            new_state[key] = {**own, **changed}
        return new_updates, new_state

    return Transform(name, hyperparameters, initial, apply, elementwise, (name, *structure))


def cast(like: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers computed in float64 (bias corrections lose digits in float32), rounded once to the tensor's dtype."""
    return tuple(number.to(like.dtype) for number in numbers)


@dataclass(frozen=True)
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
        """The numbers that the rule reads, by name."""
        return {name: value for t in self.transforms for name, value in t.hyperparameters.items()}

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
        unknown = grads.keys() - params.keys()
        if unknown:
            raise FalllineError(f"there is a gradient for {min(unknown)!r}, but no such parameter in params.")
        if numbers is None:
            like = state["step"]
            numbers = {n: torch.tensor(v, dtype=torch.float64, device=like.device) for n, v in self.numbers.items()}
        current = self._at(numbers, state["step"], steps)
        updates = dict(grads)
        slots = {name: state["slots"][name] for name in grads}
        for transform in self.transforms:
            updates, slots = transform.apply(updates, slots, params, current)
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

    def __repr__(self) -> str:
        return code(self, "fl.optim.")

    def _slots(self, parameter: Tensor) -> Slots:
        return {name: slot for transform in self.transforms for name, slot in transform.slots(parameter).items()}

    def _at(self, numbers: Numbers, step: Tensor, steps: float | None) -> Numbers:
        """The numbers that the rule reads at this step: schedules evaluated, the rest as they are."""
        current = dict(numbers)
        for name, schedule in self.hyperparameters.items():
            if not isinstance(schedule, Schedule):
                continue
            if steps is None:
                raise InvalidHyperparameter(
                    f"{name} follows a {schedule.kind} schedule, which needs the number of steps: give steps=…."
                )
            own = {inner: numbers[f"{name}:{inner}"] for inner in schedule.numbers}
            current[name] = schedule.curve(step / steps, own)
        return current

    def _refuse_template(self) -> None:
        if self.call is not None and any(True for _ in search_dimensions(self.call)):
            names = ", ".join(self.dimensions)
            raise InvalidHyperparameter(
                f"{self!r} leaves {names} to be searched: give numbers, or pass the optimizer to fl.sweep."
            )


@described
def chain(*transforms: Transform | Optimizer) -> Optimizer:
    """Transforms applied one after the other, as one optimizer.

    Two transforms with a hyperparameter or a state tensor of the same name keep them apart: the second `eps` is `eps_2`.

    >>> from fallline.optim import clip_by_global_norm, scale_by_adam, scale_by_learning_rate
    >>> chain(clip_by_global_norm(1.0), scale_by_adam(), scale_by_learning_rate(1e-3)).numbers["max_norm"]
    1.0
    """
    stages: list[Transform] = []
    for part in transforms:
        if not isinstance(part, Transform | Optimizer):
            raise FalllineError(f"chain() takes transforms and optimizers, not {part!r}.")
        stages.extend(part.transforms if isinstance(part, Optimizer) else [part])
    used: dict[str, None] = {}
    used_slots: dict[str, None] = {}
    return Optimizer(tuple(_kept_apart(stage, used, used_slots) for stage in stages))


def _free(name: str, used: Mapping[str, object]) -> str:
    return name if name not in used else _free_from(name, used, 2)


def _free_from(name: str, used: Mapping[str, object], count: int) -> str:
    candidate = f"{name}_{count}"
    return candidate if candidate not in used else _free_from(name, used, count + 1)


def _kept_apart(stage: Transform, used: dict[str, None], used_slots: dict[str, None]) -> Transform:
    """The transform with its hyperparameters and slots renamed where an earlier one has taken their names."""
    outer = {name: _free(name, used) for name in stage.hyperparameters}
    slots = {name: _free(name, used_slots) for name in stage.slots(torch.zeros(1))}
    used.update(dict.fromkeys(outer.values()))
    used_slots.update(dict.fromkeys(slots.values()))
    if all(a == b for a, b in (*outer.items(), *slots.items())):
        return stage

    def initial(parameter: Tensor) -> Slots:
        return {slots[name]: slot for name, slot in stage.slots(parameter).items()}

    def apply(
        updates: dict[str, Tensor], state: dict[str, Slots], parameters: Params, numbers: Numbers
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        own = {key: {name: kept[new] for name, new in slots.items()} for key, kept in state.items()}
        updates, own = stage.apply(updates, own, parameters, {name: numbers[new] for name, new in outer.items()})
        back = {key: {**state[key], **{slots[n]: t for n, t in changed.items()}} for key, changed in own.items()}
        return updates, back

    renamed = {outer[name]: value for name, value in stage.hyperparameters.items()}
    structure = (*stage.structure, *outer.values(), *slots.values())
    return replace(stage, hyperparameters=renamed, slots=initial, apply=apply, structure=structure)
