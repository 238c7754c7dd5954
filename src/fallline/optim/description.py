"""How a value remembers the call that made it.

Optimizers, transforms and schedules are made by functions marked `@described`. What they return knows the function
and the arguments it was called with, so that it can be printed as code, written to JSON, and made again with a
search dimension replaced by a number. Such a function only ever sees concrete arguments: when a dimension is among
them, it is called once for each of the dimension's examples, which validates them all, and the last result is
returned as a template that knows its `call`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, cast

from fallline.errors import UnknownArgument, nearest
from fallline.optim.dimensions import Dimension

P = ParamSpec("P")


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


R = TypeVar("R")


def described(function: Callable[P, R]) -> Callable[P, R]:
    """Marks `function` as a maker of values that remember their call (frozen dataclasses with a field `call`)."""
    signature = inspect.signature(function)
    keywords = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    ]

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in keywords:
                hint = nearest(name, keywords) if keywords else "It takes none."
                raise UnknownArgument(f"{function.__name__}() has no argument {name!r}. {hint}")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UnknownArgument(f"{function.__name__}(): {error}.") from None
        bound.apply_defaults()
        arguments = {name: bound.arguments[name] for name in keywords}
        extra = next((v for name, v in bound.arguments.items() if name not in arguments), ())
        call = Call(wrapper, arguments, tuple(extra))
        dimensions = list(search_dimensions(call))
        if not dimensions:
            return cast(R, replace(cast(Any, function(*args, **kwargs)), call=call))
        made: R | None = None
        first = {id(dimension): dimension.examples[0] for _, dimension in dimensions}
        for _, dimension in dimensions:
            for example in dimension.examples:
                made = call.again(functools.partial(substitute, chosen={**first, id(dimension): example}))
        return cast(R, replace(cast(Any, made), call=call))

    return wrapper


def substitute(value: Any, chosen: Mapping[int, object]) -> Any:
    """`value` with every dimension in it replaced by `chosen[id(dimension)]`, made again where that changed it."""
    if isinstance(value, Dimension):
        return chosen[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(substitute(item, chosen) for item in value)
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
            # A schedule's first argument is the hyperparameter itself: lr=cosine(0.1) has lr 0.1.
            inner = name if not path else path if index == 0 else f"{path}.{name}"
            yield from leaves(item, inner)
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path.removesuffix('s')}{index + 1}")
    else:
        yield path, value


def code(value: Any, prefix: str = "") -> str:
    """The call that made `value` as Python, defaults left out.

    >>> from fallline.optim import adam
    >>> code(adam(lr=0.01))
    'adam(lr=0.01)'
    """
    call = getattr(value, "call", None)
    if isinstance(value, tuple | list):
        inside = ", ".join(code(item, prefix) for item in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if not isinstance(call, Call):
        return repr(value)
    defaults = {name: p.default for name, p in inspect.signature(call.function).parameters.items()}
    written = [code(item, prefix) for item in call.extra]
    for name, item in call.arguments.items():
        if name == "lr" or isinstance(item, Dimension) or hasattr(item, "call") or item != defaults.get(name):
            written.append(f"{name}={code(item, prefix)}")
    room = "fl.schedules." if prefix and call.function.__module__.endswith(".schedules") else prefix
    return f"{room}{call.name}({', '.join(written)})"
