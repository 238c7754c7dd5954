"""A new optimizer in six lines: one function of one tensor, marked with `@rule`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from fallline.description import item_name
from fallline.errors import FalllineError, nearest
from fallline.optim.around import combinator
from fallline.optim.base import Optimizer
from fallline.optim.checks import WrongType, flag, in_interval, non_negative, real
from fallline.optim.transform import Numbers, Slots, Transform, per_tensor

Function = TypeVar("Function", bound=Callable[..., Any])
# A hyperparameter's domain: (lowest, highest), both inside and None where there is no bound, or a function that
# refuses (name, value).
Domain = tuple[float | None, float | None] | Callable[[str, Any], None]
NON_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")
COUNT = "step"
# How many updates a rule is tried out for.
STEPS = 3


class InvalidRule(FalllineError, ValueError):
    """A function that is no rule of an optimizer, or not the kind of rule that it is said to be."""


@overload
def rule(function: Function, /) -> Callable[..., Optimizer]: ...


@overload
def rule(
    *, elementwise: bool = False, domains: Mapping[str, Domain] | None = None
) -> Callable[[Function], Callable[..., Optimizer]]: ...


def rule(
    function: Callable[..., Any] | None = None,
    /,
    *,
    elementwise: bool = False,
    domains: Mapping[str, Domain] | None = None,
) -> Any:
    """Makes an optimizer of a function for one tensor: `rule(g, p, state…, *, numbers…) -> update, new state…`.

    The function takes the gradient g, the parameter p, and under names of your choice its state: tensors like p that
    are zero at first. It returns what is added to p, and after that the new state in the same order. A positional
    argument called `step` is no state: it is the number of the update, counted from 1, and is not returned.

    What follows the `*` are hyperparameters, each with its default. A float is a number that can be swept and follow
    a schedule, and arrives as a tensor; so does a tuple of floats. An int, a bool, a str or None is an option, and
    arrives as it is given. Tensors have the parameter's dtype; float16 and bfloat16 are computed in float32, and
    rounded once.

    The rule must not ask tensors for their values (no `if` on them, no `.item()`; use `torch.where`), nor change them
    in place. It is tried out where it is defined, so that such mistakes are found there.

    Args:
        elementwise: whether an element's update depends on that element alone, with no norm or mean over the tensor.
            Such rules run many times faster in a sweep. It is tried out whether that is so.
        domains: for hyperparameters the bounds (lowest, highest), each of which may be None, or a function that
            refuses (name, value). Without it lr, eps, weight_decay and momentum are at least 0, and names that begin
            with beta lie in [0, 1).

    Returns:
        The function that makes the optimizer: it takes the hyperparameters, and search dimensions in their place.

    Raises:
        InvalidRule: for a function that is no such rule.

    >>> import fallline as fl
    >>> @fl.optim.rule(elementwise=True)
    ... def signum(g, p, m, *, lr=1e-3, beta=0.9):
    ...     "Signum: p ← p − lr · sign(m)."
    ...     m = beta * m + (1 - beta) * g
    ...     return -lr * m.sign(), m
    >>> signum(lr=0.1).numbers
    {'lr': 0.1, 'beta': 0.9}
    >>> signum(lr=fl.log_grid(1e-3, 1e-1, 3)).dimensions
    {'lr': fl.grid([0.001, 0.01, 0.1])}
    """
    if function is None:
        return lambda later: _maker(later, elementwise, dict(domains or {}))
    return _maker(function, elementwise, {})


@dataclass(frozen=True)
class _Form:
    """What the signature of a rule says: what it takes besides gradient and parameter, in order."""

    function: Callable[..., Any]
    taken: tuple[str, ...]
    defaults: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def state(self) -> tuple[str, ...]:
        return tuple(name for name in self.taken if name != COUNT)

    @property
    def counts(self) -> bool:
        return COUNT in self.taken

    def numbers(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are data."""
        found: dict[str, Any] = {}
        for name, default in self.defaults.items():
            if _is_number(default):
                found[name] = arguments[name]
            elif _is_tuple_of_numbers(default):
                found |= {item_name(name, i): item for i, item in enumerate(arguments[name])}
        return found

    def call(self, g: Tensor, p: Tensor, slots: Slots, n: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Any:
        """The function itself, with tensors in the place of numbers."""
        given: dict[str, Any] = {}
        for name, default in self.defaults.items():
            if _is_number(default):
                given[name] = n[name]
            elif _is_tuple_of_numbers(default):
                given[name] = tuple(n[item_name(name, i)] for i in range(len(default)))
            else:
                given[name] = arguments[name]
        return self.function(g, p, *(slots[name] for name in self.taken), **given)

    def update(
        self, g: Tensor, p: Tensor, slots: Slots, n: Mapping[str, Tensor], arguments: Mapping[str, Any]
    ) -> tuple[Tensor, Slots]:
        """What the function returns, checked: the update and the new state."""
        made = self.call(g, p, slots, n, arguments)
        parts = tuple(made) if isinstance(made, tuple | list) else (made,)
        names = ("the update", *self.state)
        if len(parts) != len(names):
            raise InvalidRule(
                f"{self.name} returned {len(parts)} of the {len(names)} tensors expected: return "
                f"{', '.join(names)}, in this order."
            )
        for name, part in zip(names, parts, strict=True):
            if not isinstance(part, Tensor):
                raise InvalidRule(f"{self.name} returned {part!r} for {name}: return a tensor.")
            if part.shape != p.shape:
                raise InvalidRule(
                    f"{self.name} returned {name} of shape {tuple(part.shape)} for a parameter of shape "
                    f"{tuple(p.shape)}: return tensors of the parameter's shape."
                )
        return parts[0], dict(zip(self.state, parts[1:], strict=True))


def _maker(function: Callable[..., Any], elementwise: bool, domains: dict[str, Domain]) -> Callable[..., Optimizer]:
    flag("elementwise", elementwise)
    form = _form(function)
    spelt = [item_name(n, i) for n, d in form.defaults.items() if _is_tuple_of_numbers(d) for i in range(len(d))]
    for name in form.defaults:
        if name in spelt:
            raise InvalidRule(f"{form.name} has {name!r} twice: it is also an item of a tuple. Give it another name.")
    for name in domains:
        if name not in form.numbers(form.defaults):
            known = form.numbers(form.defaults)
            hint = nearest(name, known) if known else "It has none."
            raise InvalidRule(f"domains names {name!r}, which is no number of {form.name}. {hint}")
    _check(form, form.defaults, domains)
    _try_out(form, _options(form, form.defaults), elementwise)

    def make(**arguments: Any) -> Transform:
        _check(form, arguments, domains)
        numbers = form.numbers(arguments)
        if _options(form, arguments) != _options(form, form.defaults):
            _try_out(form, _options(form, arguments), elementwise)

        def rule(g: Tensor, slots: Slots, p: Tensor, n: Numbers) -> tuple[Tensor, Slots]:
            dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
            state = {name: slots[name].to(dtype) for name in form.taken}
            own = {name: n[name].to(dtype) for name in numbers}
            update, changed = form.update(g.to(dtype), p.to(dtype), state, own, arguments)
            return update.to(p.dtype), {name: tensor.to(p.dtype) for name, tensor in changed.items()}

        return per_tensor(form.name, rule, numbers, slots=form.state, counts=form.counts, elementwise=elementwise)

    kind = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature([inspect.Parameter(n, kind, default=d) for n, d in form.defaults.items()])
    functools.update_wrapper(make, function)
    del make.__wrapped__  # type: ignore[attr-defined]  # whose signature is that of the rule
    make.__annotations__ = {}
    make.__signature__ = signature  # type: ignore[attr-defined]
    return combinator(make)


def _form(function: Callable[..., Any]) -> _Form:
    """What the function's signature says.

    Raises:
        InvalidRule: where it is not that of a rule.
    """
    if not inspect.isfunction(function):
        raise InvalidRule(f"{function!r} is not a function: put @rule above a def.")
    name = function.__name__
    kinds = inspect.Parameter
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    if len(positional) + len(keywords) < len(parameters):
        raise InvalidRule(f"{name} takes *arguments or **arguments: name each state tensor and each hyperparameter.")
    if len(positional) < 2:
        raise InvalidRule(f"{name} does not take a gradient and a parameter: begin with def {name}(g, p, …).")
    defaulted = next((p.name for p in positional if p.default is not kinds.empty), None)
    if defaulted is not None:
        raise InvalidRule(
            f"{name} has a default for {defaulted!r}, which is a state tensor: put a * before the hyperparameters."
        )
    taken = tuple(p.name for p in positional[2:])
    if "seed" in taken:
        raise InvalidRule(f"{name} calls a state tensor 'seed', which is taken: give it another name.")
    for keyword in keywords:
        if keyword.default is kinds.empty:
            raise InvalidRule(f"{name} has no default for {keyword.name!r}: write {keyword.name}=….")
        number = _is_number(keyword.default) or _is_tuple_of_numbers(keyword.default)
        if not number and not isinstance(keyword.default, bool | int | str | None):
            raise InvalidRule(
                f"{name} has {keyword.name}={keyword.default!r}: a default is a float, a tuple of floats, or for an "
                "option an int, a bool, a str or None."
            )
    return _Form(function, taken, {k.name: k.default for k in keywords})


def _check(form: _Form, arguments: Mapping[str, Any], domains: Mapping[str, Domain]) -> None:
    """Refuses arguments outside of their domain, and those of another kind than their default."""
    for name, default in form.defaults.items():
        value = arguments[name]
        if _is_number(default):
            _check_number(name, value, domains.get(name))
        elif _is_tuple_of_numbers(default):
            if not isinstance(value, tuple) or len(value) != len(default):
                raise WrongType(f"{name} = {value!r} is not a tuple of {len(default)} numbers: give one.")
            for index, item in enumerate(value):
                inner = item_name(name, index)
                _check_number(inner, item, domains.get(inner))
        elif isinstance(default, bool):
            flag(name, value)
        elif isinstance(default, int) and (isinstance(value, bool) or not isinstance(value, int)):
            raise WrongType(f"{name} = {value!r} is not a whole number, as its default {default!r} is: give one.")
        elif isinstance(default, str) and not isinstance(value, str | None):
            raise WrongType(f"{name} = {value!r} is not a text, as its default {default!r} is: give one.")


def _check_number(name: str, value: Any, domain: Domain | None) -> None:
    real(name, value)
    if callable(domain):
        domain(name, value)
    elif domain is not None:
        low, high = domain
        in_interval(name, value, -math.inf if low is None else low, math.inf if high is None else high)
    elif name in NON_NEGATIVE:
        non_negative(name, value)
    elif name.startswith("beta"):
        in_interval(name, value, 0.0, 1.0, open_high=True)


def _is_number(default: Any) -> bool:
    return isinstance(default, float)


def _is_tuple_of_numbers(default: Any) -> bool:
    return isinstance(default, tuple) and len(default) > 0 and all(isinstance(item, float) for item in default)


def _options(form: _Form, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are no data."""
    return {
        name: arguments[name]
        for name, default in form.defaults.items()
        if not _is_number(default) and not _is_tuple_of_numbers(default)
    }


def _try_out(form: _Form, options: Mapping[str, Any], elementwise: bool) -> None:
    """Runs the rule for a few steps of two trials: as it is, mapped over them, and on one flat vector each.

    Raises:
        InvalidRule: where these differ, or the rule fails.
    """
    generator = torch.Generator().manual_seed(0)
    tried = {
        "a matrix": _Probe.of((3, 4), generator),
        "a vector": _Probe.of((5,), generator),
    }
    numbers = _numbers_of_probe(form)
    done: dict[str, list[Tensor]] = {}
    failed: dict[str, Exception] = {}
    for shape, probe in tried.items():
        try:
            # Two trials, one by one.
            alone = [probe.trial(i).run(form, {n: v[i] for n, v in numbers.items()}, options) for i in range(2)]
        except Exception as error:
            failed[shape] = error
            continue
        done[shape] = [torch.stack(pair) for pair in zip(*alone, strict=True)]
        _compare_mapped(form, probe, numbers, options, done[shape])
    if not done or (elementwise and failed):
        shape, why = next(iter(failed.items()))
        if isinstance(why, InvalidRule):
            raise why
        raise InvalidRule(f"{form.name} fails on {shape}: {type(why).__name__}: {why}.") from why
    if elementwise:
        flat = _Probe(
            torch.cat([probe.p.flatten(1) for probe in tried.values()], dim=1),
            torch.cat([probe.g.flatten(2) for probe in tried.values()], dim=2),
        )
        columns = {name: value.unsqueeze(1) for name, value in numbers.items()}
        expected = [torch.cat([t.flatten(1) for t in each], dim=1) for each in zip(*done.values(), strict=True)]
        try:
            found = flat.run(form, columns, options)
        except Exception as error:
            raise InvalidRule(f"{form.name} is not elementwise: on a flat vector it fails with {error}.") from error
        pairs = zip(found, expected, strict=True)
        if not all(torch.allclose(a, b, rtol=1e-12, atol=0, equal_nan=True) for a, b in pairs):
            raise InvalidRule(
                f"{form.name} is not elementwise: with all parameters in one vector it gives other updates than with "
                "each by itself. Leave elementwise=True out."
            )


def _compare_mapped(
    form: _Form, probe: _Probe, numbers: Mapping[str, Tensor], options: Mapping[str, Any], expected: list[Tensor]
) -> None:
    def mapped(p: Tensor, g: Tensor, own: dict[str, Tensor]) -> list[Tensor]:
        return _Probe(p, g).run(form, own, options)

    try:
        found = torch.func.vmap(mapped, in_dims=(0, 1, 0))(probe.p, probe.g, dict(numbers))
    except Exception as error:
        raise InvalidRule(
            f"{form.name} cannot be run for several trials at once: {error}. Do not ask tensors for their values (if, "
            ".item(), float); torch.where chooses between two."
        ) from error
    for ours, theirs in zip(found, expected, strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10, equal_nan=True):
            raise InvalidRule(f"{form.name} gives other updates for several trials at once than for each by itself.")


@dataclass(frozen=True)
class _Probe:
    """A parameter [trial, *shape] and its gradients [step, trial, *shape]; of one trial without that dimension."""

    p: Tensor
    g: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], generator: torch.Generator) -> _Probe:
        """Random ones, with no zeros among them."""
        return cls(*(torch.randn(*s, *shape, generator=generator, dtype=torch.float64) for s in ((2,), (STEPS, 2))))

    def trial(self, index: int) -> _Probe:
        return _Probe(self.p[index], self.g[:, index])

    def run(self, form: _Form, numbers: Mapping[str, Tensor], options: Mapping[str, Any]) -> list[Tensor]:
        """The updates of all steps, and the last state."""
        p, updates = self.p, []
        slots = {name: torch.zeros_like(p) for name in form.state}
        first = next(iter(numbers.values()), torch.zeros((), dtype=p.dtype))
        for index in range(STEPS):
            given = {**slots, **({COUNT: torch.full_like(first, index + 1)} if form.counts else {})}
            before = {"g": self.g[index], "p": p, **given}
            versions = {name: tensor._version for name, tensor in before.items()}
            update, slots = form.update(self.g[index], p, given, numbers, options)
            changed = next((name for name, tensor in before.items() if tensor._version != versions[name]), None)
            if changed is not None:
                raise InvalidRule(f"{form.name} changes {changed} in place: make a new tensor, as in m = beta * m.")
            updates.append(update)
            p = p + update
        return [*updates, *slots.values()]


def _numbers_of_probe(form: _Form) -> dict[str, Tensor]:
    """For each number [trial]; defaults of 0 are replaced, because what is multiplied by 0 would not be tried."""
    each = {name: value or 0.1 for name, value in form.numbers(form.defaults).items()}
    return {name: torch.tensor([value, 0.75 * value], dtype=torch.float64) for name, value in each.items()}
