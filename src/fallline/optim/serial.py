"""Optimizers as plain data that fits into JSON, and back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from fallline.description import Call, unmade
from fallline.dimensions import Dimension
from fallline.errors import FalllineError, UnknownName


def to_data(value: Any) -> Any:
    """An optimizer, transform, schedule or dimension as dictionaries, lists and numbers.

    Raises:
        FalllineError: for a transform that no described function made: it could not be made again.

    >>> from fallline.optim import sgd
    >>> to_data(sgd(lr=0.1))["make"]
    'fallline.optim.gradient_descent:sgd'
    """
    return _data(value, {})


def _data(value: Any, numbers: dict[int, int]) -> Any:
    """`numbers` tells dimensions apart: the same one in two places takes the same value in both."""
    if isinstance(value, Dimension):
        number = numbers.setdefault(id(value), len(numbers))
        if value.values is not None:
            return {"grid": [_data(item, numbers) for item in value.values], "dimension": number}
        return {"range": [value.low, value.high], "log": value.log, "dimension": number}
    if isinstance(value, tuple | list):
        return [_data(item, numbers) for item in value]
    if isinstance(value, Mapping):
        return {"items": {name: _data(item, numbers) for name, item in value.items()}}
    if inspect.isfunction(value) or inspect.isclass(value):
        return {"name": _name(value)}
    if not hasattr(value, "call"):
        return value
    call = value.call
    if not isinstance(call, Call):
        raise unmade(value)
    return {
        "make": _name(call.function),
        "extra": [_data(item, numbers) for item in call.extra],
        "arguments": {name: _data(item, numbers) for name, item in call.arguments.items()},
    }


def from_data(data: Any) -> Any:
    """What `to_data` made it of.

    Raises:
        UnknownName: when the function that made it cannot be found any more.

    >>> from fallline.optim import adam
    >>> from_data(to_data(adam(lr=0.1)))
    fl.optim.adam(lr=0.1)
    """
    return _made(data, {})


def _made(data: Any, dimensions: dict[int, Dimension]) -> Any:
    if isinstance(data, list):
        return tuple(_made(item, dimensions) for item in data)
    if not isinstance(data, dict):
        return data
    if "dimension" in data:
        return dimensions.setdefault(data["dimension"], _dimension(data, dimensions))
    if "items" in data:
        return {name: _made(item, dimensions) for name, item in data["items"].items()}
    if "name" in data:
        return _named(data["name"])
    return _named(data["make"])(
        *(_made(item, dimensions) for item in data["extra"]),
        **{key: _made(item, dimensions) for key, item in data["arguments"].items()},
    )


def _name(function: Any) -> str:
    """Where a function or class can be found: `module:name`.

    Raises:
        FalllineError: for one that cannot be found by its name.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    if "<" in name:  # <lambda>, or <locals>: inside another function
        raise FalllineError(
            f"{name.replace(':', '.')} cannot be written down, because it has no name at the top of a module: define "
            "it there."
        )
    return name


def _named(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UnknownName(f"{name!r} cannot be found any more: {error}.") from error
    return found


def _dimension(data: dict[str, Any], dimensions: dict[int, Dimension]) -> Dimension:
    if "grid" in data:
        return Dimension(_made(data["grid"], dimensions))
    low, high = data["range"]
    return Dimension(None, low, high, data["log"])
