"""Optimizers as plain data that fits into JSON, and back."""

from __future__ import annotations

import importlib
from typing import Any

from fallline.errors import UnknownName
from fallline.optim.description import Call, unmade
from fallline.optim.dimensions import Dimension


def to_data(value: Any) -> Any:
    """An optimizer, transform, schedule or dimension as dictionaries, lists and numbers.

    Raises:
        FalllineError: for a transform that no described function made: it could not be made again.

    >>> from fallline.optim import sgd
    >>> to_data(sgd(lr=0.1))["make"]
    'fallline.optim.optimizers:sgd'
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
    if not hasattr(value, "call"):
        return value
    call = value.call
    if not isinstance(call, Call):
        raise unmade(value)
    return {
        "make": f"{call.function.__module__}:{call.function.__qualname__}",
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
    module, _, name = data["make"].partition(":")
    try:
        make: Any = importlib.import_module(module)
        for part in name.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise UnknownName(f"the optimizer {data['make']!r} cannot be found any more: {error}.") from error
    return make(
        *(_made(item, dimensions) for item in data["extra"]),
        **{key: _made(item, dimensions) for key, item in data["arguments"].items()},
    )


def _dimension(data: dict[str, Any], dimensions: dict[int, Dimension]) -> Dimension:
    if "grid" in data:
        return Dimension(_made(data["grid"], dimensions))
    low, high = data["range"]
    return Dimension(None, low, high, data["log"])
