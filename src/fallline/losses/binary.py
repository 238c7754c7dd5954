"""Losses for yes or no, element by element: cross-entropies of logits and of probabilities, and the asymmetric one.

Neighbours: `margins` for scores whose sign decides, `overlap` for yes or no over the pixels of an image taken together,
`classification` for one of several classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number, reduced, same_shape
from fallline.losses.base import Loss, Number, Numbers, Prediction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo


def of_logits(prediction: Tensor, target: Tensor, pos_weight: Number | None = None) -> Tensor:
    """−p·y·log σ(z) − (1 − y)·log(1 − σ(z)) for logits z of the target's shape, exact in both tails.

    With s = −1 for a yes (y ≥ ½) and 1 for a no, −log σ(−s·z) is what the nearer answer costs. What soft targets add
    to it is a multiple of z: −log σ(−z) = −log σ(z) + z. For y = 0 and y = 1 this multiple is 0, so that nothing
    cancels where the answer is right and the loss tiny.
    """
    target = target.to(prediction.dtype)
    yes = (target >= 0.5).to(prediction.dtype)
    nearer = -functional.logsigmoid((2 * yes - 1) * prediction)
    if pos_weight is None:
        return nearer + (yes - target) * prediction
    slope = yes - target * (yes + pos_weight * (1 - yes))
    return (1 + (pos_weight - 1) * target) * nearer + slope * prediction


def finite(loss: str, name: str, value: Any) -> Any:
    """A factor, or a nested tuple of factors, all finite; a tensor (under vmap or grad) is taken at its word.

    torch takes factors below 0, and so do its losses here; the misuse checks complain of them.

    Raises:
        InvalidHyperparameter: for anything else but None.
    """
    for factor in _flat(value):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise InvalidHyperparameter(f"{loss} was given {name}={value!r}, and expects finite numbers.")
    return value


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [factor for item in value for factor in _flat(item)]
    return [] if value is None or isinstance(value, Tensor) else [value]


def per_element(loss: str, name: str, value: Any, prediction: Tensor) -> Tensor:
    """Factors as a tensor that broadcasts to the prediction and leaves its shape as it is.

    Raises:
        LossMismatch: if they do not.
    """
    factors = value.to(prediction.dtype) if isinstance(value, Tensor) else prediction.new_tensor(value)
    last = prediction.shape[max(0, prediction.ndim - factors.ndim) :]
    fits = len(last) == factors.ndim and all(own in (1, size) for own, size in zip(factors.shape, last, strict=True))
    if not fits:
        raise LossMismatch(
            f"{loss} was given a {name} of shape {list(factors.shape)} and a prediction of shape "
            f"{list(prediction.shape)}, and expects a {name} that broadcasts to the prediction. Give one number, or "
            "one for each output."
        )
    return factors


def _with_logits(
    prediction: Tensor, target: Tensor, numbers: Numbers, *, weight: Any, pos_weights: Any
) -> tuple[Tensor, None]:
    name = "binary_cross_entropy_with_logits"
    same_shape(name, prediction, target)
    pos_weight: Number | None = numbers.get("pos_weight")
    if pos_weights is not None:
        pos_weight = per_element(name, "pos_weight", pos_weights, prediction)
    values = of_logits(prediction, target, pos_weight)
    if weight is not None:
        values = values * per_element(name, "weight", weight, prediction)
    return values, None


LOWEST_LOG = -100.0
"""Below this torch's BCELoss cuts logarithms off."""


def _nearest(dtype: torch.dtype) -> tuple[float, float]:
    """How near to 0 and to 1 a probability still has its exact gradient.

    Above 0: where the logarithm is cut off, or where 1/p leaves room for factors before it overflows. Below 1: half
    the distance from 1 to the next number below, so that only 1 itself is nearer.
    """
    limits = torch.finfo(dtype)
    room = 4 if dtype == torch.float16 else 2**20
    return max(math.exp(LOWEST_LOG), limits.tiny * room), limits.eps / 4


def _cut_off_log(probability: Tensor, distance: Tensor, nearest: float, log: Callable[[Tensor], Tensor]) -> Tensor:
    """The logarithm of a distance from 0 or 1, not below −100, whose slope ends at 1/nearest and does not vanish."""
    beyond = distance < nearest
    inside = log(torch.where(beyond, 0.5, probability))
    line = distance / nearest
    outside = distance.detach().log().clamp(min=LOWEST_LOG) + (line - line.detach())
    return torch.where(beyond, outside, inside)


def _of_probabilities(prediction: Tensor, target: Tensor, numbers: Numbers, *, weight: Any) -> tuple[Tensor, None]:
    same_shape("binary_cross_entropy", prediction, target)
    target = target.to(prediction.dtype)
    above, below = _nearest(prediction.dtype)
    yes = _cut_off_log(prediction, prediction, above, torch.log)
    no = _cut_off_log(prediction, 1 - prediction, below, lambda p: torch.log1p(-p))
    values = -(target * yes + (1 - target) * no)
    if weight is not None:
        values = values * per_element("binary_cross_entropy", "weight", weight, prediction)
    return values, None


def _asymmetric(prediction: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, None]:
    same_shape("asymmetric", prediction, target)
    clip = numbers["clip"]
    target = target.to(prediction.dtype)
    log_yes, log_no = functional.logsigmoid(prediction), functional.logsigmoid(-prediction)
    positive = (numbers["gamma_pos"] * log_no).exp() * log_yes
    probability = prediction.sigmoid()
    counts = probability > clip
    shifted = torch.where(counts, probability - clip, 0.5)
    negative = torch.where(counts, shifted ** numbers["gamma_neg"] * _raised(log_no, clip), 0.0)
    return -(target * positive + (1 - target) * negative), None


def _raised(log_no: Tensor, clip: Number) -> Tensor:
    """log(1 − p + clip) from log(1 − p), which may be as low as −10⁴, for any clip ≥ 0."""
    if not isinstance(clip, Tensor):
        return log_no if clip == 0 else math.log(clip) - functional.logsigmoid(math.log(clip) - log_no)
    least = torch.where(clip > 0, clip, 1.0).log()
    return torch.where(clip > 0, least - functional.logsigmoid(least - log_no), log_no)


@loss_maker
def binary_cross_entropy_with_logits(
    *,
    weight: Tensor | float | None = None,
    pos_weight: Number | None = None,
    reduction: str = "mean",
) -> Loss:
    """The cross-entropy of yes or no for a logit z and a target y: −p·y·log σ(z) − (1 − y)·log(1 − σ(z)).

    σ is the logistic function and p the `pos_weight`. Prediction: logits [N, …], without a sigmoid. Target: 0, 1 or
    between them, of the same shape; nothing is broadcast. Equal to `torch.nn.BCEWithLogitsLoss`, whose gradient
    loses its last digits where a yes is predicted with certainty: at z = 40 and y = 1 it is 0 there and the exact
    −4.2e−18 here.

    Args:
        weight: a factor for each element, of a shape that broadcasts to the prediction's; the mean still divides
            by the number of elements.
        pos_weight: how many times a yes counts, ≥ 0; above 1 for rare positives. One number, which can be searched, or
            one for each output.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for factors that are no finite numbers, or an unknown `reduction`.
        LossMismatch: when called with shapes that differ, or factors that do not broadcast to them.

    Source: D. R. Cox, "The regression analysis of binary sequences", J. R. Statist. Soc. B 20 (1958).

    >>> binary_cross_entropy_with_logits()(torch.tensor([[0.0], [200.0]]), torch.tensor([[1.0], [1.0]]))
    tensor(0.3466)
    """
    name = "binary_cross_entropy_with_logits"
    several = isinstance(pos_weight, tuple) or (isinstance(pos_weight, Tensor) and pos_weight.ndim > 0)
    numbers: dict[str, Number] = {}
    if pos_weight is not None and not several:
        numbers["pos_weight"] = number(name, "pos_weight", pos_weight, low=0)
    pos_weights = finite(name, "pos_weight", pos_weight) if several else None
    return Loss(
        name=name,
        kind="binary",
        terms=partial(_with_logits, weight=finite(name, "weight", weight), pos_weights=pos_weights),
        prediction=Prediction.YES_LOGITS,
        target=Target.FRACTIONS,
        shapes=("[N, …]", "[N, …]"),
        formula="−y·log σ(z) − (1 − y)·log(1 − σ(z))",
        reference="Cox 1958",
        numbers=numbers,
        reduction=reduced(name, reduction),
        torch_name="BCEWithLogitsLoss",
    )


@loss_maker
def binary_cross_entropy(*, weight: Tensor | float | None = None, reduction: str = "mean") -> Loss:
    """The cross-entropy of yes or no for a probability p and a target y: −y·log p − (1 − y)·log(1 − p).

    Prediction: probabilities [N, …] from 0 to 1, such as a sigmoid gives. Target: 0, 1 or between them, of the same
    shape; nothing is broadcast. Logarithms are cut off at −100, as in `torch.nn.BCELoss`, to whose values it is equal.

    Its gradient (p − y) / (p·(1 − p)) is exact where torch's is not: torch replaces a denominator below 1e-12 by 1e-12,
    so that a sigmoid which is sure of the wrong answer stops learning (at z = −50 and y = 1, p is 2e-22, and torch's
    gradient at z is −2e-10 instead of −1); in float16, 1e-12 is 0, and a perfect prediction has the gradient NaN. Here
    the slope of a logarithm grows up to 1/n, and stays there, with n the smallest probability that is safe to divide by
    (3.7e-44 in float64, where the logarithm is cut off; 1.2e-32 in float32 and bfloat16; 2.4e-4 in float16) or, at
    p = 1, a quarter of the type's ε. It is finite everywhere, and never 0 for a wrong answer. What a sigmoid has
    rounded to exactly 1 (from z = 17 in float32) is lost before any loss sees it: prefer
    `binary_cross_entropy_with_logits`.

    Args:
        weight: a factor for each element, of a shape that broadcasts to the prediction's; the mean still divides
            by the number of elements.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for factors that are no finite numbers, or an unknown `reduction`.
        LossMismatch: when called with shapes that differ, or factors that do not broadcast to them. Probabilities below
            0 or above 1 are not looked for: their loss is NaN.

    Source: D. R. Cox, "The regression analysis of binary sequences", J. R. Statist. Soc. B 20 (1958).

    >>> binary_cross_entropy()(torch.tensor([0.5, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    tensor(33.5644)
    """
    name = "binary_cross_entropy"
    return Loss(
        name=name,
        kind="binary",
        terms=partial(_of_probabilities, weight=finite(name, "weight", weight)),
        prediction=Prediction.PROBABILITIES,
        target=Target.FRACTIONS,
        shapes=("[N, …]", "[N, …]"),
        formula="−y·log p − (1 − y)·log(1 − p)",
        reference="Cox 1958",
        reduction=reduced(name, reduction),
        torch_name="BCELoss",
    )


@loss_maker
def asymmetric(
    *, gamma_neg: Number = 4.0, gamma_pos: Number = 1.0, clip: Number = 0.05, reduction: str = "mean"
) -> Loss:
    """The asymmetric loss for many labels, few of them yes: easy negatives count for less, the easiest for nothing.

    With p = σ(z) and the shifted probability q = max(p − m, 0), an element has the value

        yes:  −(1 − p)^γ₊ · log p
        no:   −q^γ₋ · log(1 − q)

    Prediction: logits [N, …], without a sigmoid. Target: 0 or 1, of the same shape. γ₊ = γ₋ = m = 0 is the binary
    cross-entropy; γ₊ = γ₋ with m = 0 is the focal loss without its balance.

    The gradient is that of the formula, through the focusing factors too, as in the paper's analysis and as the
    authors' code has it by default (its option `disable_torch_grad_focal_loss` holds them constant). The authors' code
    sums over all elements: that is `reduction="sum"`. It also keeps probabilities at least 1e-8 away from 0 inside the
    logarithm, which stops its gradient for positives below z = −18; here the logarithm is exact.

    Args:
        gamma_neg: γ₋ ≥ 0, how strongly easy negatives are played down.
        gamma_pos: γ₊ ≥ 0, the same for positives.
        clip: the margin m from 0 to 1; negatives with a probability below it count for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        InvalidHyperparameter: for numbers outside these ranges or an unknown `reduction`.
        LossMismatch: when called with shapes that differ.

    Source: T. Ridnik et al., "Asymmetric loss for multi-label classification", ICCV 2021, arXiv 2009.14119.

    >>> asymmetric()(torch.tensor([[-4.0, 0.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor(0.1206)
    """
    name = "asymmetric"
    return Loss(
        name=name,
        kind="binary",
        terms=_asymmetric,
        prediction=Prediction.YES_LOGITS,
        target=Target.YES_NO,
        shapes=("[N, …]", "[N, …]"),
        formula="−y·(1 − p)^γ₊·log p − (1 − y)·q^γ₋·log(1 − q), q = max(p − m, 0)",
        reference="Ridnik et al. 2021",
        numbers={
            "gamma_neg": number(name, "gamma_neg", gamma_neg, low=0),
            "gamma_pos": number(name, "gamma_pos", gamma_pos, low=0),
            "clip": number(name, "clip", clip, low=0, high=1),
        },
        reduction=reduced(name, reduction),
    )


def _yes_or_no(generator: Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    return logits, (torch.rand(12, 2, generator=generator, dtype=torch.float64) < 0.5).double()


def _probably(generator: Generator) -> tuple[Tensor, Tensor]:
    logits, target = _yes_or_no(generator)
    return logits.sigmoid(), target


CATALOGUE = (
    LossInfo(
        binary_cross_entropy_with_logits,
        _yes_or_no,
        valid=({"pos_weight": 3.0}, {}, {"pos_weight": (2.0, 3.0)}, {"weight": 0.5}, {"weight": (0.5, 2.0)}),
        invalid=(
            Invalid({"pos_weight": -1.0}, "pos_weight=-1.0"),
            Invalid({"pos_weight": (1.0, float("inf"))}, "pos_weight=(1.0, inf)"),
            Invalid({"pos_weight": float("inf")}, "pos_weight=inf"),
            Invalid({"weight": float("nan")}, "weight=nan"),
            Invalid({"weight": (1.0, float("inf"))}, "weight=(1.0, inf)"),
            Invalid({"weight": True}, "weight=True"),
            Invalid({"weight": "2"}, "weight='2'"),
        ),
        sweeps={"pos_weight": (0.5, 3.0)},
        source="D. R. Cox, The regression analysis of binary sequences, J. R. Statist. Soc. B 20 (1958)",
    ),
    LossInfo(
        binary_cross_entropy,
        _probably,
        valid=({}, {"weight": 0.5}, {"weight": (0.5, 2.0)}),
        invalid=(Invalid({"weight": float("nan")}, "weight=nan"),),
        source="D. R. Cox, The regression analysis of binary sequences, J. R. Statist. Soc. B 20 (1958)",
    ),
    LossInfo(
        asymmetric,
        _yes_or_no,
        valid=({}, {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}, {"gamma_neg": 2.5, "clip": 0.2}),
        invalid=(
            Invalid({"gamma_neg": -1.0}, "gamma_neg=-1.0"),
            Invalid({"gamma_pos": -0.5}, "gamma_pos=-0.5"),
            Invalid({"clip": -0.1}, "clip=-0.1"),
            Invalid({"clip": 1.5}, "clip=1.5"),
        ),
        sweeps={"gamma_neg": (0.5, 4.0), "gamma_pos": (0.0, 2.0), "clip": (0.0, 0.2)},
        source="T. Ridnik et al., Asymmetric loss for multi-label classification, ICCV 2021",
    ),
)
