"""What a transform is: one stage of an optimizer, written once, out of place.

`per_tensor` makes one from a rule for one parameter tensor. Its numbers are float64 tensors that broadcast against the
parameter: 0-dimensional for one model, one number per row for a population.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fallline.description import Call, item_name, remembers_its_call
from fallline.dimensions import Dimension
from fallline.errors import InvalidHyperparameter
from fallline.optim.checks import real
from fallline.optim.landscape import Landscape
from fallline.optim.schedules import Schedule

Number = float | Schedule | Dimension
Params = Mapping[str, Tensor]
Slots = dict[str, Tensor]
Numbers = Mapping[str, Tensor]
# (update, slots, parameter, numbers) -> (update, changed slots); with phases, the phase is a fifth argument.
Rule = Callable[..., tuple[Tensor, Slots]]
# The slots that the optimizer keeps itself, for the transforms that ask for them.
OWN_SLOTS = ("step", "seed")


@dataclass(frozen=True)
class Moment:
    """What a transform may know of a step besides tensors. Nothing in it depends on the value of a tensor.

    Attributes:
        phase: what `Transform.phase` said of this step.
        landscape: the loss around the parameters, at the steps for which `Transform.surveys` asked for it.
    """

    phase: Hashable = None
    landscape: Landscape | None = None


Apply = Callable[
    [dict[str, Tensor], Mapping[str, Slots], Params, Numbers, Moment], tuple[dict[str, Tensor], dict[str, Slots]]
]
Seed = int | Tensor
Initial = Callable[[str, Tensor, Numbers, Seed], Slots]
# What a parameter's state starts with: (parameter, numbers) -> state tensors.
Start = Callable[[Tensor, Numbers], Mapping[str, Tensor | None]]
Evaluation = Callable[[Params, Mapping[str, Slots], Numbers], dict[str, Tensor]]


def no_slots(name: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
    """The state of a transform that keeps none."""
    return {}


@remembers_its_call
@dataclass(frozen=True, eq=False, repr=False)
class Transform:
    """One stage of an optimizer.

    Attributes:
        name: what it does: `scale_by_adam`.
        hyperparameters: its numbers by name; a number or a `Schedule`.
        apply: (updates, slots, parameters, numbers, moment) -> (updates, slots that changed), each by parameter name;
            pure.
        slot_names: the state tensors that it keeps for a parameter (for some parameters perhaps only some of them).
        slots: (parameter name, parameter, numbers, seed of random numbers) -> the initial state tensors.
        elementwise: whether an element's update depends on that element alone, so that parameters may be laid out in
            one flat vector.
        together: whether it looks at all parameters at once (a norm over all of them), so that they must not be handed
            to it in parts.
        counts: whether `apply` reads the slot "step", the number of the parameter's update counted from 1.
        draws: whether `apply` reads the slot "seed", from which `random` makes random numbers.
        evaluation: (parameters, slots, numbers) -> the parameters with which the model is to be evaluated, if they
            are others than those that are trained.
        steady: numbers that must stay what they are while training goes on.
        phase: (number of the update, from 0) -> what is static about it: whether a preconditioner is renewed, say.
        surveys: (number of the update, from 0) -> whether it looks at the loss around the parameters, too.
        curves: whether it looks at the curvature there, for which gradients must be differentiable themselves.
        check: refuses a parameter that it cannot train.
        parts: the optimizers inside, each with the names under which its numbers and slots are kept.
    """

    name: str
    hyperparameters: Mapping[str, Number]
    apply: Apply
    slot_names: tuple[str, ...] = ()
    slots: Initial = no_slots
    elementwise: bool = False
    together: bool = False
    counts: bool = False
    draws: bool = False
    evaluation: Evaluation | None = None
    steady: tuple[str, ...] = ()
    phase: Callable[[int], Hashable] | None = None
    surveys: Callable[[int], bool] | None = None
    curves: bool = False
    check: Callable[[str, Tensor], None] | None = None
    parts: tuple[Stage, ...] = ()
    call: Call | None = None

    @property
    def structure(self) -> object:
        """What is static: the function that made it, and its arguments that are no numbers of the rule (nesterov)."""
        if self.call is None:
            return self  # nothing is known of its rule, so it is like no other
        return Call(
            self.call.function,
            {name: self._static(name, value) for name, value in self.call.arguments.items()},
            tuple(self._static("", value) for value in self.call.extra),
        ), tuple(self.hyperparameters)

    def with_numbers(self, values: Mapping[str, Number]) -> Transform:
        """The same transform with other hyperparameters."""
        made = self
        if self.call is not None:
            parts = iter(self.parts)

            def renewed(value: Any) -> Any:
                if isinstance(value, Transform) or hasattr(value, "transforms"):
                    return value.with_numbers(next(parts).own(values))
                if isinstance(value, Mapping):
                    return {name: renewed(item) for name, item in value.items()}
                return value

            call = replace(
                self.call,
                arguments={name: renewed(value) for name, value in self.call.arguments.items()},
                extra=tuple(renewed(value) for value in self.call.extra),
            )
            inside = {kept for part in self.parts for kept in part.numbers.values()}
            made = call.with_arguments({name: value for name, value in values.items() if name not in inside})
        changed = {name: values.get(name, value) for name, value in made.hyperparameters.items()}
        return made if changed == made.hyperparameters else replace(made, hyperparameters=changed)

    def _static(self, name: str, value: Any) -> Any:
        """An argument with the rule's numbers left out."""
        if hasattr(value, "structure"):
            return value.structure
        if isinstance(value, tuple):
            return tuple(self._static(item_name(name, i), item) for i, item in enumerate(value))
        if isinstance(value, Mapping):
            return tuple((key, self._static("", item)) for key, item in value.items())
        inside = {kept for part in self.parts for kept in part.numbers.values()}
        return None if name in self.hyperparameters and name not in inside else value


def per_tensor(
    name: str,
    rule: Rule,
    hyperparameters: Mapping[str, Number],
    *,
    slots: Iterable[str] = (),
    initial: Start | None = None,
    counts: bool = False,
    draws: bool = False,
    elementwise: bool = False,
    check: Callable[[str, Tensor], None] | None = None,
    phase: Callable[[int], Hashable] | None = None,
    evaluation: Callable[[Tensor, Slots, Numbers], Tensor] | None = None,
) -> Transform:
    """A transform from a rule for one tensor: `rule(update, slots, parameter, numbers) -> (update, changed slots)`.

    Args:
        slots: names of the state tensors; shaped like the parameter and zero at first, unless `initial` says otherwise.
        initial: (parameter, numbers) -> the state tensors that do not start at zero, or have another shape. A slot that
            a parameter does not need (a matrix's, for a vector) may be None there.
        counts: whether the rule needs `slots["step"]`, the number of this update counted from 1.
        draws: whether the rule needs `slots["seed"]`, for random numbers.
        elementwise: whether an element's update depends on that element alone (no norm or mean over the tensor):
            such rules run many times faster, because they see all parameters of all trials as one tensor.
        check: refuses (name, parameter) that the rule cannot train.
        phase: see `Transform`; with it the rule takes the phase as a fifth argument.
        evaluation: (parameter, slots, numbers) -> what the model is to be evaluated with.

    >>> import torch
    >>> import fallline as fl
    >>> sign = per_tensor("sign", lambda g, slots, p, n: (-n["lr"].to(g.dtype) * g.sign(), {}), {"lr": 0.5})
    >>> p, rule = {"w": torch.zeros(2)}, fl.optim.chain(sign)
    >>> rule.update({"w": torch.tensor([3.0, -4.0])}, rule.init(p), p)[0]["w"]
    tensor([-0.5000,  0.5000])
    """
    names = tuple(slots)
    for number, value in hyperparameters.items():
        if not isinstance(value, Schedule):
            real(number, value)

    starting = initially(names, initial)

    def apply(
        updates: dict[str, Tensor], state: Mapping[str, Slots], parameters: Params, numbers: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        new_updates, changed = {}, {}
        extra = () if phase is None else (moment.phase,)
        for key, update in updates.items():
            new_updates[key], changed[key] = rule(update, state[key], parameters[key], numbers_of(numbers, key), *extra)
        return new_updates, changed

    def evaluated(parameters: Params, state: Mapping[str, Slots], numbers: Numbers) -> dict[str, Tensor]:
        assert evaluation is not None
        return {key: evaluation(parameters[key], state[key], numbers_of(numbers, key)) for key in parameters}

    return Transform(
        name,
        hyperparameters,
        apply,
        names,
        starting,
        elementwise=elementwise,
        counts=counts,
        draws=draws,
        check=check,
        phase=phase,
        evaluation=evaluated if evaluation is not None else None,
    )


def cast(like: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
    """Numbers computed in float64 (bias corrections lose digits in float32), rounded once to the tensor's dtype."""
    return tuple(number.to(like.dtype) for number in numbers)


class Grouped(Mapping[str, Tensor]):
    """Numbers that differ from one group of parameters to the next.

    Rules for one tensor read those of their parameter's group. What looks at all parameters together reads the number
    that all groups share.
    """

    def __init__(self, groups: Sequence[Numbers], group_of: Mapping[str, int]) -> None:
        self.groups = groups
        self.group_of = group_of

    def of(self, parameter: str) -> Numbers:
        """The numbers of the group that the parameter is in."""
        return self.groups[self.group_of[parameter]]

    def renamed(self, names: Mapping[str, str]) -> Grouped:
        """The numbers kept under the names on the right, under those on the left."""
        return Grouped([{name: group[kept] for name, kept in names.items()} for group in self.groups], self.group_of)

    def __getitem__(self, name: str) -> Tensor:
        first, *others = (group[name] for group in self.groups)
        if any(first is not other and not torch.equal(first, other) for other in others):
            raise InvalidHyperparameter(
                f"{name} acts on all parameters together, so it must be the same in every parameter group."
            )
        return first

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups[0])

    def __len__(self) -> int:
        return len(self.groups[0])


def numbers_of(numbers: Numbers, parameter: str) -> Numbers:
    """The numbers of one parameter, where they differ from one group of parameters to the next."""
    return numbers.of(parameter) if isinstance(numbers, Grouped) else numbers


@dataclass(frozen=True)
class Stage:
    """A transform in its place: under which names the optimizer keeps its numbers and its slots."""

    transform: Transform
    numbers: Mapping[str, str]
    slots: Mapping[str, str]

    def apply(
        self,
        updates: dict[str, Tensor],
        state: Mapping[str, Slots],
        params: Params,
        numbers: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        """What the transform makes of the updates, and the whole state after it."""
        own = self._slots_of(updates, state)
        updates, changed = self.transform.apply(updates, own, params, self.own(numbers), moment)
        new = {key: {self.slots[name]: slot for name, slot in slots.items()} for key, slots in changed.items()}
        return updates, {key: {**slots, **new.get(key, {})} for key, slots in state.items()}

    def initial(self, name: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
        """The state of a parameter before the first update."""
        made = self.transform.slots(name, parameter, self.own(numbers), seed)
        return {self.slots[slot]: tensor for slot, tensor in made.items()}

    def evaluation(self, params: Params, state: Mapping[str, Slots], numbers: Numbers) -> dict[str, Tensor]:
        """The parameters to evaluate with."""
        if self.transform.evaluation is None:
            return dict(params)
        return self.transform.evaluation(params, self._slots_of(params, state), self.own(numbers))

    def own(self, numbers: Mapping[str, Any]) -> Any:
        """The transform's numbers under its own names."""
        if isinstance(numbers, Grouped):
            return numbers.renamed(self.numbers)
        return {name: numbers[kept] for name, kept in self.numbers.items()}

    def _slots_of(self, keys: Iterable[str], state: Mapping[str, Slots]) -> dict[str, Slots]:
        return {
            key: {name: state[key][kept] for name, kept in self.slots.items() if kept in state[key]} for key in keys
        }


def named_apart(transforms: Iterable[Transform]) -> tuple[Stage, ...]:
    """Each transform with the names that keep its numbers and slots apart from the others': the second eps is eps_2."""
    numbers: dict[str, None] = {}
    slots: dict[str, None] = dict.fromkeys(OWN_SLOTS)
    made = []
    drawing = False
    for transform in transforms:
        own_numbers = _taken(transform.hyperparameters, numbers)
        own_slots = _taken(transform.slot_names, slots)
        if transform.counts:
            own_slots["step"] = "step"
        if transform.draws:  # each has random numbers of its own
            own_slots["seed"] = free_name("seed", slots) if drawing else "seed"
            slots[own_slots["seed"]] = None
            drawing = True
        made.append(Stage(transform, own_numbers, own_slots))
    return tuple(made)


def initially(names: tuple[str, ...], initial: Start | None) -> Initial:
    """The initial state of slots that are zero unless `initial` says otherwise, or None where there is to be none."""

    def starting(key: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
        special = initial(parameter, numbers) if initial is not None else {}
        made = {slot: special[slot] if slot in special else torch.zeros_like(parameter) for slot in names}
        return {slot: tensor for slot, tensor in made.items() if tensor is not None}

    return starting


def _taken(names: Iterable[str], used: dict[str, None]) -> dict[str, str]:
    """Each name with the free one that it gets, which is in use from then on."""
    found = {}
    for name in names:
        found[name] = free_name(name, used)
        used[found[name]] = None
    return found


def free_name(name: str, used: Mapping[str, object]) -> str:
    """The name, or the first of `name_2`, `name_3` … that is not in use; after `lr_2` comes `lr_3`."""
    stem, _, count_so_far = name.rpartition("_")
    if name in used and count_so_far.isdigit() and stem in used:
        name = stem
    count, candidate = 1, name
    while candidate in used:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
