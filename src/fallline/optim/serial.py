"""Optimizers as plain data that fits into JSON, and back."""

from __future__ import annotations

import importlib
from typing import Any

from fallline.errors import UnknownName
from fallline.optim.description import Call
from fallline.optim.dimensions import Dimension


def to_data(value: Any) -> Any:
    """An optimizer, transform, schedule or dimension as dictionaries, lists and numbers.

    >>> from fallline.optim import sgd
    >>> to_data(sgd(lr=0.1))["make"]
    'fallline.optim.optimizers:sgd'
    """
    call = getattr(value, "call", None)
    if isinstance(call, Call):
        return {
            "make": f"{call.function.__module__}:{call.function.__qualname__}",
            "extra": [to_data(item) for item in call.extra],
            "arguments": {name: to_data(item) for name, item in call.arguments.items()},
        }
    if isinstance(value, Dimension):
        if value.values is not None:
            return {"grid": list(value.values)}
        return {"range": [value.low, value.high], "log": value.log}
    if isinstance(value, tuple | list):
        return [to_data(item) for item in value]
    return value


def from_data(data: Any) -> Any:
    """What `to_data` made it of.

    Raises:
        UnknownName: when the function that made it cannot be found any more.

    >>> from fallline.optim import adam
    >>> from_data(to_data(adam(lr=0.1)))
    fl.optim.adam(lr=0.1)
    """
    if isinstance(data, list):
        return tuple(from_data(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "grid" in data:
        return Dimension(tuple(data["grid"]))
    if "range" in data:
        low, high = data["range"]
        return Dimension(None, low, high, data["log"])
    module, _, name = data["make"].partition(":")
    try:
        make = importlib.import_module(module)
        for part in name.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise UnknownName(f"the optimizer {data['make']!r} cannot be found any more: {error}.") from error
    function: Any = make
    return function(
        *(from_data(item) for item in data["extra"]),
        **{key: from_data(item) for key, item in data["arguments"].items()},
    )
