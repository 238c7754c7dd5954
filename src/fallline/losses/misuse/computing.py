"""The loss and its gradient with respect to the prediction, computed aside: nothing of the user's is touched.

Neighbours: `gradients` and `direction`, whose rules read them.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fallline.losses.base import Loss
from fallline.losses.misuse.given import Given, tensors

# Of losses known to be made sample by sample, so many elements are computed at most.
MOST = 1 << 20


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
    """

    value: Tensor | None
    shape: tuple[int, ...]
    gradients: tuple[Tensor | None, ...]
    failure: Exception | None
    returned: str
    again: Callable[[Any], Tensor]
    against: Callable[[Any, Any], Tensor]
    whole: bool


def computed(given: Given) -> Computed:
    """The loss and its gradient."""
    prediction, target, whole = _cut(given)
    with torch.inference_mode(False), torch.enable_grad(), _untouched(given), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaves = _leaves(prediction)
        target = _copies(target)
        call = _callable(given.loss, leaves, target)

        def against(other: Any, goal: Any) -> Tensor:
            with torch.inference_mode(False), torch.no_grad(), _untouched(given), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _total(_first_of(call(other, goal)))

        def again(other: Any) -> Tensor:
            return against(other, target)

        nothing: tuple[Tensor | None, ...] = ()
        try:
            value = call(leaves, target)
        except Exception as failure:
            return Computed(None, (), nothing, failure, "", again, against, whole)
        value = _first_of(value)
        if not isinstance(value, Tensor):
            return Computed(None, (), nothing, None, type(value).__name__, again, against, whole)
        shape = tuple(value.shape)
        total = _total(value)
        variables = [each for each in tensors(leaves) if each.requires_grad]
        gradients: tuple[Tensor | None, ...] = tuple(None for _ in variables)
        if total.requires_grad and variables:
            try:
                gradients = tuple(torch.autograd.grad(total, variables, allow_unused=True))
            except Exception as failure:
                return Computed(total.detach(), shape, nothing, failure, "", again, against, whole)
        return Computed(total.detach(), shape, gradients, None, "", again, against, whole)


def _first_of(value: Any) -> Any:
    """The loss among several things that a callable returns: by its name, or the first."""
    if isinstance(value, tuple | list) and value:
        return getattr(value, "loss", value[0])
    return value


def _total(value: Tensor) -> Tensor:
    return value if value.ndim == 0 else value.sum()


def _callable(loss: Loss, prediction: Any, target: Any) -> Callable[[Any, Any], Any]:
    """How the loss is called; a callable that wants the parts of a prediction one by one gets them so."""
    if loss.whole is None or not isinstance(prediction, tuple):
        return loss
    whole = loss.whole

    def call(prediction: Any, target: Any) -> Any:
        try:
            return whole(prediction, target)
        except (TypeError, AttributeError):
            return whole(*prediction) if target is None else whole(*prediction, target)

    return call


def _cut(given: Given) -> tuple[Any, Any, bool]:
    """The first samples of very large tensors, where the loss is one of fallline's and no model is looked at."""
    parts = [*tensors(given.prediction), *tensors(given.target)]
    first = given.first
    described = given.loss.prediction != "anything"
    if first is None or first.ndim == 0 or first.numel() <= MOST or not described or given.model is not None:
        return given.prediction, given.target, True
    if any(part.ndim == 0 or len(part) != len(first) for part in parts):
        return given.prediction, given.target, True
    count = max(1, min(len(first), MOST * len(first) // first.numel()))
    return _first(given.prediction, count), _first(given.target, count), count == len(first)


def sampled(given: Given) -> Given | None:
    """The same of the first samples only, where there are many; None where a callable may not be called so."""
    first = given.first
    if first is None or first.numel() <= MOST // 8:
        return given
    parts = [*tensors(given.prediction), *tensors(given.target)]
    count = MOST // 8 * len(first) // first.numel() if first.ndim else 0
    if count < 16 or any(part.ndim == 0 or len(part) != len(first) for part in parts):
        return None
    return replace(given, prediction=_first(given.prediction, count), target=_first(given.target, count))


def _first(value: Any, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_first(item, count) for item in value)
    return value[:count] if isinstance(value, Tensor) else value


def _leaves(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_leaves, value))
    if not isinstance(value, Tensor):
        return value
    floating = value.is_floating_point() or value.is_complex()
    return value.detach().clone().requires_grad_(floating)


def _copies(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copies, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


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
