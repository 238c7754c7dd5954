"""The loss and its gradient with respect to the prediction, computed aside: nothing of the user's is touched.

Neighbours: `gradients` and `direction`, whose rules read them.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fallline.losses.base import Loss
from fallline.losses.misuse.given import Given, tensors

# So many elements are computed at most, where a loss can be tried on the first samples.
MOST = 1 << 20
_FEWEST = 16


@dataclass(frozen=True, eq=False)
class Computed:
    """What came of computing the loss.

    Attributes:
        value: one number (the sum, where the loss is not reduced); None where it failed, or gave no tensor.
        shape: of what the loss returned.
        gradients: one for each part of the prediction; None where the loss does not depend on it.
        failure: the exception that computing it raised, or None.
        returned: the type of what the loss returned, where that is no tensor.
        again: computes the loss of another prediction, without a gradient.
        against: computes it of another prediction and another target.
        whole: whether all of what was given was computed.
        connected: the loss with its graph, where only the prediction with its own graph would do: a loss that
            differentiates with respect to inputs, or reaches what it trains by another way than the prediction.
    """

    value: Tensor | None
    shape: tuple[int, ...]
    gradients: tuple[Tensor | None, ...]
    failure: Exception | None
    returned: str
    again: Callable[[Any], Tensor]
    against: Callable[[Any, Any], Tensor]
    whole: bool
    connected: Tensor | None = None


def computed(given: Given) -> Computed:
    """The loss and its gradient: of copies first, and of the prediction itself before anything is said against it."""
    prediction, target, whole = _cut(given)
    outcome = _of_copies(given, prediction, target, whole)
    if not whole and not _sound(outcome):
        outcome = _of_copies(given, given.prediction, given.target, True)
    if given.foreign and _goes_nowhere(outcome):
        outcome = _of_the_graph(given, outcome)
    return outcome


def _goes_nowhere(outcome: Computed) -> bool:
    failed = outcome.failure is not None
    return failed or (outcome.value is not None and all(each is None for each in outcome.gradients))


def _sound(outcome: Computed) -> bool:
    """Whether nothing about it asks for a second look at all of the samples."""
    if outcome.value is None or _goes_nowhere(outcome) or not bool(torch.isfinite(outcome.value)):
        return False
    found = [each for each in outcome.gradients if each is not None]
    return any(bool(each.any()) for each in found) and all(bool(torch.isfinite(each).all()) for each in found)


def _of_copies(given: Given, prediction: Any, target: Any, whole: bool) -> Computed:
    call = _callable(given.loss)
    gentle = _is_gentle(given)

    def copies(value: Any) -> Any:
        return _copies(value, all_of_it=not gentle)

    def against(other: Any, goal: Any) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), _untouched(given), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _total(_first_of(call(copies(other), copies(goal))))

    def again(other: Any) -> Tensor:
        return against(other, target)

    with torch.inference_mode(False), torch.enable_grad(), _untouched(given), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaves = _leaves(prediction)
        # Copies of the leaves, which a loss may change in place.
        passed = copies(leaves)
        variables = [each for each in tensors(leaves) if each.requires_grad]
        value, shape, gradients, failure, returned, _ = _differentiated(
            call, passed, copies(target), variables, keep=False
        )
        return Computed(value, shape, gradients, failure, returned, again, against, whole)


def _of_the_graph(given: Given, before: Computed) -> Computed:
    """The loss of the prediction with its graph, of which only the value is a copy; `before`, where that fails too."""
    parts = [*tensors(given.graph), *given.target_graph]
    if not any(part.requires_grad for part in parts):
        return before
    goals = iter(given.target_graph)

    def with_graph(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(with_graph, value))
        if not isinstance(value, Tensor):
            return value
        part = next(goals)
        return part if part.requires_grad else _copies(value)

    parameters = list(given.model.parameters()) if given.model is not None else []
    with contextlib.ExitStack() as stack:
        for context in (quietly(*parts, *parameters), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(_untouched(given))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        passed, target = _copies(given.graph), with_graph(given.target)
        saved = [(part, part._version, part.detach().clone()) for part in parts if part.requires_grad]
        variables = [each for each in tensors(passed) if each.requires_grad]
        value, shape, gradients, failure, returned, total = _differentiated(
            _callable(given.loss), passed, target, variables, keep=True
        )
        for part, version, was in saved:
            if part._version != version:
                part.data.copy_(was)
    if failure is not None or total is None:
        return before if before.failure is None else replace(before, failure=failure or before.failure)
    return replace(
        before, value=value, shape=shape, gradients=gradients, failure=None, returned=returned, connected=total
    )


def _differentiated(
    call: Callable[[Any, Any], Any], prediction: Any, target: Any, variables: list[Tensor], *, keep: bool
) -> tuple[Tensor | None, tuple[int, ...], tuple[Tensor | None, ...], Exception | None, str, Tensor | None]:
    """The first five fields of `Computed`, and the loss with its graph, which `keep` keeps."""
    try:
        value = _first_of(call(prediction, target))
    except Exception as failure:
        return None, (), (), failure, "", None
    if not isinstance(value, Tensor):
        return None, (), (), None, type(value).__name__, None
    shape, total = tuple(value.shape), _total(value)
    gradients: tuple[Tensor | None, ...] = tuple(None for _ in variables)
    if total.requires_grad and variables:
        try:
            gradients = tuple(torch.autograd.grad(total, variables, allow_unused=True, retain_graph=keep))
        except Exception as failure:
            return total.detach(), shape, (), failure, "", None
    return total.detach(), shape, gradients, None, "", total if total.requires_grad else None


@contextlib.contextmanager
def quietly(*parts: Tensor) -> Iterator[None]:
    """No hook of these tensors is called, and none of them keeps a gradient.

    Hooks and `retain_grad` of hidden activations, which are found nowhere, still act in a backward pass.
    """
    hooks = [(part._backward_hooks, dict(part._backward_hooks)) for part in parts if part._backward_hooks]
    kept = [(part, part.grad) for part in parts if part.retains_grad]
    for each, _ in hooks:
        each.clear()
    try:
        yield
    finally:
        for each, saved in hooks:
            each.update(saved)
        for part, gradient in kept:
            part.grad = gradient


def _first_of(value: Any) -> Any:
    """The loss among several things that a callable returns: by its name, the first tensor, or a sum of losses."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        for name in ("loss", "total_loss", "total"):
            if name in value:
                return _first_of(value[name])
        losses = [each for each in value.values() if isinstance(each, Tensor) and each.is_floating_point()]
        losses = [each for each in losses if each.numel() == 1]
        return sum(losses[1:], losses[0]) if losses else value
    named = getattr(value, "loss", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(value, tuple | list) and value:
        found = [each for each in map(_first_of, value) if isinstance(each, Tensor)]
        return found[0] if found else _first_of(value[0])
    return value


def _total(value: Tensor) -> Tensor:
    return value if value.ndim == 0 else value.sum()


def _is_gentle(given: Given) -> bool:
    """Whether the loss is known to change nothing in place: one of fallline's or torch's own."""
    whole = given.loss.whole
    if whole is None:
        return "losses" not in given.settings  # a sum may hold any callable
    return str(getattr(whole, "__module__", "")).startswith("torch.nn.")


def _callable(loss: Loss) -> Callable[[Any, Any], Any]:
    """How the loss is called: one that takes the prediction alone, or its parts one by one, is given just that."""
    whole = loss.whole
    if whole is None:
        return loss
    binds = _binds(whole)

    def call(prediction: Any, target: Any) -> Any:
        ways: list[tuple[Any, ...]] = [(prediction, target)]
        if isinstance(prediction, tuple):
            ways.append(prediction if target is None else (*prediction, target))
        ways = [way for way in ways if binds(way)] or ([(prediction,)] if binds((prediction,)) else ways[:1])
        for way in ways[:-1]:
            with contextlib.suppress(TypeError, AttributeError):
                return whole(*way)
        return whole(*ways[-1])

    return call


def _binds(function: Any) -> Callable[[tuple[Any, ...]], bool]:
    """Whether a function can be called with some arguments; yes, where that cannot be known."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return lambda arguments: True

    def binds(arguments: tuple[Any, ...]) -> bool:
        try:
            signature.bind(*arguments)
        except TypeError:
            return False
        return True

    return binds


def _cut(given: Given) -> tuple[Any, Any, bool]:
    """The first samples of very large tensors, where no model is looked at."""
    parts = [*tensors(given.prediction), *tensors(given.target)]
    first = given.first
    if first is None or first.ndim == 0 or first.numel() <= MOST or given.model is not None:
        return given.prediction, given.target, True
    if any(part.ndim == 0 or len(part) != len(first) for part in parts):
        return given.prediction, given.target, True
    count = max(1, min(len(first), MOST * len(first) // first.numel()))
    if count < _FEWEST and not given.known:
        return given.prediction, given.target, True
    return _first(given.prediction, count), _first(given.target, count), count == len(first)


def sampled(given: Given) -> Given | None:
    """The same of the first samples only, where there are many; None where a callable may not be called so."""
    first = given.first
    if first is None or first.numel() <= MOST // 8:
        return given
    parts = [*tensors(given.prediction), *tensors(given.target)]
    count = MOST // 8 * len(first) // first.numel() if first.ndim else 0
    if count < _FEWEST or any(part.ndim == 0 or len(part) != len(first) for part in parts):
        return None
    return replace(given, prediction=_first(given.prediction, count), target=_first(given.target, count))


def _first(value: Any, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_first(item, count) for item in value)
    return value[:count] if isinstance(value, Tensor) else value


def _leaves(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_leaves, value))
    if isinstance(value, dict):
        return {name: _leaves(each) for name, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    floating = value.is_floating_point() or value.is_complex()
    return (value.clone() if value.is_inference() else value).detach().requires_grad_(floating)


def _copies(value: Any, *, all_of_it: bool = True) -> Any:
    """The same in other memory, a copy of what has a gradient passing it on; or of inference tensors only."""
    if isinstance(value, tuple):
        return tuple(_copies(each, all_of_it=all_of_it) for each in value)
    if isinstance(value, dict):
        return {name: _copies(each, all_of_it=all_of_it) for name, each in value.items()}
    return value.clone() if isinstance(value, Tensor) and (all_of_it or value.is_inference()) else value


@contextlib.contextmanager
def _untouched(given: Given) -> Iterator[None]:
    """Generators of random numbers, and the buffers of a loss that is a module, are given back as they were."""
    first = given.first
    devices = [first.device] if first is not None and first.is_cuda else []
    numbers = random.getstate()
    numpy = sys.modules.get("numpy.random")
    legacy = numpy.get_state() if numpy is not None else None
    thing = given.loss.call.arguments.get("thing") if given.loss.call is not None else None
    buffers = []
    if isinstance(thing, nn.Module):
        buffers = [(buffer, buffer.detach().clone()) for buffer in thing.buffers()]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(numbers)
            if numpy is not None:
                numpy.set_state(legacy)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
