"""What a loss is: values per sample, how they are reduced to one number, and a check of what it is given.

The losses themselves are in `regression` and `classification`, the checks in `checks`; `wrapped` makes a
`Loss` of torch's own loss modules and functions and of any callable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fallline.errors import InvalidHyperparameter

Reduction: TypeAlias = Literal["mean", "sum"]
Kind: TypeAlias = Literal["classification", "binary", "regression", "other"]
Terms: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
Check: TypeAlias = Callable[[Tensor, Tensor], None]


def accept_anything(prediction: Tensor, target: Tensor) -> None:
    """The check of a loss about which nothing is known."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss: a pure function of a prediction and a target, with a per-sample form and a reduction.

    With the values v and the weights w of `terms`, the loss is

        mean:  Σ v / Σ w   (w = 1 for each value where `terms` gives None; 0 where Σ w = 0)
        sum:   Σ v

    Attributes:
        name: what users call it, such as "cross_entropy".
        kind: "classification" (class indices or class probabilities), "binary" (each target in [0, 1]),
            "regression" or "other". It chooses the default metric of a task.
        terms: (prediction, target) -> (values, weights). Values keep the sample as their first dimension and
            are what torch's `reduction="none"` gives; weights are what the mean divides by.
        arguments: the arguments by name without `reduction`, tensors of weights as lists.
        reduction: "mean" or "sum".
        validate: raises `LossMismatch` for a prediction and a target that do not fit.
        source: makes the plain PyTorch expression that is equal.
        whole: a callable that is used exactly as it is instead of the reduced terms.

    >>> from fallline import losses
    >>> loss = losses.mse()
    >>> loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    >>> loss.per_sample(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor([0., 4.])
    >>> loss.code()
    'torch.nn.MSELoss()'
    """

    name: str
    kind: Kind
    terms: Terms = field(repr=False)
    arguments: Mapping[str, object] = field(default_factory=dict)
    reduction: Reduction = "mean"
    validate: Check = field(default=accept_anything, repr=False)
    source: Callable[[], str] = field(default=str, repr=False)
    whole: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, a 0-dimensional tensor. Works under vmap, grad and compile."""
        if self.whole is not None:
            return self.whole(prediction, target)
        values, weights = self.terms(prediction, target)
        if self.reduction == "sum":
            return values.sum()
        if weights is None:
            return values.mean()
        total = weights.sum()
        return values.sum() / (total + (total == 0))  # nothing to average (every label ignored) is 0, not NaN

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """One value per sample, shape [N]; for class indices with further dimensions, the target's shape.

        Values of several elements are combined as the loss combines them: their mean, or their sum.

        Raises:
            LossMismatch: for a wrapped callable, of which only the reduced value is known.
        """
        values, _ = self.terms(prediction, target)
        if values.ndim <= 1 or self.kind == "classification":
            return values
        values = values.flatten(1)
        return values.sum(1) if self.reduction == "sum" else values.mean(1)

    def check(self, prediction: Tensor, target: Tensor) -> None:
        """Look at shapes, types and label ranges before the first step is taken.

        Raises:
            LossMismatch: with what was given, what this loss expects, and how to mend it.
        """
        self.validate(prediction, target)

    def code(self) -> str:
        """The plain PyTorch expression that makes the same loss."""
        return self.source()


def checked_reduction(reduction: str) -> Reduction:
    """`reduction` if it is one.

    Raises:
        InvalidHyperparameter: if it is neither "mean" nor "sum".
    """
    if reduction == "mean":
        return "mean"
    if reduction == "sum":
        return "sum"
    raise InvalidHyperparameter(
        f"reduction={reduction!r} makes no single number to minimise: give 'mean' or 'sum'. "
        "One value per sample is loss.per_sample(prediction, target)."
    )


def spelled(constructor: str, arguments: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """A constructor call with only those arguments that differ from their defaults.

    Weights are spelt as tensors, and 0-dimensional tensors of other hyperparameters as numbers.

    >>> spelled("torch.nn.HuberLoss", {"delta": 2.0, "reduction": "mean"}, {"reduction": "mean"})
    'torch.nn.HuberLoss(delta=2.0)'
    """
    shown = []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not name.endswith("weight"):
            shown.append(f"{name}={value.item()!r}")
        elif isinstance(value, Tensor):
            dtype = "" if value.dtype == torch.get_default_dtype() else f", dtype={value.dtype}"
            shown.append(f"{name}=torch.tensor({value.tolist()}{dtype})")
        elif name not in defaults or value != defaults[name]:
            shown.append(f"{name}={value!r}")
    return f"{constructor}({', '.join(shown)})"
