"""Optimizers around other optimizers: what lookahead, cautious, accumulate, sam and partition are made with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

from torch import Tensor

from fallline.description import described
from fallline.optim.base import Optimizer, chain
from fallline.optim.checks import WrongType
from fallline.optim.transform import (
    OWN_SLOTS,
    Evaluation,
    Moment,
    Number,
    Numbers,
    Params,
    Seed,
    Slots,
    Stage,
    Start,
    Transform,
    initially,
    named_apart,
)

P = ParamSpec("P")


@dataclass(frozen=True)
class PartOfStep(Stage):
    """An optimizer inside another at one step: what is static about that step for it."""

    phase: Hashable = None

    def apply(
        self,
        updates: dict[str, Tensor],
        state: Mapping[str, Slots],
        params: Params,
        numbers: Numbers,
        moment: Moment,
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        """What the optimizer makes of the updates, and the whole state after it."""
        return super().apply(updates, state, params, numbers, Moment(self.phase, moment.landscape))


def around(
    name: str,
    optimizers: Sequence[Optimizer | Transform],
    apply: Callable[
        [Sequence[Stage], dict[str, Tensor], Mapping[str, Slots], Params, Numbers, Moment],
        tuple[dict[str, Tensor], dict[str, Slots]],
    ],
    hyperparameters: Mapping[str, Number] | None = None,
    *,
    slots: Iterable[str] = (),
    initial: Start | None = None,
    counts: bool = False,
    elementwise: bool = True,
    together: bool = False,
    phase: Callable[[int], Hashable] | None = None,
    clock: Callable[[int], int] | None = None,
    surveys: Callable[[int], bool] | None = None,
    evaluation: Evaluation | None = None,
    **fields: Any,
) -> Transform:
    """A transform that has other optimizers inside, and their numbers and state beside its own.

    Args:
        apply: (the optimizers inside, updates, slots, parameters, numbers, moment) -> (updates, slots). An optimizer
            inside is a `Stage`: `part.apply(updates, slots, params, numbers, moment)` gives its updates, and the slots
            with its own renewed. Numbers and slots of the transform itself keep their names. `moment.phase` is that of
            the transform itself; each optimizer inside gets its own.
        slots, initial, counts: as for `per_tensor`, of the transform itself.
        elementwise, together: of the transform itself.
        phase: of the transform itself.
        clock: (number of the update, from 0) -> the number of the update that it is for the optimizers inside, for
            their phases; the same if left out.
        surveys: whether one of the optimizers inside does, if left out.
        evaluation: that of the first optimizer inside, if left out.
        fields: other fields of the `Transform`.
    """
    names = tuple(slots)
    own = Transform(name, hyperparameters or {}, _never, names, initially(names, initial), counts=counts)
    stages = named_apart([own, *(as_transform(part) for part in optimizers)])
    parts = stages[1:]

    def starting(key: str, parameter: Tensor, numbers: Numbers, seed: Seed) -> Slots:
        return {slot: t for stage in stages for slot, t in stage.initial(key, parameter, numbers, seed).items()}

    def phases(step: int) -> Hashable:
        inner = clock(step) if clock is not None else step
        each = (part.transform.phase for part in parts)
        return (phase(step) if phase is not None else None), tuple(p(inner) if p is not None else None for p in each)

    def surveying(step: int) -> bool:
        inner = clock(step) if clock is not None else step
        return any(part.transform.surveys is not None and part.transform.surveys(inner) for part in parts)

    def applied(
        updates: dict[str, Tensor], state: Mapping[str, Slots], params: Params, numbers: Numbers, moment: Moment
    ) -> tuple[dict[str, Tensor], dict[str, Slots]]:
        own_phase, inner = moment.phase if isinstance(moment.phase, tuple) else (None, (None,) * len(parts))
        now = [PartOfStep(s.transform, s.numbers, s.slots, p) for s, p in zip(parts, inner, strict=True)]
        return apply(now, updates, state, params, numbers, Moment(own_phase, moment.landscape))

    first = parts[0]
    has_phases = phase is not None or any(part.transform.phase is not None for part in parts)
    return Transform(
        name,
        {kept: stage.transform.hyperparameters[each] for stage in stages for each, kept in stage.numbers.items()},
        applied,
        tuple(kept for stage in stages for kept in stage.slots.values() if kept not in OWN_SLOTS),
        **{
            "slots": starting,
            "elementwise": elementwise and all(part.transform.elementwise for part in parts),
            "together": together or any(part.transform.together for part in parts),
            "counts": counts,
            "phase": phases if has_phases else None,
            "surveys": surveys or (surveying if any(p.transform.surveys is not None for p in parts) else None),
            "curves": any(part.transform.curves for part in parts),
            "check": first.transform.check,
            "evaluation": evaluation or (first.evaluation if first.transform.evaluation is not None else None),
            "parts": parts,
            **fields,
        },
    )


def as_transform(optimizer: Optimizer | Transform) -> Transform:
    """A whole optimizer as one transform, with its count of steps among its slots."""
    whole = optimizer if isinstance(optimizer, Optimizer) else chain(optimizer)
    in_order = (kept for stage in whole.stages for kept in stage.slots.values())
    return Transform(
        whole.name,
        whole.hyperparameters,
        lambda updates, state, params, numbers, moment: whole.run(updates, dict(state), params, numbers, moment),
        tuple(dict.fromkeys(in_order)),
        whole.initial_slots,
        elementwise=whole.elementwise,
        together=whole.together,
        evaluation=whole.evaluated if whole.moves_evaluation else None,
        phase=whole.phase if whole.has_phases else None,
        surveys=whole.surveys if whole.looks_around else None,
        curves=whole.curves,
        check=lambda name, parameter: whole.check({name: parameter}),
    )


def inner_optimizer(taker: str, given: Any) -> Optimizer:
    """What is put into a combinator as an optimizer."""
    if not isinstance(given, Optimizer | Transform):
        raise WrongType(f"{taker}() takes an optimizer, not {given!r}: give one, such as fl.optim.adam().")
    return given if isinstance(given, Optimizer) else chain(given)


def combinator(function: Callable[P, Transform]) -> Callable[P, Optimizer]:
    """Marks a maker of one transform that is a whole optimizer: what it makes can be trained with as it is.

    The transform remembers its call under the name `function.transform`, the optimizer under that of the function.
    """
    maker = described(function)
    maker.__qualname__ = f"{function.__qualname__}.transform"

    @functools.wraps(function)
    def whole(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
        return chain(maker(*args, **kwargs))

    made = described(whole)
    made.transform = maker  # type: ignore[attr-defined]
    return made


def _never(*arguments: Any) -> Any:
    raise AssertionError("the transform that only names its own numbers and slots is not applied")
