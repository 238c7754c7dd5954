"""The arguments that a loss was made with: weights of classes and of yes, reductions, arguments that are refused.

Neighbours: `targets` for `ignore_index`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fallline.errors import FalllineError
from fallline.losses import wrapped
from fallline.losses.base import Prediction, Target
from fallline.losses.catalogue import registry
from fallline.losses.misuse.finding import Finding, error, errors_among, note, warning
from fallline.losses.misuse.given import Given, kind, shape, thinned
from fallline.losses.misuse.shapes import broadcast


def setting_findings(given: Given) -> Iterator[Finding]:
    """What is wrong with the arguments of the loss."""
    refused = list(_refused(given))
    yield from refused
    if errors_among(refused):
        return
    weight = _as_tensor(given.settings.get("weight"))
    if weight is not None and given.classes is not None:
        yield from _class_weights(given, weight, given.classes[0])
    elif weight is not None and given.first is not None and given.wants != Prediction.ANYTHING:
        yield from _factors(given, "weight", weight)
    yes = _as_tensor(given.settings.get("pos_weight"))
    if yes is not None and given.first is not None:
        yield from _factors(given, "pos_weight", yes)
    yield from _reduction(given)


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple | list | float | int) and not isinstance(value, bool):
        try:
            return torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError):
            return None
    return None


def _refused(given: Given) -> Iterator[Finding]:
    """Arguments that torch takes and fallline's maker of the same loss refuses, with its reason."""
    if given.loss.call is None or given.wants != Prediction.ANYTHING:
        return
    thing = given.loss.call.arguments.get("thing")
    maker = None
    if isinstance(thing, nn.Module):
        maker = wrapped._classes().get(type(thing))
    elif thing is not None:
        inner = getattr(thing, "func", thing)
        name = getattr(inner, "__name__", "")
        if name in wrapped.FUNCTIONS and inner is getattr(torch.nn.functional, name, None):
            maker = registry.get(wrapped.FUNCTIONS[name])
    if maker is None:
        return
    known = inspect.signature(maker).parameters
    try:
        maker(**{name: value for name, value in given.settings.items() if name in known and value is not None})
    except FalllineError as reason:
        named = [name for name in ("weight", "pos_weight") if name in known]
        found = [
            each
            for name in named
            if (factor := _as_tensor(given.settings.get(name))) is not None
            for each in _numbers(given, name, factor)
        ]
        if found:
            yield from found
            return
        weights = "weight=" in str(reason)
        yield (error if weights else warning)(
            "class-weights" if weights else "domain",
            str(reason),
            "torch takes this without a word.",
            "weight = weight.abs()" if weights else f"fl.losses.{maker.__name__}()  # with an argument in its domain",
        )
    except (TypeError, ValueError):
        return


def _class_weights(given: Given, weight: Tensor, classes: int) -> Iterator[Finding]:
    if weight.ndim != 1 or len(weight) != classes:
        yield error(
            "class-weights",
            f"{given.name} was given class weights of shape {shape(weight)} for {classes} classes.",
            f"It expects one weight for each class: shape [{classes}].",
            f"weight=torch.ones({classes})  # one number for each class",
        )
        return
    yield from _numbers(given, "weight", weight)
    first = given.first
    if given.foreign and first is not None and {first.dtype, weight.dtype} == {torch.float32, torch.float64}:
        yield error(
            "class-weights",
            f"{given.name} was given class weights of type {kind(weight)} and a prediction of type {kind(first)}.",
            "torch computes this loss in one type only.",
            "weight=weight.to(prediction.dtype)",
        )
    if not bool((weight == 0).any()) or given.indices is None:
        return
    target = thinned(given.indices)
    inside = (target >= 0) & (target < classes)
    if given.ignore_index is not None:
        inside = inside & (target != given.ignore_index)
    labels = target[inside].long()
    if not len(labels):
        return
    weights = weight.to(labels.device)[labels]
    silent = int((weights == 0).sum())
    zero = [index for index, value in enumerate(weight.tolist()) if value == 0][:5]
    if silent == len(labels):
        yield error(
            "class-weights" if target.numel() == given.indices.numel() else "all-ignored",
            f"{given.name} was given labels whose classes all have the weight 0.",
            "There is nothing to average: 0/0 is NaN.",
            "weight=None",
        )
    elif silent:
        yield warning(
            "class-weights",
            f"{given.name} gives the weight 0 to the classes {zero}, of which the target holds {silent} of "
            f"{len(labels)} labels.",
            "These count for nothing, unless they stand for padding.",
            "weight=weight.clamp(min=1e-3)  # or ignore_index, for padding",
        )


def _numbers(given: Given, name: str, weight: Tensor) -> Iterator[Finding]:
    values = weight.double()
    if not bool(torch.isfinite(values).all()):
        yield error(
            "class-weights",
            f"{given.name} was given {_culprits(name, values, ~torch.isfinite(values))}.",
            "A weight that is infinite or NaN makes the loss so; a class that never occurs has no inverse frequency.",
            f"{name} = torch.where(torch.isfinite({name}), {name}, 1)  # or 1 / counts.clamp(min=1)",
        )
    elif bool((values < 0).any()):
        yield error(
            "class-weights",
            f"{given.name} was given {_culprits(name, values, values < 0)}.",
            "Under a negative weight the loss falls as predictions get worse.",
            f"{name} = {name}.abs()",
        )


def _culprits(name: str, values: Tensor, wrong: Tensor) -> str:
    """The wrong ones among some weights, with their places: at most five."""
    flat, places = values.flatten(), wrong.flatten().nonzero().flatten().tolist()
    if values.ndim == 0:
        return f"{name}={float(flat[0]):g}"
    listed = ", ".join(f"{name}[{place}] = {float(flat[place]):g}" for place in places[:5])
    return listed + (f" and {len(places) - 5} more such" if len(places) > 5 else "")


def _factors(given: Given, name: str, weight: Tensor) -> Iterator[Finding]:
    """Factors of the elements, which broadcast to the prediction."""
    assert given.first is not None
    found = list(_numbers(given, name, weight))
    yield from found
    if found:
        return
    try:
        fits = broadcast(weight.shape, given.first.shape) == tuple(given.first.shape)
    except ValueError:
        fits = False
    if not fits:
        outputs = given.first.shape[-1] if given.first.ndim else 1
        yield error(
            "class-weights",
            f"{given.name} was given a {name} of shape {shape(weight)} for a prediction of shape {shape(given.first)}.",
            "It expects one number, or one for each of the last dimension's outputs; this does not broadcast.",
            f"{name}=torch.ones({outputs})",
        )
    elif name == "pos_weight" and bool((weight == 0).any()):
        yield warning(
            "class-weights",
            f"{given.name} was given a pos_weight of 0.",
            "A yes counts for nothing there, and the model learns to say no.",
            "pos_weight = negatives / positives.clamp(min=1)",
        )


def _reduction(given: Given) -> Iterator[Finding]:
    first = given.first
    if first is None or first.ndim == 0:
        return
    reduction = given.loss.reduction
    if given.wants == Prediction.LOG_DENSITIES and reduction == "mean" and first.ndim > 1:
        if first.numel() > first.shape[0]:
            each = first.numel() // first.shape[0]
            yield warning(
                "reduction",
                f'{given.name} has reduction="mean", which divides the divergence of each of {first.shape[0]} samples '
                f"by its {each} values too.",
                f"It is {each} times smaller than the Kullback–Leibler divergence.",
                'reduction="batchmean"',
            )
    elif reduction == "batchmean" and first.ndim > 2:
        each = math.prod(first.shape[1:-1])
        yield note(
            "reduction",
            f'{given.name} has reduction="batchmean" and {each} positions in each of {first.shape[0]} samples.',
            "It sums over the positions: the loss and its gradient grow with their number.",
            "loss(prediction.flatten(0, -2), target.flatten(0, -2))",
        )
    elif reduction == "sum" and given.expects != Target.NOTHING:
        yield note(
            "reduction",
            f'{given.name} has reduction="sum" over a batch of {len(first)} samples.',
            f"Its gradient grows with the batch; a learning rate found for the mean is {len(first)} times too large, "
            "or more where a sample has several values.",
            'reduction="mean"  # or lr / len(prediction)',
        )
