"""Losses for one of several classes, as torch has them: cross-entropy, negative log-likelihood, multi-class margin.

Neighbours: `reweighted` for cross-entropies that weigh easy, hard and mislabelled samples differently, `ranks` for
classes with an order, `binary` for yes or no.

They are spelt out instead of calling torch's, because `log_softmax` over a short last dimension and the vmapped
`nll_loss` cost three times as much on a CPU, and torch's margin loss has no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number, reduced, same_shape
from fallline.losses.base import Loss, Number, Numbers, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo

Weighting: TypeAlias = Literal["classes", "samples"]


def class_dimension(loss: str, prediction: Tensor, target: Tensor) -> int:
    """The dimension of the classes in a prediction [N, C, …] for class indices [N, …], or in [C] for a single index.

    Raises:
        LossMismatch: for other shapes.
    """
    dimension = min(1, prediction.ndim - 1)
    if prediction.ndim and target.shape == (*prediction.shape[:dimension], *prediction.shape[dimension + 1 :]):
        return dimension
    fix = "Let the classes be dimension 1 of the prediction, and the target have every other one of its dimensions."
    if target.ndim == prediction.ndim and target.shape[-1:] == (1,):
        fix = "Take the last dimension of the target away: target.squeeze(-1)."
    elif target.shape == prediction.shape[:-1]:
        fix = "Move the classes to dimension 1: prediction.movedim(-1, 1)."
    elif target.shape == prediction.shape:
        fix = "Make indices of one-hot rows: target.argmax(1)."
    raise LossMismatch(
        f"{loss} was given a prediction of shape {list(prediction.shape)} and class indices of shape "
        f"{list(target.shape)}, and expects [N, C, …] and [N, …]. {fix}"
    )


def kept_and_index(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which labels count, and the labels with 0 in place of those that do not (whose values are replaced by 0)."""
    kept = target != ignore_index
    return kept, (target * kept).long()


def at(scores: Tensor, index: Tensor, dimension: int) -> Tensor:
    """The scores of the classes `index`."""
    return scores.gather(dimension, index.unsqueeze(dimension)).squeeze(dimension)


def per_class(loss: str, prediction: Tensor, weight: tuple[float, ...], dimension: int) -> Tensor:
    """Class weights as a tensor [C] of the prediction's type.

    Raises:
        LossMismatch: if there are not as many as classes.
    """
    classes = prediction.shape[dimension]
    if len(weight) != classes:
        raise LossMismatch(
            f"{loss} was given {len(weight)} class weights and a prediction of shape {list(prediction.shape)}, and "
            f"expects {classes}, one for each class."
        )
    return prediction.new_tensor(weight)


def class_weights(
    loss: str, weight: object, name: str = "weight", each: str = "class", *, low: float = -math.inf
) -> tuple[float, ...] | None:
    """One weight for each class, or each of something else, all of them finite numbers ≥ `low`.

    torch takes weights below 0, and so do its losses here; the misuse checks complain of them.

    Raises:
        InvalidHyperparameter: for anything else.
    """
    if weight is None:
        return None
    if not isinstance(weight, tuple) or not weight or not all(_is_weight(value, low) for value in weight):
        domain = "finite number" if low == -math.inf else f"finite number ≥ {low:g}"
        raise InvalidHyperparameter(f"{loss} was given {name}={weight!r}, and expects one {domain} per {each}.")
    return tuple(map(float, weight))


def _is_weight(value: object, low: float) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and low <= value and -math.inf < value < math.inf  # type: ignore[operator]


def label_to_ignore(loss: str, ignore_index: object) -> int:
    """A whole number.

    Raises:
        InvalidHyperparameter: for anything else.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise InvalidHyperparameter(f"{loss} was given ignore_index={ignore_index!r}, and expects a whole number.")
    return ignore_index


def _cross_entropy(
    prediction: Tensor,
    target: Tensor,
    numbers: Numbers,
    *,
    weight: tuple[float, ...] | None,
    ignore_index: int,
    weighting: Weighting,
) -> tuple[Tensor, Tensor | None]:
    label_smoothing = numbers["label_smoothing"]
    if target.is_floating_point():
        if ignore_index >= 0:
            raise LossMismatch(
                f"cross_entropy was given ignore_index={ignore_index} and class probabilities, and expects class "
                "indices with it. Leave it out, and give rows of zeros to samples that should count for nothing."
            )
        return _of_probabilities(prediction, target, label_smoothing, weight, weighting)
    return _of_indices(prediction, target, label_smoothing, weight, ignore_index, weighting)


def _of_indices(
    prediction: Tensor,
    target: Tensor,
    label_smoothing: Number,
    weight: tuple[float, ...] | None,
    ignore_index: int,
    weighting: Weighting,
) -> tuple[Tensor, Tensor]:
    dimension = class_dimension("cross_entropy", prediction, target)
    kept, index = kept_and_index(target, ignore_index)
    shifted, normaliser = _shifted(prediction, dimension)
    picked = at(shifted, index, dimension)
    smooths = isinstance(label_smoothing, Tensor) or label_smoothing != 0
    share = label_smoothing / prediction.shape[dimension]
    if smooths and (weight is None or weighting == "samples"):
        picked = (1 - label_smoothing) * picked + share * _sum(shifted, dimension, label_smoothing)
    if weight is None:
        values, weights = normaliser - picked, kept
    else:
        each = per_class("cross_entropy", prediction, weight, dimension)
        weights = each[index] * kept
        values = weights * (normaliser - picked)
        if 0.0 in weight:
            values = torch.where(weights != 0, values, 0.0)  # 0 · ∞ is 0
        if smooths and weighting == "classes":
            each = _along(each, prediction, dimension)
            if 0.0 in weight:
                shifted = torch.where(each == 0, 0.0, shifted)
            total = sum(weight) * normaliser - _sum(each * shifted, dimension, label_smoothing)
            values = (1 - label_smoothing) * values + share * total
    if isinstance(label_smoothing, Tensor):
        values = _overflowing(values)
    return torch.where(kept, values, 0.0), weights


def _of_probabilities(
    prediction: Tensor,
    target: Tensor,
    label_smoothing: Number,
    weight: tuple[float, ...] | None,
    weighting: Weighting,
) -> tuple[Tensor, Tensor | None]:
    same_shape("cross_entropy", prediction, target)
    dimension = min(1, prediction.ndim - 1)
    shifted, normaliser = _shifted(prediction, dimension)
    weights = None
    if weight is not None:
        each = _along(per_class("cross_entropy", prediction, weight, dimension), prediction, dimension)
        if weighting == "samples":
            weights = (target * each).sum(dimension)
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        target = target * (1 - label_smoothing) + label_smoothing / shifted.shape[dimension]
    if weight is not None and weights is None:
        target = target * each
    # A logit −∞ counts for nothing where its probability is 0, though 0 · ∞ is NaN.
    values = normaliser * target.sum(dimension) - (target * _finite(shifted)).sum(dimension)
    values = _overflowing(values)
    return (values, None) if weights is None else (torch.where(weights != 0, weights * values, 0.0), weights)


def _shifted(prediction: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Logits minus their maximum, and the logarithm of the sum of their exponentials, which is then at most log C.

    The maximum is a constant to the gradient: it cancels between the two.
    """
    shifted = prediction - prediction.detach().amax(dimension, keepdim=True)
    return shifted, shifted.exp().sum(dimension).log()


def _sum(terms: Tensor, dimension: int, label_smoothing: Number) -> Tensor:
    """The sum over the classes; finite where the smoothing of one of several trials may be 0, for 0 · ∞ is NaN."""
    total = terms.sum(dimension)
    return _finite(total) if isinstance(label_smoothing, Tensor) else total


def _finite(terms: Tensor) -> Tensor:
    """−∞ made the lowest number of the type, with gradient 0."""
    lowest = torch.finfo(terms.dtype).min
    return functional.threshold(terms, lowest, lowest)  # one kernel each way, where clamp and where take three


def _overflowing(values: Tensor) -> Tensor:
    """Infinite again where a lowest number has found its way into a value; the gradient remains."""
    return values + torch.where(values > 1e30, math.inf, 0.0)


def _along(weights: Tensor, prediction: Tensor, dimension: int) -> Tensor:
    return weights.reshape(-1, *[1] * (prediction.ndim - 1 - dimension))


def _nll(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, weight: tuple[float, ...] | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dimension = class_dimension("nll", prediction, target)
    kept, index = kept_and_index(target, ignore_index)
    picked = at(prediction, index, dimension)
    if weight is None:
        return torch.where(kept, -picked, 0.0), kept
    weights = per_class("nll", prediction, weight, dimension)[index] * kept
    return torch.where(weights != 0, -weights * picked, 0.0), weights


def _multi_margin(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, p: int, weight: tuple[float, ...] | None
) -> tuple[Tensor, None]:
    dimension = class_dimension("multi_margin", prediction, target)
    index = target.long().unsqueeze(dimension)
    classes = torch.arange(prediction.shape[dimension], device=prediction.device)
    lack = numbers["margin"] - prediction.gather(dimension, index) + prediction
    # relu has the gradient 0 at 0, as torch's margin loss; clamp has 1.
    hinges = torch.where(_along(classes, prediction, dimension) != index, lack, 0.0).relu()
    values = (hinges if p == 1 else hinges.square()).mean(dimension)
    if weight is not None:
        values = values * per_class("multi_margin", prediction, weight, dimension)[target.long()]
    return values, None


@loss_maker
def cross_entropy(
    *,
    weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: Number = 0.0,
    weighting: Weighting = "classes",
    reduction: str = "mean",
) -> Loss:
    """The cross-entropy between logits z and classes: −log softmax(z)[y] = log Σ_c exp(z_c) − z_y.

    In general −Σ_c q_c·log p_c with p = softmax(z), where q is 1 for the class y, or the class probabilities that the
    target gives. Label smoothing ε puts (1 − ε)·q + ε/C in the place of q. Class weights w enter in one of two ways:

        weighting="classes":  −Σ_c w_c·q_c·log p_c with the smoothed q. The mean divides by Σ w_y over the labels that
                              count; for class probabilities, by their number.
        weighting="samples":  −W·Σ_c q_c·log p_c with the smoothed q, where W = w_y, or Σ_c w_c·q_c before smoothing.
                              The mean divides by Σ W.

    The first is what torch computes. Together with label smoothing or class probabilities it does not weigh samples:
    it asks for p_c ∝ w_c·q_c, so that a class of great weight is predicted wherever smoothing leaves it ε/C
    (pytorch#104776), the denominator leaves out the weights of the smoothed part, and one-hot rows give another mean
    than their indices (pytorch#61309). The second asks for p = q whatever the weights are, is a weighted mean of
    cross-entropies, and gives the same for one-hot rows and indices. Both are equal for indices without smoothing.
    Since the mean divides by the weights, they cancel in a batch whose labels are all of one class (pytorch#8062);
    reduction="sum" keeps them.

    Prediction: logits [N, C] or [N, C, d1, …], without a softmax; or [C] with a single index. Target: class indices
    [N] or [N, d1, …] of an integer type, or probabilities of the prediction's shape.

    Equal to `torch.nn.CrossEntropyLoss` with weighting="classes", except that these are 0 here and NaN there: the mean
    where every label is ignored (pytorch#70348) or has weight 0, with a zero gradient, and the part of a class that
    has probability or weight 0 in the target, and the logit −∞. Label smoothing makes the value of a sample with a
    logit −∞ infinite here and there; its gradient is finite.

    Args:
        weight: one finite number for each class, shape [C]; usually ≥ 0.
        ignore_index: the label of those samples that count for nothing. Class probabilities cannot be ignored.
        label_smoothing: ε from 0 to 1; a number or a 0-dimensional tensor.
        weighting: "classes" or "samples", what the weights weigh.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for weights below 0, an ε outside [0, 1], an `ignore_index` that is no whole number, an
            unknown `weighting` or `reduction`.
        LossMismatch: when called with shapes that do not fit, as many weights as there are not classes, or class
            probabilities together with an `ignore_index` ≥ 0.

    Source: label smoothing, C. Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016.

    >>> cross_entropy()(torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1]))
    tensor(0.3466)
    """
    if weighting not in ("classes", "samples"):
        raise InvalidHyperparameter(
            f"cross_entropy was given weighting={weighting!r}, and expects 'classes' or 'samples'."
        )
    return Loss(
        name="cross_entropy",
        kind="classification",
        terms=partial(
            _cross_entropy,
            weight=class_weights("cross_entropy", weight),
            ignore_index=label_to_ignore("cross_entropy", ignore_index),
            weighting=weighting,
        ),
        prediction=Prediction.LOGITS,
        target=Target.CLASSES_OR_PROBABILITIES,
        shapes=("[N, C, …]", "[N, …] or [N, C, …]"),
        formula="log Σ_c exp(z_c) − z_y",
        numbers={"label_smoothing": number("cross_entropy", "label_smoothing", label_smoothing, low=0, high=1)},
        reduction=reduced("cross_entropy", reduction),
        torch_name="CrossEntropyLoss",
    )


@loss_maker
def nll(
    *,
    weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Loss:
    """The negative log-likelihood of classes: −w_y·x_y for log-probabilities x; the mean divides by Σ w_y.

    After a log-softmax it is the cross-entropy; `cross_entropy` of the logits is the same in one step.

    Prediction: log-probabilities [N, C] or [N, C, d1, …], as a log-softmax over dimension 1 gives them; or [C] with a
    single index. Target: class indices [N] or [N, d1, …] of an integer type. Equal to `torch.nn.NLLLoss`, except that
    these are 0 here and NaN there: the mean where every label is ignored or has weight 0, with a zero gradient, and a
    log-probability −∞ with weight 0.

    Args:
        weight: one finite number for each class, shape [C]; usually ≥ 0.
        ignore_index: the label of those samples that count for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for weights below 0, an `ignore_index` that is no whole number, an unknown `reduction`.
        LossMismatch: when called with shapes that do not fit.

    >>> nll()(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(), torch.tensor([1, 0]))
    tensor(0.4904)
    """
    return Loss(
        name="nll",
        kind="classification",
        terms=partial(_nll, weight=class_weights("nll", weight), ignore_index=label_to_ignore("nll", ignore_index)),
        prediction=Prediction.LOG_PROBABILITIES,
        target=Target.CLASSES,
        shapes=("[N, C, …]", "[N, …]"),
        formula="−x_y for x = log p",
        reduction=reduced("nll", reduction),
        torch_name="NLLLoss",
    )


@loss_maker
def multi_margin(
    *,
    p: int = 1,
    margin: Number = 1.0,
    weight: Tensor | Sequence[float] | None = None,
    reduction: str = "mean",
) -> Loss:
    """The hinge loss of several classes: (w_y/C)·Σ_{c≠y} max(0, m − x_y + x_c)ᵖ.

    A sample costs nothing once the score of its class leads every other one by the margin m. The mean divides by the
    number of samples, whatever their weights are.

    Prediction: scores [N, C] or [N, C, d1, …]; or [C] with a single index. Target: class indices [N] or [N, d1, …] of
    an integer type. Equal to `torch.nn.MultiMarginLoss`, which has no further dimensions and no second derivative.

    Args:
        p: 1, or 2 for squares.
        margin: m in the unit of the scores; a number or a 0-dimensional tensor.
        weight: one finite number for each class, shape [C]; usually ≥ 0.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for another p, a margin that is no finite number, weights below 0, an unknown
            `reduction`.
        LossMismatch: when called with shapes that do not fit.

    Source: K. Crammer and Y. Singer, "On the algorithmic implementation of multiclass kernel-based vector machines",
    JMLR 2 (2001), who take the largest hinge; the sum over them is of J. Weston and C. Watkins, "Support vector
    machines for multi-class pattern recognition", ESANN 1999.

    >>> multi_margin()(torch.tensor([[2.0, 1.5, 0.0]]), torch.tensor([0]))
    tensor(0.1667)
    """
    if isinstance(p, bool) or p not in (1, 2):
        raise InvalidHyperparameter(f"multi_margin was given p={p!r}, and expects 1 or 2.")
    return Loss(
        name="multi_margin",
        kind="classification",
        terms=partial(_multi_margin, p=p, weight=class_weights("multi_margin", weight)),
        prediction=Prediction.CLASS_SCORES,
        target=Target.CLASSES,
        shapes=("[N, C, …]", "[N, …]"),
        formula="(1/C) Σ_{c≠y} max(0, m − x_y + x_c)ᵖ",
        reference="Weston and Watkins 1999",
        numbers={"margin": number("multi_margin", "margin", margin)},
        reduction=reduced("multi_margin", reduction),
        torch_name="MultiMarginLoss",
    )


def labelled(generator: Generator) -> tuple[Tensor, Tensor]:
    """Logits of four classes, and labels of which each occurs three times."""
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return logits, torch.arange(12)[torch.randperm(12, generator=generator)] % 4


def _log_probabilities(generator: Generator) -> tuple[Tensor, Tensor]:
    logits, target = labelled(generator)
    return logits.log_softmax(1), target


IGNORE_INVALID = Invalid({"ignore_index": 1.0}, "ignore_index=1.0")
_WEIGHTS_INVALID = (Invalid({"weight": [float("inf"), 1.0]}, "weight"), Invalid({"weight": [[1.0, 1.0]]}, "weight"))
_WEIGHTS = (0.5, 1.0, 2.0, 3.0)

CATALOGUE = (
    LossInfo(
        cross_entropy,
        labelled,
        valid=(
            {},
            {"weight": _WEIGHTS, "label_smoothing": 0.1},
            {"weight": _WEIGHTS, "label_smoothing": 0.1, "weighting": "samples"},
            {"ignore_index": -1},
        ),
        invalid=(
            Invalid({"label_smoothing": 1.5}, "label_smoothing=1.5"),
            Invalid({"label_smoothing": -0.1}, "label_smoothing"),
            Invalid({"weighting": "batches"}, "weighting='batches'"),
            IGNORE_INVALID,
            *_WEIGHTS_INVALID,
        ),
        sweeps={"label_smoothing": (0.0, 0.3)},
        source="C. Szegedy et al., Rethinking the Inception architecture, CVPR 2016 (label smoothing)",
    ),
    LossInfo(
        nll,
        _log_probabilities,
        valid=({}, {"weight": _WEIGHTS, "ignore_index": -1}),
        invalid=(IGNORE_INVALID, *_WEIGHTS_INVALID),
    ),
    LossInfo(
        multi_margin,
        labelled,
        valid=({}, {"p": 2, "margin": 0.5, "weight": _WEIGHTS}),
        invalid=(
            Invalid({"p": 3}, "p=3"),
            Invalid({"p": True}, "p=True"),
            Invalid({"margin": float("inf")}, "margin=inf"),
            *_WEIGHTS_INVALID,
        ),
        sweeps={"margin": (0.5, 2.0)},
        source="J. Weston and C. Watkins, Support vector machines for multi-class pattern recognition, ESANN 1999",
    ),
)
