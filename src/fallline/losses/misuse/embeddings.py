"""Embeddings and outputs that tell nothing apart: all equal, of length 0, or one tensor given twice.

Neighbours: `predictions` for single numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from fallline.losses.base import Prediction, Target
from fallline.losses.misuse.finding import Finding, warning
from fallline.losses.misuse.given import OVER_CLASSES, Given, shape, tensors, thinned

_LIVE = "embeddings = model(x)  # check what comes before: a constant input, a dead layer, a detached branch"


def embedding_findings(given: Given) -> Iterator[Finding]:
    """What is wrong with vectors."""
    if given.expects == Target.NOTHING:
        yield from _labels_for_nothing(given)
    if given.wants == Prediction.EMBEDDINGS:
        parts = [part for part in tensors(given.prediction) if part.is_floating_point()]
        for part in parts:
            yield from _one(given, part)
        yield from _twice(given, parts)
    elif given.wants == Prediction.REAL and isinstance(given.prediction, tuple) and given.expects == Target.SIGNS:
        yield from _twice(given, [part for part in tensors(given.prediction) if part.is_floating_point()])
    elif given.wants in OVER_CLASSES and given.first is not None and given.expects != Target.SEQUENCES:
        yield from _same_outputs(given, given.first)


def _one(given: Given, part: Tensor) -> Iterator[Finding]:
    if part.ndim < 2 or part.numel() == 0:
        return
    rows = thinned(part).reshape(-1, part.shape[-1])
    if bool((rows == 0).all()):
        yield warning(
            "collapsed",
            f"{given.name} was given embeddings of shape {shape(part)} that are all 0.",
            "They have no direction and no distance from each other.",
            _LIVE,
        )
    elif len(rows) >= 4 and bool(((rows - rows[:1]).abs() <= 1e-6 * rows.abs().amax()).all()):
        yield warning(
            "collapsed",
            f"{given.name} was given {len(rows)} embeddings that are all the same vector.",
            "Nothing tells the samples apart: they have collapsed.",
            _LIVE,
        )
    elif rows.shape[1] > 1 and (zero := int((rows == 0).all(1).sum())):
        yield warning(
            "collapsed",
            f"{given.name} was given {zero} of {len(rows)} embeddings of length 0.",
            "A zero vector has no direction: cosines with it mean nothing, and their gradient is 0 or NaN.",
            "torch.nn.functional.normalize(embeddings + noise, dim=-1)  # or leave such samples out",
        )


def _twice(given: Given, parts: list[Tensor]) -> Iterator[Finding]:
    names = ["first", "second", "third", "fourth"]
    if len(parts) == 3:
        names = ["anchor", "positive", "negative"]
    for (i, one), (j, other) in combinations(enumerate(parts[:4]), 2):
        if one.shape == other.shape and one.numel() > 1 and torch.equal(one, other) and not bool((one == 0).all()):
            yield warning(
                "collapsed",
                f"{given.name} was given the same numbers as {names[i]} and as {names[j]}, shape {shape(one)}.",
                "A pair of equal tensors has no distance: there is nothing to learn from it.",
                f"{names[j]} = model(augment(x))  # not {names[i]} once more",
            )


def _labels_for_nothing(given: Given) -> Iterator[Finding]:
    """Labels beside one output for each class: of a loss without a target, they are left out of it."""
    if given.pair is None:
        return
    prediction, labels = given.pair
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1 or prediction.ndim != 2:
        return
    count, classes = prediction.shape
    if len(labels) != count or count < 4 or not 0 <= given.target_range[0] <= given.target_range[1] < classes:
        return
    distinct = len(labels.unique())
    if 2 <= distinct < count and classes <= 1.25 * (given.target_range[1] + 1):  # outputs as many as classes
        yield warning(
            "ignored-target",
            f"{given.name} was given a prediction of shape {shape(prediction)} and {count} labels of {distinct} "
            "classes, and takes no target.",
            "The labels are left out of it: nothing of them is learnt.",
            "loss = torch.nn.CrossEntropyLoss()  # or fl.losses.supervised_contrastive(), for embeddings with labels",
        )


def _same_outputs(given: Given, prediction: Tensor) -> Iterator[Finding]:
    """One output repeated for every class: no class can be more likely than another."""
    if prediction.ndim < 2 or len(prediction) < 8 or prediction.shape[1] < 2 or not prediction.is_floating_point():
        return
    part = thinned(prediction)
    first = part.narrow(1, 0, 1)
    if bool((part == first).all()) and not bool((first == first.flatten()[0]).all()):
        yield warning(
            "collapsed",
            f"{given.name} was given {prediction.shape[1]} outputs that are the same number in each of "
            f"{len(prediction)} samples.",
            "A softmax of equal logits is uniform whatever they are: one output was repeated, or broadcast.",
            f"torch.nn.LazyLinear({prediction.shape[1]})  # the last layer: an output of its own for each class",
        )
