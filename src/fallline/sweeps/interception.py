"""What a model calls of torch, seen while it is called: the ground on which draws and batched functions stand.

`torch.overrides.TorchFunctionMode` shows every call, but a function of `torch.nn.functional` that is written in Python
is shown as one call, and what it calls is not. Here its parts are shown instead, so that a mode need only know the
functions that torch itself does not compose of others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType
from typing import Any, ClassVar, TypeGuard

from torch.overrides import TorchFunctionMode


class Interceptor(TorchFunctionMode):
    """A mode whose `intercept` sees every call that a model makes, down to what torch does not write in Python.

    Functions of `torch.nn.functional` that are named in `whole` are seen as they are called.
    """

    whole: ClassVar[frozenset[Callable[..., Any]]] = frozenset()

    def intercept(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call returns. The mode is not active in here; the modes around it are."""
        return function(*args, **kwargs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if _is_written_in_python(func) and func not in self.whole:
            with self:
                return in_parts(func)(*args, **(kwargs or {}))
        return self.intercept(func, args, kwargs or {})


@functools.cache
def in_parts(function: FunctionType) -> FunctionType:
    """The same function, which does not hand itself over as a whole to the active mode.

    >>> import torch.nn.functional as F
    >>> in_parts(F.dropout) is F.dropout, in_parts(F.dropout).__code__ is F.dropout.__code__
    (False, True)
    """
    unseen = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _no)
    names = {**function.__globals__, **unseen}
    # Pools choose between two functions that a closure holds.
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    closure = tuple(CellType(in_parts(each) if _is_written_in_python(each) else each) for each in held)
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _is_written_in_python(function: object) -> TypeGuard[FunctionType]:
    return isinstance(function, FunctionType) and function.__module__ == "torch.nn.functional"


def _no(*_: Any) -> bool:
    return False
