"""What a check looks at: the loss, its settings, the tensors that it is given, and their figures.

Neighbours: `check` makes a `Given` and runs the rules over it; `sums` looks for probabilities in a tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from fallline.losses.base import Loss, Parts, Prediction, Target
from fallline.losses.wrapped import understood

# Predictions with one value for each element of the target.
ELEMENTWISE = frozenset(
    {
        Prediction.YES_LOGITS,
        Prediction.PROBABILITIES,
        Prediction.SCORES,
        Prediction.REAL,
        Prediction.POSITIVE,
        Prediction.LOG_RATES,
        Prediction.LOG_DENSITIES,
        Prediction.DISTANCES,
    }
)
# Targets with one value for each element of such a prediction.
ELEMENTS = frozenset(
    {
        Target.FRACTIONS,
        Target.YES_NO,
        Target.SIGNS,
        Target.REAL,
        Target.POSITIVE,
        Target.NOT_NEGATIVE,
        Target.COUNTS,
        Target.PROBABILITIES,
        Target.LOG_PROBABILITIES,
    }
)
# Predictions with one value for each class in dimension 1.
OVER_CLASSES = frozenset({Prediction.LOGITS, Prediction.LOG_PROBABILITIES, Prediction.CLASS_SCORES})


@dataclass(frozen=True, eq=False)
class Given:
    """A loss and what it is given.

    Attributes:
        loss: as `wrapped.understood` makes it.
        prediction, target: as given, tensors without their graph.
        model: whose gradients are looked at, or None.
        graph: the prediction with its graph.
        target_graph: the tensors of the target with theirs.
        settings: the arguments that the loss was made with, as far as they are known: weight, ignore_index, …
        inside: what a callable does to its prediction before the loss that it was recognised as, and which that does
            itself: "softmax", "softmax over the batch", "sigmoid", or "probabilities" for a missing logarithm.
    """

    loss: Loss
    prediction: Parts
    target: Parts
    model: nn.Module | None
    graph: Parts
    target_graph: tuple[Tensor, ...]
    settings: Mapping[str, Any]
    inside: str = ""

    @property
    def name(self) -> str:
        """What users call the loss."""
        return self.loss.name

    @property
    def wants(self) -> Prediction:
        """What the prediction should be."""
        return self.loss.prediction

    @property
    def expects(self) -> Target:
        """What the target should be."""
        return self.loss.target

    @property
    def foreign(self) -> bool:
        """Whether it is called as it is, not through fallline's terms, which refuse to broadcast."""
        return self.loss.whole is not None

    @property
    def known(self) -> bool:
        """Whether it is known what the loss wants to be given."""
        return self.wants != Prediction.ANYTHING or self.expects != Target.ANYTHING

    @cached_property
    def first(self) -> Tensor | None:
        """The prediction, or its first part."""
        return next(tensors(self.prediction), None)

    @cached_property
    def labels(self) -> Tensor | None:
        """The target, or its first part."""
        return next(tensors(self.target), None)

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Prediction and target, where each is one tensor."""
        if isinstance(self.prediction, Tensor) and isinstance(self.target, Tensor):
            return self.prediction, self.target
        return None

    @cached_property
    def prediction_range(self) -> tuple[float, float]:
        """The least and the largest value of the prediction's first part; NaN where there is NaN."""
        return (0.0, 0.0) if self.first is None else extremes(self.first)

    @cached_property
    def target_range(self) -> tuple[float, float]:
        """The least and the largest value of the target's first part."""
        return (0.0, 0.0) if self.labels is None else extremes(self.labels)

    @cached_property
    def classes(self) -> tuple[int, list[int]] | None:
        """How many classes a target of indices may name, and the shape that it should have; None for other losses."""
        prediction = self.first
        if prediction is None or self.expects == Target.SEQUENCES:
            return None
        if self.wants == Prediction.HIDDEN_STATES:
            parts = list(tensors(self.prediction))
            return (parts[1].shape[0], list(parts[0].shape[:-1])) if len(parts) >= 2 and parts[1].ndim == 2 else None
        if self.wants not in OVER_CLASSES or prediction.ndim == 0:
            return None
        if prediction.ndim == 1:
            return prediction.shape[0], []
        return prediction.shape[1], [prediction.shape[0], *prediction.shape[2:]]

    @cached_property
    def class_axis(self) -> int:
        """The dimension of the prediction that holds the classes."""
        if self.first is None or self.expects == Target.SEQUENCES:
            return -1
        return min(1, self.first.ndim - 1)

    @cached_property
    def indices(self) -> Tensor | None:
        """The target, where it is one of class indices of the right shape and a whole-number type."""
        if self.classes is None or self.labels is None or self.labels.is_floating_point():
            return None
        return self.labels if list(self.labels.shape) == self.classes[1] else None

    @property
    def ignore_index(self) -> int | None:
        """The label that counts for nothing."""
        value = self.settings.get("ignore_index")
        return value if isinstance(value, int) else None


def given(loss: object, prediction: Any, target: Any, model: nn.Module | None) -> Given:
    """Gathers what the rules look at; numpy arrays become tensors, graphs are left behind."""
    made = _as_its_base(understood(loss), loss)
    dimensions = {id(dimension): dimension.examples[0] for dimension in made.dimensions.values()}
    if dimensions:
        made = made.chosen(dimensions)
    settings = _settings(made)
    if made.whole is not None and settings.get("reduction") in ("mean", "sum", "none", "batchmean"):
        made = replace(made, reduction=settings["reduction"])  # torch's default, which for kl_div is not fallline's
    graph, goal = _tensor(prediction), _tensor(target)
    if made.whole is not None and made.arrange is not None:
        graph, goal = _arranged(made, graph, goal)
        made = replace(made, whole=None)  # called in torch's order, which a prediction and a target are not
    return Given(made, _bare(graph), _bare(goal), model, graph, tuple(tensors(goal)), settings)


def _as_its_base(made: Loss, thing: object) -> Loss:
    """A subclass of one of torch's losses that computes what its base does is described as the base is."""
    if not isinstance(thing, nn.Module) or made.prediction != Prediction.ANYTHING:
        return made
    for base in type(thing).__mro__[1:]:
        if base.__module__.startswith("torch.nn.modules") and vars(base).get("forward") is type(thing).forward:
            twin: nn.Module = object.__new__(base)
            twin.__dict__.update(thing.__dict__)
            return replace(understood(twin), name=made.name, whole=made.whole, call=made.call)
    return made


def _arranged(loss: Loss, prediction: Parts, target: Parts) -> tuple[Parts, Parts]:
    """What torch's own losses of more than two tensors are given, as fallline's loss takes it.

    The parts of prediction and target are tried in the two orders that torch has, (input, target, variance) or (first,
    second, target) and the like; the right one is that of which `arrange` makes these parts again.
    """
    if loss.arrange is None or not isinstance(prediction, tuple):
        return prediction, target
    goals = target if isinstance(target, tuple) else () if target is None else (target,)
    others = [part for pair in zip_longest(prediction, goals) for part in pair if part is not None]
    for order in ([*prediction, *goals], others):
        try:
            parts, goal = loss.arrange(*order)
        except (TypeError, ValueError, RuntimeError, IndexError):
            continue
        if len(parts) == len(prediction) and all(map(_same, parts[1:], prediction[1:])):
            return parts, goal
    return prediction, target


def _same(one: Any, other: Any) -> bool:
    """Whether `arrange` has left a part where it was; a number may have become a tensor."""
    if isinstance(other, Tensor):
        return one is other
    return isinstance(one, Tensor) and one.numel() == 1 and float(one) == other


def _settings(loss: Loss) -> Mapping[str, Any]:
    """The arguments of the loss that are known; those of a torch module are its attributes."""
    thing = loss.call.arguments.get("thing") if loss.call is not None else None
    if isinstance(thing, nn.Module):
        names = [name for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)]
        return {name: getattr(thing, name) for name in names}
    if isinstance(thing, partial):
        return {**defaults(thing.func), **thing.keywords}
    if thing is not None:
        return defaults(thing)
    settings: dict[str, Any] = dict(loss.call.arguments) if loss.call is not None else {}
    parts = settings.get("losses")
    if isinstance(parts, tuple):  # a weighted sum: what its parts were made with
        for part in reversed(parts):
            settings = {**settings, **_settings(understood(part))}
    return settings


def defaults(function: Any) -> dict[str, Any]:
    """The default arguments of a function, {} where they cannot be known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _tensor(value: Any) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, tuple):
        return tuple(map(_tensor, value))
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        try:
            return torch.as_tensor(value)
        except TypeError:
            return value
    return value


def _bare(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_bare, value))
    if not isinstance(value, Tensor):
        return value
    bare = value.detach()
    if bare.is_sparse or bare.layout is not torch.strided:
        bare = bare.to_dense()
    return bare


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a prediction or a target, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest value; (0, 0) of an empty tensor, NaN where there is NaN."""
    if tensor.numel() == 0 or tensor.is_complex():
        return 0.0, 0.0
    plain = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    if not plain.is_contiguous():  # in the order of memory, which is several times as fast
        plain = plain.permute(sorted(range(plain.ndim), key=plain.stride, reverse=True))
    low, high = plain.aminmax()
    return float(low), float(high)


def shape(tensor: Tensor) -> str:
    """A shape for a message."""
    return str(list(tensor.shape))


def kind(tensor: Tensor) -> str:
    """A number type for a message."""
    return str(tensor.dtype).removeprefix("torch.")


def thinned(tensor: Tensor, most: int = 1 << 20) -> Tensor:
    """Evenly spaced samples of a large tensor, at most about so many elements; a small one as it is.

    >>> thinned(torch.zeros(1000, 2), most=100).shape
    torch.Size([50, 2])
    """
    if tensor.ndim == 0 or tensor.numel() <= most:
        return tensor
    return tensor[:: min(len(tensor), -(-tensor.numel() // most))]
