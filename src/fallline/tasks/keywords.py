"""The refusal of misspelt keywords: `knows_its_keywords` turns Python's bare TypeError into a hint.

The constructor of `Task` is wrapped by it. Losses and optimizers have `described`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fallline.errors import unknown_argument

P = ParamSpec("P")
R = TypeVar("R")


def knows_its_keywords(function: Callable[P, R], /) -> Callable[P, R]:
    """Wrap a function so that a keyword it does not take names the nearest one that it does.

    Raises:
        UnknownArgument: (a TypeError) when the wrapped function is called with an unknown keyword.

    >>> @knows_its_keywords
    ... def huber(*, delta=1.0):
    ...     return delta
    >>> huber(dleta=2.0)
    Traceback (most recent call last):
    ...
    fallline.errors.UnknownArgument: huber has no argument 'dleta'. Did you mean 'delta'?
    """
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    title = function.__qualname__.removesuffix(".__init__").rpartition(".<locals>.")[2].rpartition(".")[2]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for keyword in kwargs:
            if keyword not in names:
                raise unknown_argument(title, keyword, names)
        return function(*args, **kwargs)

    return checked
