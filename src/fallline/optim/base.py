"""What an optimizer is: a chain of transforms, a pure value, bound to no model.

A transform takes gradients (or the updates of the transform before it) to updates; read `transform` for what it is. The
torch optimizer that users take away, the vectorised engine and the sequential engine all run these rules; nothing else
in fallline knows how an optimizer updates.

State is a plain dictionary: `{"step": updates done, "slots": {parameter name: {slot name: tensor}}}`.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fallline.description import Call, described, leaves, remembers_its_call, search_dimensions, substitute
from fallline.dimensions import Dimension
from fallline.errors import FalllineError, InvalidHyperparameter, Unsupported
from fallline.optim.landscape import Landscape
from fallline.optim.schedules import Schedule
from fallline.optim.transform import (
    Moment,
    Number,
    Numbers,
    Params,
    Seed,
    Slots,
    Stage,
    Transform,
    free_name,
    named_apart,
)

if TYPE_CHECKING:
    from fallline.optim.torch_adapter import TorchOptimizer

State = dict[str, Any]


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
            found[free_name(name, found)] = value
        return found

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The search dimensions among the arguments, by the argument's name."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Dimension)}

    @property
    def structure(self) -> tuple[object, ...]:
        """What is static: optimizers of equal structure differ only in numbers and are updated together."""
        kinds = [
            (name, number.kind if number.call is not None else number.curve)
            for name, number in self.hyperparameters.items()
            if isinstance(number, Schedule)
        ]
        return (*(transform.structure for transform in self.transforms), *kinds)

    @property
    def elementwise(self) -> bool:
        """Whether each element of a parameter is updated by itself."""
        return all(transform.elementwise for transform in self.transforms)

    @property
    def together(self) -> bool:
        """Whether some transform looks at all parameters at once."""
        return any(transform.together for transform in self.transforms)

    @property
    def moves_evaluation(self) -> bool:
        """Whether the model is evaluated with other parameters than those that are trained."""
        return any(transform.evaluation is not None for transform in self.transforms)

    @property
    def looks_around(self) -> bool:
        """Whether at some steps it looks at the loss around the parameters."""
        return any(transform.surveys is not None for transform in self.transforms)

    @property
    def curves(self) -> bool:
        """Whether it looks at the curvature there, for which gradients must be differentiable themselves."""
        return any(transform.curves for transform in self.transforms)

    @property
    def hyperparameters(self) -> dict[str, Number]:
        """The numbers that the rule reads, by name; of two with one name the second is `eps_2`."""
        return {
            kept: stage.transform.hyperparameters[name] for stage in self.stages for name, kept in stage.numbers.items()
        }

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The transforms with the names under which their numbers and slots are kept apart."""
        return named_apart(self.transforms)

    @cached_property
    def slot_names(self) -> frozenset[str]:
        """The names of the state tensors that parameters have."""
        return frozenset(kept for stage in self.stages for kept in stage.slots.values())

    def with_numbers(self, values: Mapping[str, Number]) -> Optimizer:
        """The chain of the same transforms with other `hyperparameters`."""
        return chain(*(stage.transform.with_numbers(stage.own(values)) for stage in self.stages))

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

    def phase(self, step: int) -> Hashable:
        """What is static about update number `step` (from 0): steps of one phase run the same operations."""
        if not self.has_phases:
            return None
        return tuple(
            (t.phase(step) if t.phase is not None else None, t.surveys is not None and t.surveys(step))
            for t in self.transforms
        )

    def surveys(self, step: int) -> bool:
        """Whether update number `step` (from 0) looks at the loss around the parameters: give it a `landscape`."""
        return any(t.surveys is not None and t.surveys(step) for t in self.transforms)

    def check(self, params: Params) -> None:
        """Refuses parameters that some transform cannot train (Muon: all but matrices)."""
        for transform in self.transforms:
            if transform.check is not None:
                for name, parameter in params.items():
                    transform.check(name, parameter)

    def init(
        self, params: Params, numbers: Numbers | None = None, *, steps: float | None = None, seed: Seed = 0
    ) -> State:
        """The state before the first update.

        Args:
            params: parameter tensors by name.
            numbers: replaces `self.numbers`, as float64 tensors (the engines pass one value per trial).
            steps: how many updates training has in all, for a schedule on a number with which the state begins.
            seed: of the random numbers, for the few rules that draw some.

        >>> import torch
        >>> from fallline.optim import adam
        >>> state = adam().init({"w": torch.ones(2)})
        >>> sorted(state["slots"]["w"])
        ['exp_avg', 'exp_avg_sq', 'step']
        """
        self._refuse_template()
        for name, parameter in params.items():
            if not parameter.is_floating_point() and not parameter.is_complex():
                raise FalllineError(f"parameter {name!r} is {parameter.dtype}: an optimizer moves floating-point ones.")
        self.check(params)
        device = next(iter(params.values())).device if params else None
        step = torch.zeros((), dtype=torch.float64, device=device)
        if numbers is None:
            numbers = self._own_numbers(device)
        numbers = self._at(numbers, step, steps or 1)  # at the start, however many steps there will be
        slots = {name: self._slots(name, parameter, numbers, seed) for name, parameter in params.items()}
        return {"step": step, "slots": slots}

    def update(
        self,
        grads: Params,
        state: State,
        params: Params,
        numbers: Numbers | None = None,
        *,
        steps: float | None = None,
        step: int | None = None,
        landscape: Landscape | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """One step, pure: `new = params + updates`. Nothing that is passed in is changed.

        Args:
            grads: gradients by parameter name; a parameter without one (or with None) is left as it is.
            state: from `init` or from the update before.
            params: the parameters at which the gradients were taken.
            numbers: replaces `self.numbers`, as float64 tensors (the engines pass one value per trial).
            steps: how many updates training has in all; needed where a hyperparameter is a schedule.
            step: which update this is, from 0; read off the state if left out. Give it under vmap or torch.compile to
                an optimizer that does something at every so many steps only.
            landscape: the loss around the parameters, for the optimizers that look at more than one gradient.

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
        grads = {name: grad for name, grad in grads.items() if grad is not None}
        for name, grad in grads.items():
            if name not in params or name not in state["slots"]:
                where = "parameter in params" if name not in params else "parameter in the state: make it with init"
                raise FalllineError(f"there is a gradient for {name!r}, but no such {where}.")
            if grad.shape != params[name].shape:
                shapes = f"{tuple(grad.shape)}, the parameter {tuple(params[name].shape)}"
                raise FalllineError(f"the gradient of {name!r} has shape {shapes}: they must be the same.")
            if grad.dtype != params[name].dtype:
                dtypes = f"{grad.dtype}, the parameter {params[name].dtype}"
                raise FalllineError(f"the gradient of {name!r} is {dtypes}: they must be the same.")
        if numbers is None:
            numbers = self._own_numbers(state["step"].device)
        if self.has_phases and step is None:
            step = int(state["step"])
        if step is not None and self.surveys(step) and landscape is None:
            raise FalllineError(
                f"{self.name} looks at the loss around the parameters: give update(…, landscape=fl.optim.Landscape.of("
                "loss, params)) with the mini-batch's loss as a function of the parameters; in fit, sweep and "
                "as_torch's step(closure) that is done for you."
            )
        current = self._at(numbers, state["step"], steps)
        slots = {name: state["slots"][name] for name in grads}
        real_params, real_grads, real_slots = self._as_real(params, grads, slots)
        phase = None if step is None else self.phase(step)
        updates, slots = self.run(real_grads, real_slots, real_params, current, Moment(phase, landscape))
        updates, slots = _as_complex(params, updates, slots)
        return updates, {"step": state["step"] + 1, "slots": {**state["slots"], **slots}}

    def run(
        self, updates: dict[str, Tensor], slots: dict[str, Slots], params: Params, numbers: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        """The transforms one after the other, with the numbers of this step: `update` without what surrounds it."""
        if "step" in self.slot_names:
            slots = {name: {**own, "step": own["step"] + 1} for name, own in slots.items()}
        phases = moment.phase if isinstance(moment.phase, tuple) else ((None, False),) * len(self.stages)
        for stage, (phase, looks) in zip(self.stages, phases, strict=True):
            inner = Moment(phase, moment.landscape if looks else None)
            updates, slots = stage.apply(updates, slots, params, numbers, inner)
        return updates, slots

    def evaluation_parameters(
        self, state: State, params: Params, numbers: Numbers | None = None, *, steps: float | None = None
    ) -> dict[str, Tensor]:
        """The parameters with which the model is to be evaluated; those that are trained, for most optimizers.

        Args:
            state, params: after the latest update.
            numbers, steps: as for `update`.

        >>> import torch
        >>> from fallline.optim import sgd
        >>> p = {"w": torch.ones(2)}
        >>> sgd().evaluation_parameters(sgd().init(p), p)["w"]
        tensor([1., 1.])
        """
        if not self.moves_evaluation:
            return dict(params)
        if numbers is None:
            numbers = self._own_numbers(state["step"].device)
        current = self._at(numbers, torch.clamp(state["step"] - 1, min=0), steps)
        return self.evaluated(params, state["slots"], current)

    def evaluated(self, params: Params, slots: Mapping[str, Slots], numbers: Numbers) -> dict[str, Tensor]:
        """`evaluation_parameters` with the numbers of this step."""
        for stage in self.stages:
            params = stage.evaluation(params, slots, numbers)
        return dict(params)

    def as_torch(self, params: Any, *, steps: int | None = None, seed: int = 0) -> TorchOptimizer:
        """A `torch.optim.Optimizer` that runs this rule on a model's parameters.

        Args:
            params: `model.parameters()`, `model.named_parameters()` or parameter groups.
            steps: how many steps training has in all; needed where a hyperparameter is a schedule.
            seed: of the random numbers, for the few rules that draw some.

        >>> import torch
        >>> from fallline.optim import adam
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = adam(lr=0.01).as_torch(model.parameters())
        >>> isinstance(optimizer, torch.optim.Optimizer)
        True
        """
        from fallline.optim.torch_adapter import TorchOptimizer

        self._refuse_template()
        return TorchOptimizer(params, self, steps=steps, seed=seed)

    def initial_slots(self, name: str, parameter: Tensor, numbers: Numbers, seed: Seed = 0) -> Slots:
        """The state of a real parameter before the first update, with the numbers of that moment."""
        made: Slots = {}
        if "step" in self.slot_names:
            made["step"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
        for number, stage in enumerate(stage for stage in self.stages if stage.transform.draws):
            own = torch.as_tensor(seed, dtype=torch.int64, device=parameter.device) * 1_000_003
            made[stage.slots["seed"]] = own + zlib.crc32((f"{name}/{number}" if number else name).encode())
        for stage in self.stages:
            made.update(stage.initial(name, parameter, numbers, seed))
        return made

    def _slots(self, name: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
        if not parameter.is_complex():
            return self.initial_slots(name, parameter, numbers, seed)
        as_real = torch.view_as_real(parameter)
        made = self.initial_slots(name, as_real, numbers, seed)
        return {s: torch.view_as_complex(t) if t.shape == as_real.shape else t for s, t in made.items()}

    def _as_real(
        self, params: Params, grads: Params, slots: dict[str, Slots]
    ) -> tuple[Params, dict[str, Tensor], dict[str, Slots]]:
        """Complex tensors as pairs of real ones, which element-by-element rules train like any other."""
        if not any(params[name].is_complex() for name in grads):
            return params, dict(grads), slots
        if not self.elementwise:
            raise Unsupported(f"{self.name} does not support complex parameters: it does not work element by element.")
        return (
            {name: _real(p) for name, p in params.items()},
            {name: _real(g) for name, g in grads.items()},
            {name: {slot: _real(tensor) for slot, tensor in own.items()} for name, own in slots.items()},
        )

    def _own_numbers(self, device: torch.device | None) -> Numbers:
        return {n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in self.numbers.items()}

    @cached_property
    def has_phases(self) -> bool:
        """Whether not all steps run the same operations."""
        return any(t.phase is not None or t.surveys is not None for t in self.transforms)

    @cached_property
    def _schedules(self) -> dict[str, Schedule]:
        return {name: value for name, value in self.hyperparameters.items() if isinstance(value, Schedule)}

    @cached_property
    def _is_template(self) -> bool:
        return self.call is not None and any(True for _ in search_dimensions(self.call))

    def _at(self, numbers: Numbers, step: Tensor, steps: float | None) -> Numbers:
        """The numbers that the rule reads at this step: schedules evaluated, the rest as they are."""
        if not self._schedules:
            return numbers
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


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _as_complex(
    params: Params, updates: dict[str, Tensor], slots: dict[str, Slots]
) -> tuple[dict[str, Tensor], dict[str, Slots]]:
    """Updates and slots of complex parameters as complex tensors again."""
    for name in [name for name in updates if params[name].is_complex()]:
        shape = updates[name].shape
        updates = {**updates, name: torch.view_as_complex(updates[name].contiguous())}
        own = {s: torch.view_as_complex(t.contiguous()) if t.shape == shape else t for s, t in slots[name].items()}
        slots = {**slots, name: own}
    return updates, slots
