"""How a value remembers the call that made it.

Losses, optimizers, transforms and schedules are made by functions marked `@described`. What they return knows the
function and the arguments it was called with, so that it can be printed as code, written to JSON, and made again with a
search dimension replaced by a number. They are equal when their calls are, and travel to other processes as their
call: the function by reference, and the arguments. Such a function only ever sees concrete arguments: when a dimension
is among them, it is called once for each of the dimension's examples, which validates them all, and the last result is
returned as a template that knows its `call`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ParamSpec, TypeVar, cast

from fallline.dimensions import Dimension
from fallline.errors import FalllineError, InvalidHyperparameter, UnknownArgument, unknown_argument

P = ParamSpec("P")


# Arguments of torch's optimizers that choose an implementation.
TORCH_SWITCHES = frozenset({"foreach", "fused", "capturable", "differentiable"})


# What one of several is called, where it is not the name without its last letter.
SINGULARS = {"eps": "eps", "losses": "loss"}


class NotOfTheRule(UnknownArgument, ValueError):
    """An argument of torch's that says how to compute an update, not what it is."""


@dataclass(frozen=True)
class Call:
    """A function and the arguments that it was called with, defaults included; `extra` holds its `*arguments`."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    extra: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """The function's name: `adam`, `chain`, `cosine` …"""
        return self.function.__name__

    def again(self, change: Callable[[Any], Any]) -> Any:
        """The same call with `change` applied to each argument."""
        extra = [change(value) for value in self.extra]
        return self.function(*extra, **{name: change(value) for name, value in self.arguments.items()})

    def with_arguments(self, values: Mapping[str, Any]) -> Any:
        """The same call with other values for the arguments named; `beta1` is the first of the pair `betas`."""
        changed = {}
        for name, value in self.arguments.items():
            if isinstance(value, tuple) and name not in values:
                changed[name] = tuple(values.get(item_name(name, i), item) for i, item in enumerate(value))
            else:
                changed[name] = values.get(name, value)
        return self.function(*self.extra, **changed)

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        # Without an address: the order of families in a population must not change from one process to the next.
        told = [*map(_shown, self.extra), *(f"{name}={_shown(value)}" for name, value in self.arguments.items())]
        return f"{self.function.__module__}.{self.function.__qualname__}({', '.join(told)})"


def _shown(value: Any) -> str:
    """Like `repr`, but functions are shown by their name."""
    if inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


@dataclass(frozen=True)
class Invalid:
    """Arguments that must be refused, a part of the message, and the built-in error that it is one of."""

    arguments: Mapping[str, Any]
    message: str
    error: type[Exception] = ValueError


T = TypeVar("T")


def remembers_its_call(cls: type[T]) -> type[T]:
    """Gives a frozen dataclass with a field `call` what follows from the call: printing, equality, copies, pickling."""

    def call_of(self: Any) -> Call | None:
        call: Call | None = self.call
        return call

    def equal(self: Any, other: object) -> bool:
        if type(other) is not type(self) or call_of(self) is None:
            return self is other
        return call_of(self) == call_of(other)

    def reduce(self: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        call = call_of(self)
        if call is None:
            raise pickle.PicklingError(str(unmade(self)))
        return functools.partial(call.function, *call.extra, **call.arguments), ()

    methods: dict[str, Callable[..., Any]] = {
        "__repr__": lambda self: code(self, "fl."),
        "__eq__": equal,
        "__hash__": lambda self: object.__hash__(self) if call_of(self) is None else hash(call_of(self)),
        "__reduce__": reduce,
        # A value that never changes is its own copy; the dimensions in it stay the objects that they are.
        "__copy__": lambda self: self,
        "__deepcopy__": lambda self, memo: self,
    }
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls


def unmade(value: Any) -> FalllineError:
    """The error for a value that cannot be made again, because no function is known that made it."""
    return FalllineError(
        f"{value!r} cannot be written down, because no function is known that makes it: make it in a function at the "
        "top of a module, and mark that with @fl.optim.described."
    )


R = TypeVar("R")


def described(function: Callable[P, R], *, read: Callable[[Any], Any] | None = None) -> Callable[P, R]:
    """Marks `function` as a maker of losses, optimizers, transforms or schedules, which then remember their call.

    Any of its arguments may then be a search dimension, and what it makes can be printed, saved and sent to other
    processes. Where it is at the top of a module, these find it again by its name.

    Args:
        read: makes plain data of an argument; `plain` if left out.

    >>> import fallline as fl
    >>> @described
    ... def sign_descent(lr: float = 0.01) -> fl.optim.Optimizer:
    ...     sign = fl.optim.per_tensor("sign", lambda g, slots, p, n: (g.sign(), {}), {})
    ...     return fl.optim.chain(sign, fl.optim.scale_by_learning_rate(lr))
    >>> sign_descent(lr=fl.log_grid(0.01, 1.0, 3)).dimensions
    {'lr': fl.grid([0.01, 0.1, 1.0])}
    """
    read = read or plain
    signature = inspect.signature(function)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    keywords = [name for name, kind in kinds.items() if kind not in several]
    others = next((name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD), None)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in keywords and others is None:
                if name in TORCH_SWITCHES:
                    raise NotOfTheRule(
                        f"{function.__name__}() has no argument {name!r}: it says how torch computes, not what. "
                        "Leave it out: as_torch takes the fastest way there is."
                    )
                raise unknown_argument(f"{function.__name__}()", name, keywords)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UnknownArgument(f"{function.__name__}(): {error}.") from None
        bound.apply_defaults()
        arguments = {name: read(bound.arguments[name]) for name in keywords}
        arguments |= {name: read(value) for name, value in bound.arguments.get(others or "", {}).items()}
        extra = next((v for name, v in bound.arguments.items() if kinds[name] is several[0]), ())
        call = Call(wrapper, arguments, tuple(extra))
        dimensions = list(search_dimensions(call))
        if not dimensions:
            made = cast(Callable[..., Any], function)(*call.extra, **arguments)
            return cast(R, replace(made, call=call))
        first = {id(dimension): dimension.examples[0] for _, dimension in dimensions}
        for _, dimension in dimensions:
            for example in dimension.examples:
                made = call.again(functools.partial(substitute, chosen={**first, id(dimension): example}))
        return cast(R, replace(made, call=call))

    return wrapper


class SinglePrecision(float):
    """A number that was given as a float32 tensor, in which precision `torch.optim.Muon` then computes with it."""


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, lists as tuples: what can be compared, printed and written to JSON."""
    if isinstance(value, tuple | list):
        if len({hasattr(item, "requires_grad") for item in value}) > 1:
            raise InvalidHyperparameter(f"{value!r} mixes tensors and numbers: give either.")
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if type(value) in (bool, int, float, str, SinglePrecision):
        return value
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
        single = hasattr(value, "requires_grad") and str(value.dtype) == "torch.float32"
        return SinglePrecision(value.item()) if single else value.item()
    return float(value) if isinstance(value, Real) else value


def substitute(value: Any, chosen: Mapping[int, object]) -> Any:
    """`value` with every dimension in it replaced by `chosen[id(dimension)]`, made again where that changed it."""
    if isinstance(value, Dimension):
        return chosen[id(value)]
    if isinstance(value, tuple):
        return tuple(substitute(item, chosen) for item in value)
    if isinstance(value, Mapping):
        return {name: substitute(item, chosen) for name, item in value.items()}
    call = getattr(value, "call", None)
    if isinstance(call, Call) and any(True for _ in search_dimensions(call)):
        return call.again(functools.partial(substitute, chosen=chosen))
    return value


def search_dimensions(value: Any, path: str = "") -> Iterator[tuple[str, Dimension]]:
    """The dimensions in a value's call, each with its name: `lr`, `beta1` (of `betas`), `lr.end` (of a schedule)."""
    return ((name, item) for name, item in leaves(value, path) if isinstance(item, Dimension))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain argument in a value's call with its name, depth first."""
    call = value if isinstance(value, Call) else getattr(value, "call", None)
    if isinstance(call, Call):
        for item in call.extra:
            yield from leaves(item, path)
        for index, (name, item) in enumerate(call.arguments.items()):
            # A schedule's first argument is the hyperparameter itself: lr=cosine(0.1) has lr 0.1. The arguments of an
            # optimizer inside another keep their names.
            inner = name if not path else path if index == 0 and hasattr(value, "curve") else f"{path}.{name}"
            yield from leaves(item, path if hasattr(item, "transforms") or hasattr(item, "apply") else inner)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, "" if hasattr(item, "call") else f"{path}.{name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from leaves(item, item_name(path, index))
    else:
        yield path, value


def item_name(name: str, index: int) -> str:
    """The name of one of several: `beta1` of `betas`, `loss1` of `losses`, but `eps1` of `eps`."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{SINGULARS.get(last, last.removesuffix('s'))}{index + 1}"


def code(value: Any, prefix: str = "") -> str:
    """The call that made `value` as Python, defaults left out.

    >>> from fallline.optim import adam
    >>> code(adam(lr=0.01))
    'adam(lr=0.01)'
    """
    call = getattr(value, "call", None)
    if isinstance(value, tuple):
        inside = ", ".join(code(item, prefix) for item in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {code(item, prefix)}' for name, item in value.items())}}}"
    if inspect.isfunction(value) or inspect.isclass(value):
        return _name_of(value, prefix)
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if not isinstance(call, Call):
        if hasattr(value, "call"):  # made without a described function
            return f"<{type(value).__name__.lower()} {getattr(value, 'name', None) or getattr(value, 'kind', '')}>"
        return repr(value)
    defaults = {name: p.default for name, p in inspect.signature(call.function).parameters.items()}
    written = [code(item, prefix) for item in call.extra]
    for name, item in call.arguments.items():
        if name == "lr" or isinstance(item, Dimension) or item != defaults.get(name):
            written.append(f"{name}={code(item, prefix)}")
    return f"{_name_of(call.function, prefix)}({', '.join(written)})"


def _name_of(function: Callable[..., Any], prefix: str) -> str:
    """The name under which a function or class is used: that of fallline's own behind `fl.`, torch's in full."""
    module = function.__module__ or ""  # None in code that exec runs
    if module.startswith("torch.optim"):
        return f"torch.optim.{function.__name__}"
    rooms = {"fallline.optim.schedules": "schedules.", "fallline.optim.": "optim.", "fallline.losses.": "losses."}
    for start, room in rooms.items():
        if prefix and module.startswith(start):
            return f"{prefix}{room}{function.__name__}"
    return function.__name__


def written_arguments(rest: str, name: str, text: str) -> dict[str, Any]:
    """The arguments `argument=value,argument=value` of something that is written on the command line.

    Args:
        rest: the arguments alone.
        name, text: what they are for and all that was written, for the error.

    Raises:
        UnknownArgument: for an argument without a value, or one given twice.

    >>> written_arguments("momentum=0.9,nesterov=True", "sgd", "sgd:momentum=0.9,nesterov=True")
    {'momentum': 0.9, 'nesterov': True}
    """
    given: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UnknownArgument(f"{part!r} in {text!r} has no value: write {name}:argument=value,argument=value.")
        if key in given:
            raise UnknownArgument(f"{key!r} is given twice in {text!r}: leave one out.")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError):
            given[key] = value
    return given


def _split(text: str) -> list[str]:
    """The text at its commas, but not at those inside parentheses: `betas=(0.9,0.99),eps=1e-6`."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
