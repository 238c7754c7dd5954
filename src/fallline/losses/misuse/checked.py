"""The check inside anybody's training loop: a loss that looks at its first batches, and then is what it was.

Neighbours: `check`, which it calls.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fallline.errors import InvalidHyperparameter, LossMisused
from fallline.losses.base import Loss
from fallline.losses.misuse.check import require
from fallline.losses.misuse.given import tensors
from fallline.losses.wrapped import understood

L = TypeVar("L")


class Watch:
    """How many batches are still to be checked, and what was warned of."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.warned: set[str] = set()

    def look(self, thing: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Checks one batch.

        Raises:
            LossMismatch: for findings of severity "error".
        """
        loss, prediction, target = _sorted(thing, arguments, keywords)
        found = require(loss, prediction, target)
        self.left -= 1
        for each in found:
            if each.severity == "warning" and each.code not in self.warned:
                self.warned.add(each.code)
                # The wrapper's call, and for a module torch's two calls, lie between here and the training loop.
                depth = 5 if isinstance(thing, nn.Module) else 3
                warnings.warn(f"{each.message} Mend it with: {each.fix}", LossMisused, stacklevel=depth)


def _sorted(thing: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The loss, the prediction and the target of a call in torch's order, or by keyword."""
    arrange = understood(thing).arrange
    rest = dict(keywords)
    given = list(arguments)
    for name in _tensors_of(thing)[len(given) :]:
        if name in rest:
            given.append(rest.pop(name))
    loss = partial(thing, **rest) if rest and not isinstance(thing, Loss | nn.Module) else thing
    if len(given) <= 2:
        return loss, (given[0] if given else None), (given[1] if len(given) > 1 else None)
    if arrange is None:
        return _InOrder(loss), tuple(given[:-1]), given[-1]
    prediction, target = arrange(*given)
    made = understood(loss)
    return (made if made.whole is None else replace(made, whole=None)), prediction, target


def _tensors_of(thing: Any) -> list[str]:
    """The names of the arguments that a loss must be given: those without a default."""
    function = thing.forward if isinstance(thing, nn.Module) else thing
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ["input", "target"]
    return [each.name for each in parameters if each.default is each.empty and each.kind != each.VAR_KEYWORD]


class _InOrder:
    """A callable of more than two tensors as one of a prediction of several parts and a target."""

    def __init__(self, thing: Callable[..., Tensor]) -> None:
        self.thing = thing
        self.__name__ = getattr(thing, "__name__", type(thing).__name__)

    def __call__(self, prediction: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return self.thing(*prediction, target)


def _hidden(arguments: tuple[Any, ...]) -> bool:
    """Whether values cannot be read: inside compile, vmap or grad, or of tensors that hold none."""
    if torch.compiler.is_compiling():
        return True
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(each) or each.is_meta or _fake(each)
        for each in tensors(tuple(each for each in arguments))
    )


def _fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")


def checked(loss: L, batches: int = 3) -> L:
    """A loss that checks the first batches that it is called with, for anybody's training loop.

    It is called as before, and gives the same value and the same gradients. Errors raise `LossMismatch`, each warning
    is given once with `LossMisused`, notes are kept to themselves. A loss that is a module stays one of its class: the
    same attributes, parameters, buffers and `state_dict` (they are shared with the original); after the last check
    nothing is left of it. A function is called through one attribute more.

    Inside `torch.compile`, `torch.vmap` and `torch.func.grad` there are no values to look at: such calls are passed on,
    and do not count. `torch.jit.script` takes a module after its last check. A callable of which nothing is known is
    called some ten times by each check: see `check`.

    Args:
        loss: what `check` takes: one of fallline's, a name, a torch module or function, any callable.
        batches: how many calls are checked, ≥ 0; 0 gives back the loss as it is.

    Raises:
        InvalidHyperparameter: if `batches` is no whole number ≥ 0.
        UnknownName: if `loss` is no loss.

    >>> criterion = checked(torch.nn.MSELoss())
    >>> criterion(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    >>> criterion(torch.zeros(4, 1), torch.zeros(4))
    Traceback (most recent call last):
    ...
    fallline.errors.LossMismatch: MSELoss was given a prediction of shape [4, 1] and a target of shape [4], ...
    """
    made = understood(loss)
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise InvalidHyperparameter(f"checked() was given batches={batches!r}, and expects a whole number ≥ 0.")
    if batches < 1:
        return cast(L, made) if isinstance(loss, str) else loss
    if isinstance(loss, nn.Module):
        return cast(L, _module(loss, batches))
    if isinstance(loss, Loss | str):
        return cast(L, _loss(made, batches))
    return cast(L, CheckedFunction(cast(Callable[..., Any], loss), batches))


def _module(module: nn.Module, batches: int) -> nn.Module:
    """A copy that shares the module's parameters, buffers and hooks, and has a `forward` of its own for a while."""
    twin = copy.copy(module)
    twin.__dict__["forward"] = CheckedForward(twin, batches)
    return twin


class CheckedForward:
    """Stands in front of a module's `forward`, until it has checked as many batches as it should."""

    def __init__(self, module: nn.Module, batches: int) -> None:
        self.module, self.watch = module, Watch(batches)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        module = self.module
        plain = type(module)
        if not _hidden((*arguments, *keywords.values())):
            bare = plain.__new__(plain)
            bare.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
            bare.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
            self.watch.look(bare, arguments, keywords)
            if self.watch.left <= 0 and module.__dict__.get("forward") is self:
                del module.__dict__["forward"]
        return plain.forward(module, *arguments, **keywords)


class CheckedLoss(Loss):
    """One of fallline's losses that checks its first batches; then it is a `Loss`."""

    watch: Watch
    plain: Loss

    def __call__(self, prediction: Any, target: Any = None, *more: Tensor, numbers: Any = None) -> Tensor:
        values = numbers.values() if numbers is not None else ()
        if numbers is None and not _hidden((prediction, target, *more, *values)):
            self.watch.look(self.plain, (prediction, target, *more), {})
            if self.watch.left <= 0:
                object.__setattr__(self, "__class__", Loss)
        return Loss.__call__(self, prediction, target, *more, numbers=numbers)


def _loss(loss: Loss, batches: int) -> Loss:
    made = object.__new__(CheckedLoss)
    made.__dict__.update(loss.__dict__, watch=Watch(batches), plain=loss)
    return made


class CheckedFunction(partial):  # type: ignore[type-arg]
    """A function, or another callable, that checks its first batches; a `functools.partial` of it, which `fl.losses`
    looks through."""

    watch: Watch | None

    def __new__(cls, function: Callable[..., Any], batches: int) -> CheckedFunction:
        made = super().__new__(cls, function)
        functools.update_wrapper(made, function, updated=())
        made.watch = Watch(batches)
        return made

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        if self.watch is not None and not _hidden((*arguments, *keywords.values())):
            self.watch.look(self.bare, arguments, keywords)
            if self.watch.left <= 0:
                self.watch = None
        return super().__call__(*arguments, **keywords)

    @property
    def bare(self) -> Callable[..., Any]:
        """The function without its checks."""
        return partial(self.func, **self.keywords) if self.keywords else self.func

    def __getattr__(self, name: str) -> Any:
        if name == "watch":
            raise AttributeError(name)
        return getattr(self.func, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "watch" or name.startswith("__") or not hasattr(self.func, "__dict__")
        object.__setattr__(self, name, value) if own else setattr(self.func, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return checked, (self.bare, self.watch.left if self.watch is not None else 0)
