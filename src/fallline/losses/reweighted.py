"""Cross-entropies that weigh easy, hard and mislabelled samples differently than the cross-entropy does.

All are functions of the probability p of a sample's class, and are computed from the logarithm of the odds against it,
d = log((1 − p)/p): then log p = log σ(−d) and log(1 − p) = log σ(d), with every digit at both ends.

Neighbours: `classification` for the cross-entropy itself, `binary` for yes or no.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fallline.errors import LossMismatch
from fallline.losses.arguments import number, reduced, same_shape
from fallline.losses.base import Loss, Number, Numbers, Prediction, Target, Terms, loss_maker
from fallline.losses.classification import (
    IGNORE_INVALID,
    at,
    class_dimension,
    class_weights,
    kept_and_index,
    label_to_ignore,
    labelled,
    per_class,
)
from fallline.losses.info import Invalid, LossInfo


def _odds_against(prediction: Tensor, index: Tensor, dimension: int) -> Tensor:
    """d = log Σ_{c≠y} exp(z_c) − z_y, finite also where no other class is possible."""
    own = torch.zeros_like(prediction, dtype=torch.bool).scatter(dimension, index.unsqueeze(dimension), True)
    lowest = torch.finfo(prediction.dtype).min / 2  # half, so that −z_y finds room in float16
    others = torch.where(own, lowest, prediction)
    most = others.detach().amax(dimension, keepdim=True)
    # The maximum is a constant to the gradient: it cancels.
    logarithm = (others - most).exp().sum(dimension).log() + most.squeeze(dimension)
    return logarithm - at(prediction, index, dimension)


def _of_odds(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, loss: str, formula: Any, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dimension = class_dimension(loss, prediction, target)
    kept, index = kept_and_index(target, ignore_index)
    values = formula(_odds_against(prediction, index, dimension), numbers)
    return torch.where(kept, values, 0.0), kept


def _poly(odds: Tensor, numbers: Numbers) -> Tensor:
    return -logsigmoid(-odds) + numbers["epsilon"] * odds.sigmoid()


def _generalized(odds: Tensor, numbers: Numbers) -> Tensor:
    q = numbers["q"]
    return -torch.expm1(q * logsigmoid(-odds)) / q


def _symmetric(odds: Tensor, numbers: Numbers) -> Tensor:
    return numbers["beta"] * -numbers["log_zero"] * odds.sigmoid() - numbers["alpha"] * logsigmoid(-odds)


def _focal(
    prediction: Tensor,
    target: Tensor,
    numbers: Numbers,
    *,
    alpha: tuple[float, ...] | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    if target.is_floating_point() or target.dtype == torch.bool:
        return _focal_yes_no(prediction, target, numbers, alpha, ignore_index), None
    if "alpha" in numbers:
        raise LossMismatch(
            "focal was given one alpha and class indices, and expects one alpha for each class with them. Of two "
            "classes, alpha=0.25 for the second is alpha=(0.75, 0.25)."
        )
    dimension = class_dimension("focal", prediction, target)
    kept, index = kept_and_index(target, ignore_index)
    odds = _odds_against(prediction, index, dimension)
    values = (numbers["gamma"] * logsigmoid(odds)).exp() * -logsigmoid(-odds)
    if alpha is not None:
        values = values * per_class("focal", prediction, alpha, dimension)[index]
    return torch.where(kept, values, 0.0), kept


def _focal_yes_no(
    prediction: Tensor, target: Tensor, numbers: Numbers, alpha: tuple[float, ...] | None, ignore_index: int
) -> Tensor:
    same_shape("focal", prediction, target)
    if alpha is not None or ignore_index >= 0:
        told = f"alpha={alpha}" if alpha is not None else f"ignore_index={ignore_index}"
        raise LossMismatch(
            f"focal was given {told} and a target of type {target.dtype}, and expects class indices with it. Give "
            "target.long() if these are class indices; a 0 or 1 for each class takes one alpha and no ignore_index."
        )
    # 0 and 1 keep every digit at both ends; what lies between keeps far from 1 − p = 0.
    certain = (target == 0) | (target == 1)
    odds = (1 - 2 * target) * prediction
    share = torch.where(certain, 0.5, target)
    missed = (share + (1 - 2 * share) * prediction.sigmoid()).log()
    costs = -share * logsigmoid(prediction) - (1 - share) * logsigmoid(-prediction)
    missed = torch.where(certain, logsigmoid(odds), missed)
    values = (numbers["gamma"] * missed).exp() * torch.where(certain, -logsigmoid(-odds), costs)
    if "alpha" in numbers:
        values = values * (numbers["alpha"] * target + (1 - numbers["alpha"]) * (1 - target))
    return values


@loss_maker
def focal(
    *,
    gamma: Number = 2.0,
    alpha: Number | Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Loss:
    """The focal loss: −α·(1 − p)^γ·log p, a cross-entropy that looks away from samples which are already right.

    For class indices, p = softmax(z)[y] and α = α_y. For a target t of floating-point numbers 0 and 1 (or between)
    in the prediction's shape, each element is a decision of its own, as in the paper: 1 − p = t·(1 − σ(z)) +
    (1 − t)·σ(z), log p is the binary cross-entropy's, and α stands for α·t + (1 − α)·(1 − t).

    With γ = 0 it is the cross-entropy. The mean divides by the number of labels that are not ignored, or of elements,
    whatever their α; where every label is ignored it is 0 with a zero gradient. Equal to torchvision's
    `sigmoid_focal_loss` for 0 and 1, with another default of α (None for −1) and of the reduction, and with a
    finite gradient for γ < 1 where p has rounded to 1.

    Prediction: logits [N, C] or [N, C, d1, …], without a softmax. Target: class indices [N] or [N, d1, …] of an
    integer type, or 0 and 1 of a floating-point type in the prediction's shape.

    Args:
        gamma: γ ≥ 0; a number or a 0-dimensional tensor.
        alpha: for class indices, one finite number ≥ 0 for each class, shape [C]. For 0 and 1, one number from 0 to 1,
            the weight of a 1; a 0 has the weight 1 − α.
        ignore_index: the label of those samples that count for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside these domains.
        LossMismatch: when called with shapes that do not fit, with one alpha and class indices, or with several and
            0 and 1.

    Source: T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollár, "Focal loss for dense object detection", ICCV 2017.

    >>> focal(gamma=2.0)(torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1]))
    tensor(0.0866)
    >>> focal(gamma=2.0, alpha=0.25)(torch.tensor([0.0, -5.0]), torch.tensor([1.0, 0.0]))
    tensor(0.0217)
    """
    numbers = {"gamma": number("focal", "gamma", gamma, low=0)}
    several: tuple[float, ...] | None = None
    if isinstance(alpha, tuple):
        several = class_weights("focal", alpha, "alpha", low=0)
    elif alpha is not None:
        numbers["alpha"] = number("focal", "alpha", alpha, low=0, high=1)  # type: ignore[arg-type]
    return Loss(
        name="focal",
        kind="classification",
        terms=partial(_focal, alpha=several, ignore_index=label_to_ignore("focal", ignore_index)),
        prediction=Prediction.LOGITS,
        target=Target.CLASSES_OR_YES_NO,
        shapes=("[N, C, …]", "[N, …] or [N, C, …]"),
        formula="−α_y·(1 − p_y)^γ·log p_y",
        reference="Lin et al. 2017",
        numbers=numbers,
        reduction=reduced("focal", reduction),
    )


@loss_maker
def poly(*, epsilon: Number = 1.0, ignore_index: int = -100, reduction: str = "mean") -> Loss:
    """PolyLoss, Poly-1: −log p_y + ε·(1 − p_y), a cross-entropy whose first polynomial coefficient is 1 + ε.

    The cross-entropy is Σ_j (1 − p)^j/j; of this series ε changes the term that still has a gradient where p is near
    1. Above 0 it makes predictions more certain, below 0 less; with ε = 0 it is the cross-entropy. The mean divides by
    the number of labels that are not ignored; where every label is ignored it is 0 with a zero gradient.

    Prediction: logits [N, C] or [N, C, d1, …], without a softmax. Target: class indices [N] or [N, d1, …] of an
    integer type.

    Args:
        epsilon: ε ≥ −1, below which the loss would fall as the prediction gets worse.
        ignore_index: the label of those samples that count for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside these domains.
        LossMismatch: when called with shapes that do not fit.

    Source: Z. Leng, M. Tan, C. Liu, E. D. Cubuk, X. Shi, S. Cheng, D. Anguelov, "PolyLoss: a polynomial expansion
    perspective of classification loss functions", ICLR 2022.

    >>> poly()(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor(1.1931)
    """
    return Loss(
        name="poly",
        terms=_terms("poly", _poly, ignore_index),
        formula="−log p_y + ε·(1 − p_y)",
        reference="Leng et al. 2022",
        numbers={"epsilon": number("poly", "epsilon", epsilon, low=-1)},
        reduction=reduced("poly", reduction),
        kind="classification",
        prediction=Prediction.LOGITS,
        target=Target.CLASSES,
        shapes=("[N, C, …]", "[N, …]"),
    )


@loss_maker
def generalized_cross_entropy(*, q: Number = 0.7, ignore_index: int = -100, reduction: str = "mean") -> Loss:
    """The generalised cross-entropy: (1 − p_y^q)/q, between the cross-entropy (q → 0) and 1 − p_y (q = 1).

    Its gradient is the cross-entropy's times p_y^q: samples that the model holds to be all but impossible, such as
    mislabelled ones, hardly pull. The mean divides by the number of labels that are not ignored; where every label is
    ignored it is 0 with a zero gradient.

    Prediction: logits [N, C] or [N, C, d1, …], without a softmax. Target: class indices [N] or [N, d1, …] of an
    integer type.

    Args:
        q: above 0 and up to 1. Small ones are exact: q = 1e-6 differs from the cross-entropy by a relative q·log(p)/2.
        ignore_index: the label of those samples that count for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside these domains.
        LossMismatch: when called with shapes that do not fit.

    Source: Z. Zhang and M. R. Sabuncu, "Generalized cross entropy loss for training deep neural networks with noisy
    labels", NeurIPS 2018; without the truncation of its section 3.3.

    >>> generalized_cross_entropy(q=1.0)(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor(0.5000)
    """
    name = "generalized_cross_entropy"
    return Loss(
        name=name,
        terms=_terms(name, _generalized, ignore_index),
        formula="(1 − p_y^q)/q",
        reference="Zhang and Sabuncu 2018",
        numbers={"q": number(name, "q", q, above=0, high=1)},
        reduction=reduced(name, reduction),
        kind="classification",
        prediction=Prediction.LOGITS,
        target=Target.CLASSES,
        shapes=("[N, C, …]", "[N, …]"),
    )


@loss_maker
def symmetric_cross_entropy(
    *,
    alpha: Number = 0.1,
    beta: Number = 1.0,
    log_zero: Number = -4.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Loss:
    """The symmetric cross-entropy: −α·log p_y − β·A·(1 − p_y).

    The second part is the cross-entropy with label and prediction exchanged, −Σ_c p_c·log q_c, in which A stands for
    log 0 where the label says no; it is bounded, and so robust against wrong labels. The mean divides by the number of
    labels that are not ignored; where every label is ignored it is 0 with a zero gradient.

    Prediction: logits [N, C] or [N, C, d1, …], without a softmax. Target: class indices [N] or [N, d1, …] of an
    integer type.

    Args:
        alpha: α ≥ 0, of the cross-entropy. The paper takes 0.1 for CIFAR-10 and 6 for CIFAR-100.
        beta: β ≥ 0, of the reversed cross-entropy. The paper takes 1 for CIFAR-10 and 0.1 for CIFAR-100.
        log_zero: A ≤ 0. Only the product β·A matters. The paper's code clips labels at 1e-4, which is A = −9.21.
        ignore_index: the label of those samples that count for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for arguments outside these domains.
        LossMismatch: when called with shapes that do not fit.

    Source: Y. Wang, X. Ma, Z. Chen, Y. Luo, J. Yi, J. Bailey, "Symmetric cross entropy for robust learning with noisy
    labels", ICCV 2019.

    >>> symmetric_cross_entropy(alpha=1.0)(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor(2.6931)
    """
    name = "symmetric_cross_entropy"
    return Loss(
        name=name,
        terms=_terms(name, _symmetric, ignore_index),
        formula="−α·log p_y − β·A·(1 − p_y)",
        reference="Wang et al. 2019",
        numbers={
            "alpha": number(name, "alpha", alpha, low=0),
            "beta": number(name, "beta", beta, low=0),
            "log_zero": number(name, "log_zero", log_zero, low=-float("inf"), high=0),
        },
        reduction=reduced(name, reduction),
        kind="classification",
        prediction=Prediction.LOGITS,
        target=Target.CLASSES,
        shapes=("[N, C, …]", "[N, …]"),
    )


def _terms(name: str, formula: Any, ignore_index: object) -> Terms:
    return partial(_of_odds, loss=name, formula=formula, ignore_index=label_to_ignore(name, ignore_index))


CATALOGUE = (
    LossInfo(
        focal,
        labelled,
        valid=({}, {"gamma": 0.5, "alpha": (0.5, 1.0, 2.0, 3.0)}, {"ignore_index": -1}),
        invalid=(
            Invalid({"gamma": -0.5}, "gamma=-0.5"),
            Invalid({"alpha": 1.5}, "alpha=1.5"),
            Invalid({"alpha": (0.5, -0.5)}, "alpha"),
            Invalid({"alpha": "balanced"}, "alpha='balanced'"),
            IGNORE_INVALID,
        ),
        sweeps={"gamma": (0.5, 2.0)},
        source="T.-Y. Lin et al., Focal loss for dense object detection, ICCV 2017",
    ),
    LossInfo(
        poly,
        labelled,
        valid=({}, {"epsilon": -0.5, "ignore_index": -1}),
        invalid=(Invalid({"epsilon": -1.5}, "epsilon=-1.5"), IGNORE_INVALID),
        sweeps={"epsilon": (-0.5, 2.0)},
        source="Z. Leng et al., PolyLoss: a polynomial expansion perspective of classification losses, ICLR 2022",
    ),
    LossInfo(
        generalized_cross_entropy,
        labelled,
        valid=({}, {"q": 1.0}, {"q": 1e-6, "ignore_index": -1}),
        invalid=(Invalid({"q": 0.0}, "q=0.0"), Invalid({"q": 1.5}, "q=1.5"), IGNORE_INVALID),
        sweeps={"q": (0.3, 0.9)},
        source="Z. Zhang and M. R. Sabuncu, Generalized cross entropy loss for noisy labels, NeurIPS 2018",
    ),
    LossInfo(
        symmetric_cross_entropy,
        labelled,
        valid=({}, {"alpha": 6.0, "beta": 0.1}, {"log_zero": -9.0, "ignore_index": -1}),
        invalid=(
            Invalid({"alpha": -0.1}, "alpha=-0.1"),
            Invalid({"beta": -0.1}, "beta=-0.1"),
            Invalid({"log_zero": 1.0}, "log_zero=1.0"),
            IGNORE_INVALID,
        ),
        sweeps={"alpha": (0.1, 1.0), "beta": (0.5, 2.0), "log_zero": (-4.0, -8.0)},
        source="Y. Wang et al., Symmetric cross entropy for robust learning with noisy labels, ICCV 2019",
    ),
)
