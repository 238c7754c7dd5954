"""Whatever serves as a loss, made a `Loss`: names, torch's own loss modules and functions, any callable.

A wrapped loss is called exactly as it is. Where it is one of torch's, the `Loss` of this package that is equal to it
says what it wants to be given, and its values per sample.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fallline.description import Call
from fallline.errors import FalllineError, LossMismatch, UnknownName
from fallline.losses.base import Loss, Numbers, Parts, defaults_of, spelled
from fallline.losses.catalogue import parse, registry

# torch's functions under the names of ours.
FUNCTIONS: Mapping[str, str] = {
    "mse_loss": "mse",
    "l1_loss": "l1",
    "smooth_l1_loss": "smooth_l1",
    "huber_loss": "huber",
    "cross_entropy": "cross_entropy",
    "nll_loss": "nll",
    "binary_cross_entropy": "binary_cross_entropy",
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "kl_div": "kl_div",
    "poisson_nll_loss": "poisson_nll",
    "gaussian_nll_loss": "gaussian_nll",
    "hinge_embedding_loss": "hinge_embedding",
    "soft_margin_loss": "soft_margin",
    "multi_margin_loss": "multi_margin",
    "multilabel_margin_loss": "multilabel_margin",
    "multilabel_soft_margin_loss": "multilabel_soft_margin",
    "cosine_embedding_loss": "cosine_embedding",
    "margin_ranking_loss": "margin_ranking",
    "triplet_margin_loss": "triplet_margin",
    "ctc_loss": "ctc",
}


def as_loss(thing: object) -> Loss:
    """A `Loss` from a `Loss`, a name ("mse", "huber:delta=0.5"), a torch loss module or function, or any
    callable(prediction, target).

    Raises:
        UnknownName: if `thing` is no loss: an unknown name, a class instead of an instance, or not callable.
        LossMismatch: if its `reduction` is "none": a loss must end in one number.

    >>> import torch
    >>> as_loss("mse").name, as_loss(torch.nn.CrossEntropyLoss()).kind
    ('mse', 'classification')
    >>> as_loss(lambda prediction, target: (prediction - target).abs().max()).kind
    'other'
    """
    loss = understood(thing)
    if loss.reduction == "none":
        raise LossMismatch(
            f"The loss {loss.name} was given with reduction='none', which makes no single number to minimise. "
            "Give it reduction='mean'."
        )
    return loss


def understood(thing: object) -> Loss:
    """`as_loss` for a loss of any reduction.

    Raises:
        UnknownName: if `thing` is no loss.
    """
    if isinstance(thing, Loss):
        return thing
    if isinstance(thing, str):
        return parse(thing)
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


@functools.cache
def _classes() -> Mapping[type, Callable[..., Loss]]:
    """Our maker of each of torch's loss classes."""
    found: dict[type, Callable[..., Loss]] = {}
    for maker in registry.values():
        parameters = inspect.signature(maker).parameters.values()
        if all(each.default is not each.empty for each in parameters) and maker().torch_name:
            found[getattr(nn, maker().torch_name)] = maker
    return found


def _from_module(module: nn.Module) -> Loss:
    name = type(module).__name__
    arguments = _arguments_of(module)
    constructor = f"{type(module).__module__}.{name}"
    if constructor.startswith("torch.nn.modules."):
        constructor = f"torch.nn.{name}"
    written = spelled(constructor, arguments, defaults_of(type(module)))
    return _wrapping(module, name, written, _classes().get(type(module)), arguments)


def _arguments_of(module: nn.Module) -> dict[str, object]:
    """The arguments that the module was made with, as far as it keeps them under their names."""
    names = [name for name in inspect.signature(type(module)).parameters if name not in ("size_average", "reduce")]
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    return {name: value for name, value in found.items() if value is not None}


def _from_callable(function: Callable[..., Tensor]) -> Loss:
    inner, keywords = function, {}
    if isinstance(function, partial) and not function.args:
        inner, keywords = function.func, function.keywords
    name: str = getattr(inner, "__name__", type(inner).__name__).strip("<>")
    torchs = name in FUNCTIONS and inner is getattr(functional, name)
    maker = registry.get(FUNCTIONS[name]) if torchs else None
    return _wrapping(function, name, _spelled_function(inner, keywords), maker, keywords)


def _wrapping(
    whole: Callable[..., Tensor],
    name: str,
    written: str,
    maker: Callable[..., Loss] | None,
    arguments: Mapping[str, Any],
) -> Loss:
    """The loss that calls `whole`, and is described by ours where there is one that is equal."""
    made_of = Call(as_loss, {"thing": whole})
    reduction = arguments.get("reduction", "mean")
    if reduction not in ("mean", "sum", "none", "batchmean"):
        reduction = "mean"
    if maker is not None:
        known = inspect.signature(maker).parameters
        try:
            given = {key: value for key, value in arguments.items() if key in known}
            ours = maker(**{"reduction": "mean"} | given)  # torch's default, kl_div's too
        except FalllineError:  # torch takes arguments that we refuse
            ours = None
        if ours is not None:
            return replace(ours, name=name, kin=ours.name, whole=whole, written=written, call=made_of)
    terms = partial(_no_terms, name)
    return Loss(name, "other", terms, reduction=reduction, whole=whole, written=written, call=made_of)


def _no_terms(name: str, prediction: Parts, target: Parts, numbers: Numbers) -> tuple[Tensor, None]:
    raise LossMismatch(
        f"The loss {name} gives one number for a batch, and values per sample were asked for. Use one of "
        "fallline's losses, or one of torch's own."
    )


def _spelled_function(function: Callable[..., Tensor], keywords: Mapping[str, object]) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", None) or type(function).__module__
    full = name if module == "__main__" else f"{module}.{name}"
    return f"functools.partial({spelled(full, keywords, {}).replace('(', ', ', 1)}" if keywords else full
