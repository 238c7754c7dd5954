"""Number types: labels in floating point, integers where numbers are expected, predictions without a gradient.

Neighbours: `shapes`, and `targets` for the values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fallline.losses.base import Prediction, Target
from fallline.losses.misuse.finding import Finding, error, note, warning
from fallline.losses.misuse.given import Given, kind, shape, tensors, thinned

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_NUMBERS = frozenset({Target.REAL, Target.POSITIVE, Target.FRACTIONS, Target.PROBABILITIES, Target.LOG_PROBABILITIES})


def type_findings(given: Given) -> Iterator[Finding]:
    """What is wrong with the number types."""
    prediction, target = given.first, given.labels
    if prediction is None:
        return
    swapped = list(_swapped(given))
    yield from swapped
    if swapped:
        return
    if not prediction.is_floating_point() and not prediction.is_complex():
        yield _not_floating(given, prediction)
        return
    if target is None:
        return
    if given.indices is not None and given.expects in (Target.CLASSES, Target.CLASSES_OR_PROBABILITIES):
        yield from _indices(given, target)
    elif given.classes is not None and list(target.shape) == given.classes[1] and target.is_floating_point():
        yield from _floating_labels(given, target)
    elif given.expects in _NUMBERS or (given.expects == Target.CLASSES_OR_PROBABILITIES and target.is_floating_point()):
        yield from _numbers(given, prediction, target)


def _swapped(given: Given) -> Iterator[Finding]:
    """Outputs with a graph as the target, and labels without one as the prediction."""
    if not given.known or given.pair is None or not isinstance(given.graph, Tensor) or given.graph.requires_grad:
        return
    labels, outputs = given.pair
    if not any(part.requires_grad for part in given.target_graph) or not outputs.numel() or not labels.numel():
        return
    whole = not labels.is_floating_point() and not labels.is_complex()
    part = thinned(labels)
    coded = whole or bool(((part == 0) | (part == 1)).all()) or bool(((part == -1) | (part == 1)).all())
    other = thinned(outputs)
    if not coded or bool((other == other.round()).all()):
        return  # what else is the same either way round, or may be turned round on purpose
    yield error(
        "swapped",
        f"{given.name} was given {kind(labels)} labels of shape {shape(labels)} without a gradient as its prediction, "
        f"and as its target outputs of shape {shape(outputs)} with one.",
        "The order is loss(prediction, target).",
        "prediction, target = target, prediction",
    )


def _not_floating(given: Given, prediction: Tensor) -> Finding:
    fix = "prediction = logits  # the outputs themselves, without argmax, round or a comparison"
    if given.labels is not None and given.labels.is_floating_point():
        fix += "; the order is loss(prediction, target)"
    return error(
        "detached",
        f"{given.name} was given a prediction of type {kind(prediction)}, and expects floating-point outputs of the "
        "model, without argmax, round or a comparison.",
        "No gradient flows through whole numbers, so nothing would be trained.",
        fix,
    )


def _indices(given: Given, target: Tensor) -> Iterator[Finding]:
    if target.dtype == torch.int64 or (target.dtype == torch.uint8 and given.foreign):
        return
    yield error(
        "target-type",
        f"{given.name} was given class indices of type {kind(target)}, and expects int64.",
        "Other whole-number types are no indices in torch.",
        "target = target.long()",
    )


def _floating_labels(given: Given, target: Tensor) -> Iterator[Finding]:
    if given.wants == Prediction.LOGITS and given.expects not in (Target.CLASSES, Target.CLASSES_OR_PROBABILITIES):
        return
    part = thinned(target)
    whole = bool((part == part.round()).all())
    yield error(
        "target-type",
        f"{given.name} was given a target of shape {shape(target)} and type {kind(target)}, and expects class indices "
        "of type int64.",
        "These are class indices in floating point." if whole else "Real numbers name no class.",
        "target = target.long()" if whole else "loss = torch.nn.MSELoss()  # for one real number per sample",
    )


def _numbers(given: Given, prediction: Tensor, target: Tensor) -> Iterator[Finding]:
    if target.dtype == prediction.dtype:
        return
    seen = (
        f"{given.name} was given a target of type {kind(target)} and a prediction of type {kind(prediction)}, and "
        "expects one type for both."
    )
    fix = "target = target.to(prediction.dtype)"
    if not target.is_floating_point():
        if not given.foreign:
            yield error("target-type", seen, "Whole numbers are usually classes, or were not converted.", fix)
        elif given.expects == Target.FRACTIONS:
            yield error("target-type", seen, "torch computes this loss in floating point only.", fix)
        else:
            yield warning("target-type", seen, "Whole numbers are usually classes, or were not converted.", fix)
        return
    if prediction.dtype in _LOW_PRECISION or target.dtype in _LOW_PRECISION:
        return  # autocast, which computes the loss in float32
    why = "The loss is computed in the wider type, or fails in its backward pass."
    if given.foreign:
        make = warning if target.dtype == torch.float64 else note
        yield make("target-type", seen, why, fix)
    else:
        yield error("target-type", seen, why, fix)


def not_a_tensor(given: Given) -> Iterator[Finding]:
    """A prediction or a target that holds no tensor, in a loss that expects one."""
    if given.wants == Prediction.ANYTHING:
        return
    words = [("prediction", given.prediction)]
    if given.expects not in (Target.NOTHING, Target.ANYTHING):
        words.append(("target", given.target))
    for word, value in words:
        if next(tensors(value), None) is None:
            yield error(
                "target-type" if word == "target" else "detached",
                f"{given.name} was given a {word} of type {type(value).__name__}, and expects a tensor.",
                "Numbers and lists carry no gradient and no shape.",
                f"{word} = torch.as_tensor({word})" if word == "target" else "prediction = model(x)",
            )
