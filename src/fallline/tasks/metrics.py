"""The common yardstick: what trials are compared by on validation data, whatever loss they were trained
with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fallline.errors import UnknownName, nearest
from fallline.losses import Loss

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

_ABSOLUTE = ("l1", "huber", "L1Loss", "SmoothL1Loss", "HuberLoss", "l1_loss", "smooth_l1_loss", "huber_loss")
_OF_PROBABILITIES = ("BCELoss", "binary_cross_entropy")


def for_loss(loss: Loss) -> Metric:
    """The metric of a task that names none: accuracy for classes, mean absolute error for the losses that
    grow with the distance, mean squared error for mse, and the validation loss where the loss is not known.

    >>> from fallline import losses
    >>> for_loss(losses.cross_entropy()).name, for_loss(losses.huber()).name
    ('accuracy', 'mae')
    """
    if loss.kind == "classification":
        return accuracy()
    if loss.kind == "binary":
        return binary_accuracy(0.5 if loss.name in _OF_PROBABILITIES else 0.0)
    if loss.kind == "regression":
        return mae() if loss.name in _ABSOLUTE else mse()
    return validation_loss(loss)


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
