"""Losses for yes or no by margins: what counts is how far on its right side a score lies.

Neighbours: `binary` for cross-entropies of yes or no, `classification` for the margin between classes
(`multi_margin`), `embeddings` for margins between distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number, reduced, same_shape
from fallline.losses.base import Loss, Number, Numbers, Prediction, Target, loss_maker
from fallline.losses.binary import finite, of_logits, per_element
from fallline.losses.info import Invalid, LossInfo


def _shortfall(name: str, prediction: Tensor, target: Tensor, numbers: Numbers) -> Tensor:
    same_shape(name, prediction, target)
    return functional.relu(numbers["margin"] - target.to(prediction.dtype) * prediction)


def _hinge(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    return _shortfall("hinge", prediction, target, numbers), None


def _squared_hinge(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    return _shortfall("squared_hinge", prediction, target, numbers).square(), None


def _soft_margin(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("soft_margin", prediction, target)
    return -functional.logsigmoid(target.to(prediction.dtype) * prediction), None


def _multilabel_margin(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("multilabel_margin", prediction, target)
    if target.is_floating_point():
        raise LossMismatch(
            f"multilabel_margin was given a target of type {target.dtype}, and expects class indices of type int64, −1 "
            "after the last. For 0 or 1 for each class use multilabel_soft_margin."
        )
    listed = (target >= 0).cumprod(-1)  # up to the first −1
    index = target * listed
    classes = prediction.shape[-1]
    named = (index.unsqueeze(-1) == torch.arange(classes, device=target.device)) & (listed.unsqueeze(-1) == 1)
    other = ~named.any(-2)
    scores = prediction.gather(-1, index)
    shortfall = functional.relu(1 - (scores.unsqueeze(-1) - prediction.unsqueeze(-2)))
    counted = listed.unsqueeze(-1) * other.unsqueeze(-2)
    return (shortfall * counted).sum((-2, -1)) / classes, None


def _multilabel_soft_margin(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, weight: Any
) -> tuple[Tensor, None]:
    name = "multilabel_soft_margin"
    same_shape(name, prediction, target)
    values = of_logits(prediction, target)
    if weight is not None:
        values = values * per_element(name, "weight", weight, prediction)
    return values.mean(-1), None


@loss_maker
def hinge(*, margin: Number = 1.0, reduction: str = "mean") -> Loss:
    """The hinge loss of support vector machines: max(0, m − t·s) for a score s and a sign t.

    Prediction: scores [N, …], any real numbers. Target: −1 or 1, of the same shape; nothing is broadcast. With 0
    instead of −1 the negatives would have no gradient: `fl.losses.check` sees that. Its slope at the corner is 0.

    Args:
        margin: m > 0, how far on its right side a score should lie.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `margin` is not a number above 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: C. Cortes and V. Vapnik, "Support-vector networks", Machine Learning 20 (1995).

    >>> hinge()(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1.0, 1.0, 1.0]))
    tensor(0.8333)
    """
    return Loss(
        name="hinge",
        kind="binary",
        terms=_hinge,
        prediction=Prediction.SCORES,
        target=Target.SIGNS,
        shapes=("[N, …]", "[N, …]"),
        formula="max(0, m − t·s)",
        reference="Cortes & Vapnik 1995",
        numbers={"margin": number("hinge", "margin", margin, above=0)},
        reduction=reduced("hinge", reduction),
    )


@loss_maker
def squared_hinge(*, margin: Number = 1.0, reduction: str = "mean") -> Loss:
    """The squared hinge loss, max(0, m − t·s)² for a score s and a sign t: smooth at its corner, harsher on outliers.

    Prediction: scores [N, …], any real numbers. Target: −1 or 1, of the same shape; nothing is broadcast.

    Args:
        margin: m > 0, how far on its right side a score should lie.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `margin` is not a number above 0, or `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: C. Cortes and V. Vapnik, "Support-vector networks", Machine Learning 20 (1995), with σ = 2.

    >>> squared_hinge()(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1.0, 1.0, 1.0]))
    tensor(1.4167)
    """
    return Loss(
        name="squared_hinge",
        kind="binary",
        terms=_squared_hinge,
        prediction=Prediction.SCORES,
        target=Target.SIGNS,
        shapes=("[N, …]", "[N, …]"),
        formula="max(0, m − t·s)²",
        reference="Cortes & Vapnik 1995",
        numbers={"margin": number("squared_hinge", "margin", margin, above=0)},
        reduction=reduced("squared_hinge", reduction),
    )


@loss_maker
def soft_margin(*, reduction: str = "mean") -> Loss:
    """The logistic loss of a score s and a sign t: log(1 + exp(−t·s)), the cross-entropy of σ(s) in other coding.

    Prediction: scores [N, …], any real numbers. Target: −1 or 1, of the same shape; nothing is broadcast. Equal to
    `torch.nn.SoftMarginLoss`, except where that overflows: below t·s = −89 in float32 (−710 in float64) its value is
    infinite and its gradient NaN. Here they are −t·s and −t.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: if `reduction` is unknown.
        LossMismatch: when called with shapes that differ.

    Source: J. Friedman, T. Hastie and R. Tibshirani, "Additive logistic regression", Ann. Statist. 28 (2000).

    >>> soft_margin()(torch.tensor([0.0, -1000.0]), torch.tensor([1.0, 1.0]))
    tensor(500.3466)
    """
    return Loss(
        name="soft_margin",
        kind="binary",
        terms=_soft_margin,
        prediction=Prediction.SCORES,
        target=Target.SIGNS,
        shapes=("[N, …]", "[N, …]"),
        formula="log(1 + exp(−t·s))",
        reference="Friedman, Hastie & Tibshirani 2000",
        reduction=reduced("soft_margin", reduction),
        torch_name="SoftMarginLoss",
    )


@loss_maker
def multilabel_margin(*, reduction: str = "mean") -> Loss:
    """The margin by which a sample's classes lead all others: (1/C) Σ_j Σ_i max(0, 1 − (s_j − s_i)).

    j runs over the classes that the target lists, i over those that it does not. Prediction: scores [N, C] or [C].
    Target: class indices of type int64 and of the same shape: the sample's classes, then −1 to fill up; what follows
    the first −1 is not read. Equal to `torch.nn.MultiLabelMarginLoss`, which has no second derivative and is slow under
    vmap. Takes memory for N·C² numbers.

    Args:
        reduction: "mean" over the samples, "sum" or "none".

    Raises:
        InvalidHyperparameter: if `reduction` is unknown.
        LossMismatch: when called with shapes that differ, or with a target that is not of whole numbers.

    Source: K. Crammer and Y. Singer, "A family of additive online algorithms for category ranking", J. Mach. Learn.
    Res. 3 (2003).

    >>> multilabel_margin()(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([[3, 0, -1, 1]]))
    tensor(0.8500)
    """
    return Loss(
        name="multilabel_margin",
        kind="other",
        terms=_multilabel_margin,
        prediction=Prediction.CLASS_SCORES,
        target=Target.CLASS_SETS,
        shapes=("[N, C]", "[N, C]"),
        formula="(1/C) Σ_j∈y Σ_i∉y max(0, 1 − (s_j − s_i))",
        reference="Crammer & Singer 2003",
        reduction=reduced("multilabel_margin", reduction),
        torch_name="MultiLabelMarginLoss",
    )


@loss_maker
def multilabel_soft_margin(*, weight: Tensor | Sequence[float] | None = None, reduction: str = "mean") -> Loss:
    """The cross-entropy of yes or no for each class: (1/C) Σ_c w_c·(−y_c·log σ(z_c) − (1 − y_c)·log(1 − σ(z_c))).

    Prediction: logits [N, …, C], without a sigmoid. Target: 0 or 1 for each class, of the same shape. A value belongs
    to a sample, [N, …]. Equal to `torch.nn.MultiLabelSoftMarginLoss`, and to `binary_cross_entropy_with_logits` but for
    the reduction "sum", which adds up the classes' means.

    Args:
        weight: one factor w_c for each class, shape [C].
        reduction: "mean" over the samples, "sum" or "none".

    Raises:
        InvalidHyperparameter: for factors that are no finite numbers ≥ 0, or an unknown `reduction`.
        LossMismatch: when called with shapes that differ, or with factors for another number of classes.

    Source: D. R. Cox, "The regression analysis of binary sequences", J. R. Statist. Soc. B 20 (1958).

    >>> multilabel_soft_margin()(torch.tensor([[0.0, 200.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(0.3466)
    """
    name = "multilabel_soft_margin"
    if weight is not None and not isinstance(weight, (tuple, Tensor)):
        raise InvalidHyperparameter(f"{name} was given weight={weight!r}, and expects one number for each class.")
    return Loss(
        name=name,
        kind="binary",
        terms=partial(_multilabel_soft_margin, weight=finite(name, "weight", weight)),
        prediction=Prediction.YES_LOGITS,
        target=Target.YES_NO,
        shapes=("[N, …, C]", "[N, …, C]"),
        formula="(1/C) Σ_c −y_c·log σ(z_c) − (1 − y_c)·log(1 − σ(z_c))",
        reference="Cox 1958",
        reduction=reduced(name, reduction),
        torch_name="MultiLabelSoftMarginLoss",
    )


def _signed(generator: Generator) -> tuple[Tensor, Tensor]:
    scores = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    return scores, (torch.rand(12, 2, generator=generator, dtype=torch.float64) < 0.5).double() * 2 - 1


def _sets(generator: Generator) -> tuple[Tensor, Tensor]:
    """One to three of five classes for each sample, in any order, −1 after the last."""
    scores = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    order = torch.rand(12, 5, generator=generator).argsort(-1)
    count = torch.arange(12).unsqueeze(-1) % 3 + 1
    return scores, torch.where(torch.arange(5) < count, order, -1)


def _several_labels(generator: Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(12, 4, generator=generator, dtype=torch.float64) < 0.5).double()


_MARGINS = (
    Invalid({"margin": 0}, "margin=0"),
    Invalid({"margin": -1.0}, "margin=-1.0"),
    Invalid({"margin": float("nan")}, "margin=nan"),
)

CATALOGUE = (
    LossInfo(
        hinge,
        _signed,
        valid=({}, {"margin": 0.4}),
        invalid=_MARGINS,
        sweeps={"margin": (0.5, 2.0)},
        source="C. Cortes and V. Vapnik, Support-vector networks, Machine Learning 20 (1995)",
    ),
    LossInfo(
        squared_hinge,
        _signed,
        valid=({}, {"margin": 0.4}),
        invalid=_MARGINS,
        sweeps={"margin": (0.5, 2.0)},
        source="C. Cortes and V. Vapnik, Support-vector networks, Machine Learning 20 (1995)",
    ),
    LossInfo(
        soft_margin,
        _signed,
        source="J. Friedman, T. Hastie and R. Tibshirani, Additive logistic regression, Ann. Statist. 28 (2000)",
    ),
    LossInfo(
        multilabel_margin,
        _sets,
        source="K. Crammer and Y. Singer, A family of additive online algorithms for category ranking, JMLR 3 (2003)",
    ),
    LossInfo(
        multilabel_soft_margin,
        _several_labels,
        valid=({}, {"weight": (0.5, 1.0, 2.0, 3.0)}),
        invalid=(
            Invalid({"weight": (1.0, float("inf"), 1.0, 1.0)}, "weight"),
            Invalid({"weight": 2.0}, "weight=2.0"),
        ),
        source="D. R. Cox, The regression analysis of binary sequences, J. R. Statist. Soc. B 20 (1958)",
    ),
)
