"""Shapes: what would be broadcast, classes in another dimension, batches of different sizes, nothing at all.

Neighbours: `types` for number types, `targets` for the values of a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fallline.losses.base import Prediction, Target
from fallline.losses.misuse.finding import Finding, error, note, warning
from fallline.losses.misuse.given import ELEMENTS, ELEMENTWISE, OVER_CLASSES, Given, shape, tensors, thinned

ONE_OUTPUT = "loss = torch.nn.BCEWithLogitsLoss()  # target.to(prediction.dtype), of the prediction's shape"


def broadcast(first: torch.Size, second: torch.Size) -> tuple[int, ...]:
    """The shape to which two are broadcast; torch's own function imports a second's worth of modules.

    Raises:
        ValueError: if they cannot be broadcast.
    """
    return tuple(np.broadcast_shapes(tuple(first), tuple(second)))


def yes_or_no(prediction: Tensor, target: Tensor) -> str:
    """The lines that make a loss over one class one for yes or no."""
    if target.shape == prediction.shape and target.dtype == prediction.dtype:
        return "loss = torch.nn.BCEWithLogitsLoss()"
    change = "target = target"
    if target.shape != prediction.shape and target.numel() == prediction.numel():
        change += ".reshape(prediction.shape)"
    if target.dtype != prediction.dtype:
        change += ".to(prediction.dtype)"
    return f"loss = torch.nn.BCEWithLogitsLoss(); {change}"


def shape_findings(given: Given) -> Iterator[Finding]:
    """What is wrong with the shapes."""
    yield from _empty(given)
    if given.first is None or given.labels is None or not given.first.numel() or not given.labels.numel():
        return
    if not (given.first.is_floating_point() or given.first.is_complex()) and given.labels.is_floating_point():
        return  # labels in the place of the prediction, which `types` reports: their shape tells nothing
    if given.wants in OVER_CLASSES and given.expects in (
        Target.CLASSES,
        Target.CLASSES_OR_PROBABILITIES,
    ):
        yield from _over_classes(given, given.first, given.labels)
    elif given.wants == Prediction.HIDDEN_STATES and given.expects == Target.CLASSES:
        yield from _hidden_states(given, given.labels)
    elif given.expects in ELEMENTS and given.wants in ELEMENTWISE:
        if given.loss.arrange is not None and isinstance(given.prediction, Tensor):
            return  # its parts lie along dimension 1, and the loss itself takes them apart
        for part in tensors(given.prediction):
            if given.loss.arrange is not None and not _torchs(given) and given.labels.shape == (*part.shape, 1):
                continue  # fallline takes scores [N] for a target [N, 1]
            found = list(_elementwise(given, part, given.labels))
            yield from found
            if found:
                return
    elif given.wants == Prediction.DISTRIBUTION and given.expects in ELEMENTS:
        yield from _distribution(given, given.first, given.labels)
    elif given.expects == Target.CLASS_SETS and given.first.shape != given.labels.shape:
        yield error(
            "shape",
            f"{_both(given, given.first, given.labels)}, and expects equal shapes: a row of class indices, filled up "
            "with −1, for each sample.",
            "A label or a one-hot row per sample is no set of classes.",
            "target = torch.nn.functional.pad(target.unsqueeze(1), (0, prediction.shape[1] - 1), value=-1)",
        )
    elif given.expects == Target.GROUPS and given.first.ndim and given.labels.shape[:1] != given.first.shape[:1]:
        yield _sizes(given, given.first, given.labels)


def _both(given: Given, prediction: Tensor, target: Tensor) -> str:
    return f"{given.name} was given a prediction of shape {shape(prediction)} and a target of shape {shape(target)}"


def _empty(given: Given) -> Iterator[Finding]:
    named = [("prediction", given.prediction), ("target", given.target)]
    for word, value in named:
        for tensor in tensors(value):
            if tensor.numel() == 0:
                summed = given.settings.get("reduction") in ("sum", "none") or given.loss.reduction in ("sum", "none")
                make = note if summed else error
                yield make(
                    "empty",
                    f"{given.name} was given a {word} of shape {shape(tensor)}, without an element.",
                    "The mean of nothing is NaN, and one such batch makes every parameter NaN.",
                    "if len(target) == 0: continue  # before the loss; or reduction='sum'",
                )
                return


def _sizes(given: Given, prediction: Tensor, target: Tensor) -> Finding:
    fix = "assert len(prediction) == len(target)  # take both from the same batch"
    if prediction.ndim > 1 and prediction.shape[1] == target.shape[0]:
        fix = "prediction = prediction.transpose(0, 1)"
    return error(
        "batch-size",
        f"{_both(given, prediction, target)}: {len(prediction)} samples against {len(target)}.",
        "Both must hold the same samples, in the same order.",
        fix,
    )


def _elementwise(given: Given, prediction: Tensor, target: Tensor) -> Iterator[Finding]:
    if prediction.shape == target.shape:
        return
    both = _both(given, prediction, target)
    if (
        given.wants in (Prediction.YES_LOGITS, Prediction.PROBABILITIES)
        and prediction.ndim == target.ndim + 1
        and prediction.ndim > 1
        and prediction.shape[1] > 1
        and list(target.shape) == [prediction.shape[0], *prediction.shape[2:]]
        and not target.is_floating_point()
    ):
        classes = prediction.shape[1]
        yield error(
            "target-coding",
            f"{both}, and expects equal shapes.",
            f"{classes} outputs and one class index for each sample are for a loss over classes; for yes or no let the "
            "model give one output.",
            f"loss = torch.nn.CrossEntropyLoss()  # fl.losses.cross_entropy(), one of {classes} classes",
        )
        return
    try:
        together = broadcast(prediction.shape, target.shape)
    except ValueError:
        yield from _incomparable(given, prediction, target)
        return
    pairs = math.prod(together)
    seen = f"{both}, and expects equal shapes."
    trailing = target.shape == prediction.shape[:-1] and prediction.shape[-1:] == (1,)
    if trailing or together != tuple(prediction.shape):
        why = (
            f"These would be broadcast to {list(together)}: {pairs} pairs of every prediction with every target, so "
            "that the predictions learn the mean of the targets."
        )
        if trailing and pairs == prediction.numel():
            why = "These would be broadcast as soon as a batch has more than one sample, to pairs of all with all."
        if prediction.numel() == 1 and given.foreign and not trailing:
            yield warning(
                "broadcast", seen, f"One prediction is compared with {pairs} targets.", _reshape(prediction, target)
            )
            return
        yield error("broadcast", seen, why, _reshape(prediction, target))
        return
    seen_alike = f"{both}; one target is broadcast to {pairs} predictions."
    why = "The same target for all is rarely meant, and a forgotten dimension looks like this."
    fix = "target = target.expand_as(prediction)"
    if not given.foreign:
        yield error("broadcast", seen, f"These would be broadcast. {why}", fix)
    elif target.ndim == 0 or given.wants == Prediction.LOG_DENSITIES:
        yield note("broadcast", seen_alike, why, fix)
    else:
        yield warning("broadcast", seen_alike, why, fix)


def _reshape(prediction: Tensor, target: Tensor) -> str:
    """The line that gives a target the prediction's shape, or the prediction the target's."""
    if target.shape == prediction.shape[:-1] and prediction.shape[-1] == 1:
        return f"target = target.unsqueeze({1 if prediction.ndim == 2 else -1})  # or prediction.squeeze(-1)"
    if prediction.shape == target.shape[:-1] and target.shape[-1] == 1:
        return "target = target.squeeze(-1)"
    for dimension in range(prediction.ndim):
        if prediction.shape[dimension] == 1 and target.shape == _without(prediction, dimension):
            return f"target = target.unsqueeze({dimension})  # or prediction.squeeze({dimension})"
    for dimension in range(target.ndim):
        if prediction.shape == _without(target, dimension) and target.shape[dimension] == 1:
            return f"target = target.squeeze({dimension})"
    if prediction.numel() == target.numel():
        return "target = target.reshape(prediction.shape)  # if the order of both is the same"
    if prediction.shape[-1:] == (1,) and target.ndim == prediction.ndim:
        return f"torch.nn.LazyLinear({target.shape[-1]})  # the last layer: as many outputs as the target has columns"
    return "assert prediction.shape == target.shape"


def _without(tensor: Tensor, dimension: int) -> torch.Size:
    return tensor.shape[:dimension] + tensor.shape[dimension + 1 :]


def _incomparable(given: Given, prediction: Tensor, target: Tensor) -> Iterator[Finding]:
    both = _both(given, prediction, target)
    if prediction.shape == target.shape[::-1] or (
        prediction.ndim == target.ndim and sorted(prediction.shape) == sorted(target.shape)
    ):
        flip = "target.T" if target.ndim == 2 else "target.transpose(1, -1)"
        yield error(
            "axis",
            f"{both}, and expects equal shapes.",
            "Both hold as many elements, but their dimensions stand in another order.",
            f"target = {flip}  # or target.reshape(prediction.shape), if the elements stand in the same order",
        )
    elif prediction.numel() == target.numel():
        yield error(
            "shape",
            f"{both}, and expects equal shapes.",
            "Both hold as many elements.",
            _reshape(prediction, target),
        )
    elif prediction.ndim and target.ndim and prediction.shape[0] != target.shape[0]:
        yield _sizes(given, prediction, target)
    else:
        outputs = target.shape[-1] if target.ndim == prediction.ndim else 1
        yield error(
            "shape",
            f"{both}, and expects equal shapes.",
            "The model's last layer should give as many outputs as the target has columns.",
            f"torch.nn.LazyLinear({outputs})  # the last layer",
        )


def _distribution(given: Given, part: Tensor, target: Tensor) -> Iterator[Finding]:
    """A mean [N, 1] against a target [N] in torch's own losses, which broadcast."""
    if not isinstance(given.prediction, tuple) or part.shape == target.shape:
        return
    if target.shape == (*part.shape, 1) and not _torchs(given):
        return  # fallline takes a mean [N] for a target [N, 1]
    yield from _elementwise(given, part, target)


def _torchs(given: Given) -> bool:
    return given.loss.call is not None and "thing" in given.loss.call.arguments


def _over_classes(given: Given, prediction: Tensor, target: Tensor) -> Iterator[Finding]:
    soft = given.expects == Target.CLASSES_OR_PROBABILITIES and target.is_floating_point()
    given_words = _both(given, prediction, target)
    if prediction.ndim == 0:
        yield error(
            "shape",
            f"{given.name} was given one number as prediction, and expects one output for each class: [N, C].",
            "Nothing can be chosen among no classes.",
            ONE_OUTPUT,
        )
        return
    if prediction.ndim == 1:
        if target.ndim == 0 or (soft and target.shape == prediction.shape and abs(float(target.sum()) - 1) < 1e-3):
            return
        yield error(
            "one-class",
            f"{given_words}, and expects one output for each class: [N, C].",
            "One output for each sample is for yes or no (binary_cross_entropy_with_logits); here the samples of the "
            "batch would be taken for classes.",
            yes_or_no(prediction, target),
        )
        return
    if prediction.shape[1] == 1:
        yield error(
            "one-class",
            f"{given_words}, and expects one output for each class: there is one class, of which the probability is "
            "always 1.",
            "The loss is 0 whatever the model does. Let it give two outputs, or use a loss for yes or no.",
            yes_or_no(prediction, target),
        )
        return
    expected = [prediction.shape[0], *prediction.shape[2:]]
    if target.shape == prediction.shape:
        if list(target.shape) != expected and not target.is_floating_point():
            yield _one_hot(given, given_words)
        elif target.is_floating_point() and not soft:
            yield error(
                "target-coding",
                f"{given_words}, in floating point, and expects class indices of shape {expected}.",
                "One-hot rows or probabilities cannot be read as indices.",
                "target = target.argmax(1)",
            )
        return
    if list(target.shape) != expected:
        yield from _misplaced(given, prediction, target, expected, soft)
    elif prediction.ndim == 3 and prediction.shape[1] == prediction.shape[2]:
        yield _either_axis(given, prediction, target, given_words)


def _either_axis(given: Given, prediction: Tensor, target: Tensor, words: str) -> Finding:
    """As many positions as classes: only values can tell which dimension is which."""
    fix = "prediction = prediction.movedim(-1, 1)  # if the model gives [N, positions, classes]"
    part, labels = thinned(prediction).float(), thinned(target, -(-(1 << 18) // prediction.shape[1])).long()
    labels = labels[: len(part)]
    classes = prediction.shape[1]
    if len(part) == len(labels) and part.is_floating_point() and bool(((labels >= 0) & (labels < classes)).all()):
        costs = [
            float(torch.nn.functional.nll_loss(logits.log_softmax(1), labels))
            for logits in (part, part.transpose(1, 2))
        ]
        chance = math.log(classes)
        if costs[1] < 0.7 * chance < costs[0] and costs[1] < 0.6 * costs[0]:
            return warning(
                "axis",
                f"{words}: the classes are read from dimension 1, with a cross-entropy of {costs[0]:.3g}, and read "
                f"from dimension 2 it is {costs[1]:.3g} (chance gives {chance:.3g}).",
                "The model has its classes in the last dimension.",
                fix,
            )
    return note(
        "axis",
        f"{words}: dimensions 1 and 2 are equally long.",
        "No shape can tell whether the classes stand in dimension 1, where they are read.",
        fix,
    )


def _one_hot(given: Given, words: str) -> Finding:
    low, high = given.target_range
    if low < 0 or high > 1:
        return error(
            "target-coding",
            f"{words}, as whole numbers from {low:g} to {high:g}.",
            "Class indices have no dimension of classes.",
            "target = target.argmax(1)",
        )
    assert given.labels is not None
    several = bool((given.labels.sum(1) > 1).any())
    fix = "target = target.argmax(1)"
    if several:
        fix = "loss = torch.nn.BCEWithLogitsLoss()  # several classes at once; target.to(prediction.dtype)"
    return error(
        "target-coding",
        f"{words}, which looks like {'rows with several ones' if several else 'one-hot rows'}.",
        "Class indices, or probabilities in floating point, target.to(prediction.dtype), are expected.",
        fix,
    )


def _misplaced(given: Given, prediction: Tensor, target: Tensor, expected: list[int], soft: bool) -> Iterator[Finding]:
    words = f"{_both(given, prediction, target)}, and expects class indices of shape {expected}"
    long = "" if not target.is_floating_point() else ".long()"
    inner = prediction.shape[:-1]
    if prediction.ndim > 2 and target.shape == inner:
        yield error(
            "axis", f"{words}.", "The classes belong into dimension 1.", "prediction = prediction.movedim(-1, 1)"
        )
    elif prediction.ndim == 3 and target.shape == (inner[1], inner[0]):
        yield error(
            "axis",
            f"{words}.",
            "The prediction holds positions, samples and classes in this order.",
            "prediction = prediction.permute(1, 2, 0)",
        )
    elif soft and target.ndim == prediction.ndim and sorted(target.shape) == sorted(prediction.shape):
        yield error(
            "axis",
            f"{words}, or probabilities of the prediction's shape.",
            "The classes belong into dimension 1 of both.",
            "target = target.movedim(-1, 1)" if target.shape[-1] == prediction.shape[1] else "target = target.T",
        )
    elif list(target.shape) == [*expected, 1]:
        yield error(
            "shape", f"{words}.", "Take the last dimension of the target away.", f"target = target.squeeze(-1){long}"
        )
    elif list(target.shape) == [expected[0], 1, *expected[1:]]:
        yield error("shape", f"{words}.", "Take dimension 1 of the target away.", f"target = target.squeeze(1){long}")
    elif prediction.ndim == 2 and target.ndim == 1 and prediction.shape[1] == len(target) > prediction.shape[0]:
        yield error(
            "axis", f"{words}.", "Samples belong into dimension 0, classes into 1.", "prediction = prediction.T"
        )
    elif target.ndim > 1 and target.numel() == prediction.shape[0] and prediction.ndim == 2:
        yield error("shape", f"{words}.", "Both hold as many samples.", "target = target.flatten()")
    elif prediction.ndim == 3 and target.ndim == 1 and target.numel() == inner.numel():
        yield error("shape", f"{words}.", "Both hold as many samples.", "prediction = prediction.flatten(0, 1)")
    elif target.ndim and target.shape[0] != prediction.shape[0]:
        yield _sizes(given, prediction, target)
    else:
        yield error(
            "shape",
            f"{words}.",
            "Let the model give one output for each class, and the target one label for each sample.",
            "prediction = prediction.flatten(2).mean(2)" if prediction.ndim > 2 else "target = target[:, 0]",
        )


def _hidden_states(given: Given, target: Tensor) -> Iterator[Finding]:
    if given.classes is None or list(target.shape) == given.classes[1]:
        return
    assert given.first is not None
    yield error(
        "shape",
        f"{given.name} was given hidden states of shape {shape(given.first)} and a target of shape {shape(target)}, "
        f"and expects class indices of shape {given.classes[1]}.",
        "Each hidden state has one label.",
        "target = target.reshape(hidden.shape[:-1])",
    )
