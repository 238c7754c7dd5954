"""Whatever serves as a loss, made a `Loss`: names, torch's own loss modules and functions, any callable.

A wrapped loss is called exactly as it is. Where it is one of torch's that we know, it is checked like ours,
and its values per sample come from the same module or function with `reduction="none"`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fallline.errors import LossMismatch, UnknownName, nearest
from fallline.losses import classification, regression
from fallline.losses.base import Check, Kind, Loss, Terms, accept_anything, spelled
from fallline.losses.checks import check_binary, check_classes, check_elementwise

registry: Mapping[str, Callable[..., Loss]] = {
    "mse": regression.mse,
    "l1": regression.l1,
    "huber": regression.huber,
    "cross_entropy": classification.cross_entropy,
    "binary_cross_entropy_with_logits": classification.binary_cross_entropy_with_logits,
}
"""Every loss of this package: its name and the function that makes it."""


def get(name: str) -> Callable[..., Loss]:
    """The constructor of the loss called `name`.

    Raises:
        UnknownName: with the nearest name.

    >>> get("mse")().code()
    'torch.nn.MSELoss()'
    """
    if name not in registry:
        raise UnknownName(f"There is no loss {name!r}. {nearest(name, registry)}")
    return registry[name]


@dataclass(frozen=True)
class _Known:
    """What is known of one of torch's losses: its kind and the maker of its check from its arguments."""

    kind: Kind
    check: Callable[..., Check]


def _elementwise(name: str, **_: object) -> Check:
    return partial(check_elementwise, name)


def _classes(name: str, *, weight: Any = None, ignore_index: Any = -100, **_: object) -> Check:
    return partial(check_classes, name, weight=weight, ignore_index=ignore_index)


def _log_probabilities(name: str, *, weight: Any = None, ignore_index: Any = -100, **_: object) -> Check:
    return partial(check_classes, name, weight=weight, ignore_index=ignore_index, allow_probabilities=False)


def _logits(name: str, *, pos_weight: Any = None, **_: object) -> Check:
    return partial(check_binary, name, pos_weight=pos_weight)


def _probabilities(name: str, **_: object) -> Check:
    return partial(check_binary, name, probabilities=True)


_UNKNOWN = _Known("other", lambda name, **_: accept_anything)
_KNOWN: Mapping[object, _Known] = {
    nn.MSELoss: _Known("regression", _elementwise),
    nn.L1Loss: _Known("regression", _elementwise),
    nn.SmoothL1Loss: _Known("regression", _elementwise),
    nn.HuberLoss: _Known("regression", _elementwise),
    nn.CrossEntropyLoss: _Known("classification", _classes),
    nn.NLLLoss: _Known("classification", _log_probabilities),
    nn.BCELoss: _Known("binary", _probabilities),
    nn.BCEWithLogitsLoss: _Known("binary", _logits),
    functional.mse_loss: _Known("regression", _elementwise),
    functional.l1_loss: _Known("regression", _elementwise),
    functional.smooth_l1_loss: _Known("regression", _elementwise),
    functional.huber_loss: _Known("regression", _elementwise),
    functional.cross_entropy: _Known("classification", _classes),
    functional.nll_loss: _Known("classification", _log_probabilities),
    functional.binary_cross_entropy: _Known("binary", _probabilities),
    functional.binary_cross_entropy_with_logits: _Known("binary", _logits),
}


def as_loss(thing: object) -> Loss:
    """A `Loss` from a `Loss`, a name, a torch loss module or function, or any callable(prediction, target).

    Raises:
        UnknownName: if `thing` is no loss: an unknown name, a class instead of an instance, or not callable.
        LossMismatch: if its `reduction` is "none": a loss must end in one number.

    >>> import torch
    >>> as_loss("mse").name, as_loss(torch.nn.CrossEntropyLoss()).kind
    ('mse', 'classification')
    >>> as_loss(lambda prediction, target: (prediction - target).abs().max()).kind
    'other'
    """
    if isinstance(thing, Loss):
        return thing
    if isinstance(thing, str):
        constructor: Callable[..., Loss] = get(thing)
        return constructor()
    for name, constructor in registry.items():
        if thing is constructor:
            raise UnknownName(f"The loss was given as the function {name}, and is expected made: call it, {name}().")
    if isinstance(thing, type):
        raise UnknownName(
            f"The loss was given as the class {thing.__name__}, and is expected as an instance: {thing.__name__}()."
        )
    if isinstance(thing, nn.Module):
        return _from_module(thing)
    if callable(thing):
        return _from_callable(thing)
    raise UnknownName(
        f"A loss was given as {thing!r} of type {type(thing).__name__}. Give a name such as 'mse', a torch "
        "loss such as torch.nn.MSELoss(), or a callable(prediction, target) that returns one number."
    )


def _from_module(module: nn.Module) -> Loss:
    name = type(module).__name__
    reduction = getattr(module, "reduction", "mean")
    _refuse_none(name, reduction)
    arguments = _arguments_of(module)
    known = _KNOWN.get(type(module), _UNKNOWN)
    terms: Terms = partial(_no_terms, name)
    if hasattr(module, "reduction"):
        unreduced = copy.copy(module)
        unreduced.__dict__["reduction"] = "none"
        terms = partial(_terms, name, unreduced, _label_weights(known, arguments), reduction == "batchmean")
    constructor = f"{type(module).__module__}.{name}"
    if constructor.startswith("torch.nn.modules."):
        constructor = f"torch.nn.{name}"
    return Loss(
        name=name,
        kind=known.kind,
        terms=terms,
        arguments=_for_json(arguments),
        reduction="sum" if reduction == "sum" else "mean",
        validate=known.check(name, **arguments),
        source=partial(spelled, constructor, arguments, _defaults_of(type(module))),
        whole=module,
    )


def _refuse_none(name: str, reduction: object) -> None:
    if reduction == "none":
        raise LossMismatch(
            f"The loss {name} was given with reduction='none', which makes no single number to minimise. "
            "Give it reduction='mean'."
        )


def _for_json(arguments: Mapping[str, object]) -> dict[str, object]:
    without = {name: value for name, value in arguments.items() if name != "reduction"}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in without.items()}


def _defaults_of(kind: type) -> dict[str, object]:
    parameters = inspect.signature(kind).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _arguments_of(module: nn.Module) -> dict[str, object]:
    """The arguments that the module was made with, as far as it keeps them under their names."""
    names = [name for name in inspect.signature(type(module)).parameters if name not in ("size_average", "reduce")]
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {name: value for name, value in found.items() if value is not None}


def _label_weights(known: _Known, arguments: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a mean over class indices divides by: the weight of each label, 0 for an ignored one."""
    if known.kind != "classification":
        return None
    return partial(_weights_of, arguments.get("weight"), arguments.get("ignore_index", -100))


def _weights_of(weight: Tensor | None, ignore_index: int, target: Tensor) -> Tensor:
    kept = target != ignore_index
    return kept if weight is None else weight[target * kept] * kept


def _terms(
    name: str,
    unreduced: Callable[[Tensor, Tensor], Tensor],
    weights: Callable[[Tensor], Tensor] | None,
    sums_samples: bool,
    prediction: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor | None]:
    values = unreduced(prediction, target)
    if values.ndim == 0 and target.ndim > 0:
        return _no_terms(name, prediction, target)
    if sums_samples and values.ndim > 1:
        values = values.flatten(1).sum(1)
    return values, None if weights is None or target.is_floating_point() else weights(target)


def _no_terms(name: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, None]:
    raise LossMismatch(
        f"The loss {name} gives one number for a batch, and values per sample were asked for. Use one of "
        "fallline's losses, or a torch loss module that knows reduction='none'."
    )


def _from_callable(function: Callable[..., Tensor]) -> Loss:
    inner, keywords = function, {}
    if isinstance(function, partial) and not function.args:
        inner, keywords = function.func, function.keywords
    name: str = getattr(inner, "__name__", type(inner).__name__).strip("<>")
    known = _KNOWN.get(inner, _UNKNOWN) if inspect.isroutine(inner) else _UNKNOWN
    reduction = keywords.get("reduction", "mean")
    _refuse_none(name, reduction)
    terms: Terms = partial(_no_terms, name)
    if known is not _UNKNOWN:
        unreduced = partial(inner, **{**keywords, "reduction": "none"})
        terms = partial(_terms, name, unreduced, _label_weights(known, keywords), False)
    return Loss(
        name=name,
        kind=known.kind,
        terms=terms,
        arguments=_for_json(keywords),
        reduction="sum" if reduction == "sum" else "mean",
        validate=known.check(name, **keywords),
        source=partial(_spelled_function, inner, keywords),
        whole=function,
    )


def _spelled_function(function: Callable[..., Tensor], keywords: Mapping[str, object]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", None) or type(function).__module__
    full = name if module == "__main__" else f"{module}.{name}"
    return f"functools.partial({spelled(full, keywords, {}).replace('(', ', ', 1)}" if keywords else full
