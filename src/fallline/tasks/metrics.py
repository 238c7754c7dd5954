"""The common yardstick: what trials are compared by on validation data, whatever loss they were trained
with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fallline.errors import UnknownName, nearest
from fallline.losses import Loss
from fallline.losses.arguments import like
from fallline.losses.base import Prediction, Target

IGNORED = -100
"""The label that torch's losses leave out by default."""


@dataclass(frozen=True)
class Metric:
    """A number for a whole prediction and its target, with the direction that is better.

    Attributes:
        name: what tables and charts call it.
        function: (prediction, target) -> 0-dimensional tensor, pure, fit for vmap.
        higher_is_better: True for an accuracy, False for an error.

    >>> accuracy()(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    higher_is_better: bool

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The metric of all the given samples together."""
        return self.function(prediction, target)


def _real(prediction: Tensor) -> torch.dtype:
    return prediction.dtype if prediction.is_floating_point() else torch.get_default_dtype()


def _accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        target = target.argmax(1)
    kept = target != IGNORED
    right = ((prediction.argmax(1) == target) & kept).sum()
    return right.to(_real(prediction)) / kept.sum().clamp(min=1)


def _binary_accuracy(prediction: Tensor, target: Tensor, *, threshold: float) -> Tensor:
    return ((prediction > threshold) == (target > 0.5)).to(_real(prediction)).mean()


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean()


def _mae(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().mean()


def accuracy() -> Metric:
    """The fraction of right labels, from 0 to 1: argmax over dimension 1 against class indices or
    probabilities.

    Prediction [N, C, …], target [N, …] or [N, C, …]. Targets equal to −100 are left out; where all are, it is
    0.
    """
    return Metric("accuracy", _accuracy, higher_is_better=True)


def binary_accuracy(threshold: float = 0.0) -> Metric:
    """The fraction of right decisions, from 0 to 1: prediction > threshold against target > 0.5, equal
    shapes.

    The threshold is 0 for logits and 0.5 for probabilities.
    """
    return Metric("binary accuracy", partial(_binary_accuracy, threshold=threshold), higher_is_better=True)


def mse() -> Metric:
    """The mean squared error over all elements, in the square of the target's unit."""
    return Metric("mse", _mse, higher_is_better=False)


def mae() -> Metric:
    """The mean absolute error over all elements, in the target's unit."""
    return Metric("mae", _mae, higher_is_better=False)


def validation_loss(loss: Loss) -> Metric:
    """The loss itself on the validation data. It compares only trials of that one loss."""
    return Metric("validation loss", loss, higher_is_better=False)


registry: Mapping[str, Callable[[], Metric]] = {
    "accuracy": accuracy,
    "binary_accuracy": binary_accuracy,
    "mse": mse,
    "mae": mae,
}
"""The metrics that need no argument, by name."""

# Losses of regression whose best single guess is the mean, by the name of ours; the others' is nearer to the median.
_OF_MEANS = ("mse", "poisson_nll", "gaussian_nll", "beta_nll", "evidential", "negative_binomial_nll", "tweedie")


def for_loss(loss: Loss, target: Tensor | None = None) -> Metric:
    """The metric of a task that names none: accuracy for classes, mean squared error for the losses whose best guess is
    the mean, mean absolute error for the other losses of numbers, and the validation loss where the loss is not known.

    Args:
        target: of the training data, which decides for the losses that take classes as well as yes or no.

    >>> from fallline import losses
    >>> for_loss(losses.cross_entropy()).name, for_loss(losses.huber()).name
    ('accuracy', 'mae')
    """
    either = loss.target is Target.CLASSES_OR_YES_NO
    yes_or_no = either and target is not None and target.is_floating_point()
    if yes_or_no or (loss.kind == "binary" and not (either and target is not None)):
        return binary_accuracy(0.5 if loss.prediction is Prediction.PROBABILITIES else 0.0)
    if loss.kind in ("classification", "binary"):
        return accuracy()
    if loss.kind == "regression":
        made = mse() if (loss.kin or loss.name) in _OF_MEANS else mae()
        return made if loss.estimate is None else replace(made, function=partial(_of_estimate, made, loss.estimate))
    return validation_loss(loss)


def _of_estimate(metric: Metric, estimate: Callable[[Any], Tensor], prediction: Any, target: Tensor) -> Tensor:
    return metric.function(like(estimate(prediction), target), target)


def as_metric(thing: object) -> Metric:
    """A `Metric` from a `Metric`, a name, or a callable(prediction, target), of which lower values are
    better.

    Raises:
        UnknownName: for a name that does not exist, or a thing that cannot be called.

    >>> as_metric("mae").name
    'mae'
    """
    if isinstance(thing, Metric):
        return thing
    if isinstance(thing, str):
        if thing not in registry:
            raise UnknownName(f"There is no metric {thing!r}. {nearest(thing, registry)}")
        return registry[thing]()
    for name, constructor in [*registry.items(), ("validation_loss", validation_loss)]:
        if thing is constructor:
            raise UnknownName(f"The metric was given as the function {name}, and is expected made: call it.")
    if callable(thing):
        name = getattr(thing, "__name__", type(thing).__name__)
        return Metric("metric" if name == "<lambda>" else name, thing, higher_is_better=False)
    raise UnknownName(
        f"A metric was given as {thing!r} of type {type(thing).__name__}. Give a name such as 'accuracy', a "
        "fallline.metrics.Metric, or a callable(prediction, target) of which lower values are better."
    )
