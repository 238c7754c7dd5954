"""Losses made of losses: weighted sums, which `cross_entropy() + 0.5 * dice()` writes too.

What the sum wants to be given follows from its parts: two meanings go together when one is a special case of the
other. The tables below say which are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import TypeVar

import torch
from torch import Generator, Tensor

from fallline.description import item_name, leaves
from fallline.dimensions import Dimension
from fallline.errors import InvalidHyperparameter, LossMismatch
from fallline.losses.arguments import number
from fallline.losses.base import Kind, Loss, Number, Numbers, Parts, Prediction, Reduction, Target, loss_maker
from fallline.losses.info import Invalid, LossInfo
from fallline.losses.regression import huber, mse

# What else a loss is content with that wants the key: the same numbers, of which more is known.
PREDICTIONS: Mapping[Prediction, frozenset[Prediction]] = {
    Prediction.ANYTHING: frozenset(Prediction),
    Prediction.REAL: frozenset({Prediction.POSITIVE, Prediction.PROBABILITIES, Prediction.SCORES}),
    Prediction.POSITIVE: frozenset({Prediction.PROBABILITIES}),
    Prediction.CLASS_SCORES: frozenset({Prediction.LOGITS, Prediction.LOG_PROBABILITIES}),
}
TARGETS: Mapping[Target, frozenset[Target]] = {
    Target.ANYTHING: frozenset(Target),
    Target.NOTHING: frozenset(Target) - {Target.NOTHING},
    Target.REAL: frozenset(
        {
            Target.POSITIVE,
            Target.NOT_NEGATIVE,
            Target.COUNTS,
            Target.FRACTIONS,
            Target.YES_NO,
            Target.SIGNS,
            Target.PROBABILITIES,
            Target.LOG_PROBABILITIES,
        }
    ),
    Target.NOT_NEGATIVE: frozenset(
        {Target.POSITIVE, Target.COUNTS, Target.FRACTIONS, Target.YES_NO, Target.PROBABILITIES}
    ),
    Target.FRACTIONS: frozenset({Target.YES_NO, Target.PROBABILITIES}),
    Target.CLASSES_OR_PROBABILITIES: frozenset({Target.CLASSES, Target.PROBABILITIES}),
    Target.CLASSES_OR_YES_NO: frozenset({Target.CLASSES, Target.YES_NO}),
}
# The losses of a distribution that read the same numbers: all others are alone with theirs.
PARAMETERS = dict.fromkeys(("gaussian_nll", "beta_nll", "GaussianNLLLoss", "gaussian_nll_loss"), "mean and variance")
KINDS: tuple[Kind, ...] = ("classification", "binary", "regression", "other")  # the most telling metric first

Meaning = TypeVar("Meaning", Prediction, Target)


def _sum(prediction: Parts, target: Parts, numbers: Numbers, *, parts: tuple[Loss, ...]) -> tuple[Tensor, None]:
    """Values per sample whose mean (whose sum, where every part is a sum) is Σ_i w_i · loss_i."""
    summed = _reduction(parts) == "sum"
    weighted = [
        numbers[_weight(i)] * _per_sample(part, prediction, target, _numbers_of(part, numbers, _part(i)), summed)
        for i, part in enumerate(parts)
    ]
    if len({values.shape for values in weighted}) > 1:  # no common samples: only the whole is known
        weighted = [values.sum() if summed else values.mean() for values in weighted]
    total = weighted[0]
    for values in weighted[1:]:
        total = total + values
    return total, None


def _per_sample(part: Loss, prediction: Parts, target: Parts, numbers: Numbers, summed: bool) -> Tensor:
    """A value for each sample, [N], such that their mean (their sum, if `summed`) is the part's own loss."""
    values, weights = part.terms(prediction, target, numbers)
    count = values.shape[0] if values.ndim else 1
    rows = values.flatten(1) if values.ndim > 1 else values.unsqueeze(-1)
    if part.reduction != "mean":
        of_sample = rows.sum(-1)
        return of_sample * count if part.reduction == "sum" and not summed else of_sample
    if weights is None:
        return rows.mean(-1)
    total = weights.sum()
    return rows.sum(-1) * count / (total + (total == 0))


def _numbers_of(part: Loss, numbers: Numbers, prefix: str) -> Numbers:
    return {name: numbers.get(f"{prefix}.{name}", value) for name, value in part.numbers.items()}


def _as_they_are(prediction: Parts, target: Parts, *, parts: tuple[Loss, ...], weights: tuple[Number, ...]) -> Tensor:
    """Σ_i w_i · loss_i where a part is somebody else's callable, which is called exactly as it is."""
    total = weights[0] * parts[0](prediction, target)
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part(prediction, target)
    return total


def _part(index: int) -> str:
    return item_name("losses", index)


def _weight(index: int) -> str:
    return item_name("weights", index)


def _reduction(parts: tuple[Loss, ...]) -> Reduction:
    return "sum" if all(part.reduction == "sum" for part in parts) else "mean"


def _common(
    parts: tuple[Loss, ...],
    content: Sequence[tuple[Meaning, Set[Meaning]]],
    also: Mapping[Meaning, Set[Meaning]],
    what: str,
) -> Meaning:
    """The most general meaning that every part is content with; `content` holds what each wants, and what else will do.

    Raises:
        LossMismatch: where there is none.
    """
    meanings = [wanted for wanted, _ in content]
    if len(set(meanings)) == 1:
        return meanings[0]
    shared = [each for each in type(meanings[0]) if all(each == wanted or each in more for wanted, more in content)]
    if shared:
        extent = [len(also.get(meaning, ())) for meaning in shared]
        return shared[extent.index(max(extent))]
    told = ", ".join(f"{part.name} wants {meaning.value}" for part, meaning in zip(parts, meanings, strict=True))
    raise LossMismatch(
        f"weighted_sum was given losses that cannot share a {what}: {told}. Take losses that want the same, such as "
        "the one on logits instead of the one on probabilities, or give a callable(prediction, target)."
    )


def _predictions(part: Loss) -> tuple[Prediction, Set[Prediction]]:
    also = PREDICTIONS.get(part.prediction, frozenset())
    # Such a loss takes a logit for each class or, where the target is as large, one for each yes or no.
    both = {Prediction.YES_LOGITS} if part.target == Target.CLASSES_OR_YES_NO else set()
    return part.prediction, also | both


def _targets(part: Loss) -> tuple[Target, Set[Target]]:
    return part.target, TARGETS.get(part.target, frozenset())


def _same_parameters(parts: tuple[Loss, ...]) -> None:
    """Refuses two distributions that are described by different numbers.

    Raises:
        LossMismatch: for a mean and a variance beside a mean and a scale.
    """
    told = {_parameters(part): part.name for part in parts if part.prediction == Prediction.DISTRIBUTION}
    if len(told) > 1:
        each = " and ".join(f"{name} ({parameters})" for parameters, name in told.items())
        raise LossMismatch(
            f"weighted_sum was given {each}, whose predictions are parameters of different distributions, or of one in "
            "different forms. Take losses of the same parameters."
        )


def _parameters(part: Loss) -> str:
    arguments = part.arguments_of_call
    for inner in arguments.get("losses", ()):
        if isinstance(inner, Loss) and inner.prediction == Prediction.DISTRIBUTION:
            return _parameters(inner)
    logarithms = [name for name, value in arguments.items() if name.startswith("log_") and value is True]
    return ", ".join([PARAMETERS.get(part.name, f"those of {part.name}"), *logarithms])


@loss_maker
def weighted_sum(*, losses: Sequence[object], weights: Sequence[Number | Dimension]) -> Loss:
    """The weighted sum of losses of the same prediction and target, Σ_i w_i · loss_i.

    Each loss is reduced as it says itself, and then weighted: the value is exactly w1 · loss1(prediction, target) +
    w2 · loss2(prediction, target) + … . A sample's value is what it adds to the sum's mean, so that the mean over the
    samples is the loss; where every part has reduction="sum", so has the sum.

    `cross_entropy() + 0.5 * dice()` is `weighted_sum(losses=(cross_entropy(), dice()), weights=(1.0, 0.5))`. The
    numbers that a sweep may search are the weights, `weight1`, `weight2` …, and those of the parts, such as
    `loss2.gamma`. Prediction and target are what all parts are content with.

    Args:
        losses: one or more of what `as_loss` takes: losses of this package, names, torch's losses, callables. With one
            that is not of this package, each part is called exactly as it is, and a sum over a callable has no
            per-sample form.
        weights: a finite number, which may be negative, for each loss.

    Raises:
        InvalidHyperparameter: if there is no loss, a weight is missing, too many, or not finite.
        LossMismatch: if the losses want predictions or targets of different meaning, or one has reduction="none".

    Source: L. A. Zadeh, "Optimality and non-scalar-valued performance criteria", IEEE Trans. Autom. Control 8 (1963).

    >>> both = weighted_sum(losses=(mse(), huber(delta=1.0)), weights=(1.0, 0.5))
    >>> both(torch.tensor([3.0]), torch.tensor([0.0]))  # 9 + 0.5 · 2.5
    tensor(10.2500)
    """
    given = losses if isinstance(losses, tuple) else None
    if not given:
        raise InvalidHyperparameter(f"weighted_sum was given losses={losses!r}, and expects one or more in a tuple.")
    if not isinstance(weights, tuple) or len(weights) != len(given):
        raise InvalidHyperparameter(
            f"weighted_sum was given weights={weights!r}, and expects a number for each of {len(given)} losses."
        )
    parts = tuple(map(_loss, given))
    numbers = {_weight(i): number("weighted_sum", _weight(i), weight) for i, weight in enumerate(weights)}
    for i, (thing, part) in enumerate(zip(given, parts, strict=True)):
        known = dict(leaves(thing))  # the number of a part given by its name, or of a callable, is part of what it is
        numbers |= {f"{_part(i)}.{name}": value for name, value in part.numbers.items() if name in known}
    wanted = _common(parts, [_predictions(part) for part in parts], PREDICTIONS, "prediction")
    target = _common(parts, [_targets(part) for part in parts], TARGETS, "target")
    _same_parameters(parts)
    leading = tuple(part for part in parts if part.prediction == wanted)
    foreign = any(part.whole is not None for part in parts)
    return Loss(
        name="weighted_sum",
        kind=_most_telling(leading) if _most_telling(leading) != "other" else _most_telling(parts),
        terms=partial(_sum, parts=parts),
        prediction=wanted,
        target=target,
        shapes=leading[0].shapes,
        formula="Σ_i w_i · loss_i",
        reference="Zadeh 1963",
        numbers=numbers,
        reduction=_reduction(parts),
        estimate=next((part.estimate for part in leading if part.estimate is not None), None),
        whole=partial(_as_they_are, parts=parts, weights=weights) if foreign else None,
        written=_written(parts, weights) if foreign else "",
    )


def _most_telling(parts: tuple[Loss, ...]) -> Kind:
    return min((part.kind for part in parts), key=KINDS.index)


def _loss(thing: object) -> Loss:
    if isinstance(thing, Loss) and thing.reduction != "none":
        return thing
    from fallline.losses.wrapped import as_loss  # which knows the catalogue, and so this file

    return as_loss(thing)


def _written(parts: tuple[Loss, ...], weights: tuple[Number, ...]) -> str:
    inside = ", ".join(part.written if part.whole is not None else repr(part) for part in parts)
    comma = "," if len(parts) == 1 else ""
    return f"fl.losses.weighted_sum(losses=({inside}{comma}), weights={weights!r})"


def added(first: object, second: object) -> Loss:
    """The sum of two losses, flat: the parts of sums among them are its parts.

    >>> added(mse(), 0.5 * huber())
    fl.losses.weighted_sum(losses=(fl.losses.mse(), fl.losses.huber()), weights=(1.0, 0.5))
    """
    (losses, weights), (others, more) = _taken_apart(first), _taken_apart(second)
    return weighted_sum(losses=(*losses, *others), weights=(*weights, *more))


def scaled(loss: Loss, factor: Number | Dimension) -> Loss:
    """The loss times a number or a search dimension; a sum's weights are multiplied where they are numbers.

    >>> scaled(2.0 * mse(), 0.5)
    fl.losses.weighted_sum(losses=(fl.losses.mse(),), weights=(1.0,))
    """
    if not isinstance(factor, (Dimension, Tensor)) and (isinstance(factor, bool) or not math.isfinite(factor)):
        raise InvalidHyperparameter(f"A loss was multiplied by {factor!r}, and a finite number is expected.")
    losses, weights = _taken_apart(loss)
    if any(isinstance(each, (Dimension, Tensor)) for each in (*weights, factor)):  # which are not multiplied here
        return weighted_sum(losses=(loss,), weights=(factor,))
    return weighted_sum(losses=losses, weights=tuple(weight * factor for weight in weights))  # type: ignore[operator]


def _taken_apart(loss: object) -> tuple[tuple[object, ...], tuple[Number | Dimension, ...]]:
    if isinstance(loss, Loss) and loss.call is not None and loss.call.function is weighted_sum:
        return loss.call.arguments["losses"], loss.call.arguments["weights"]
    return (loss,), (1.0,)


def _pair(generator: Generator) -> tuple[Tensor, Tensor]:
    prediction = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return prediction, torch.randn(12, 3, generator=generator, dtype=torch.float64) + 0.5 * prediction


_PARTS = (mse(), huber(delta=0.5))

CATALOGUE = (
    LossInfo(
        weighted_sum,
        _pair,
        valid=(
            {"losses": _PARTS, "weights": (1.0, 0.5)},
            {"losses": (huber(delta=2.0), mse(reduction="sum"), 2 * mse()), "weights": (1.0, 0.1, -0.3)},
        ),
        invalid=(
            Invalid({"losses": ()}, "losses=()"),
            Invalid({"weights": (1.0,)}, "weights=(1.0,)"),
            Invalid({"weights": 1.0}, "weights=1.0"),
            Invalid({"weights": (1.0, float("nan"))}, "weight2=nan"),
            Invalid({"weights": (float("inf"), 1.0)}, "weight1=inf"),
            Invalid({"losses": (mse(), mse(reduction="none"))}, "reduction='none'"),
        ),
        sweeps={"weight1": (0.5, 2.0), "weight2": (0.0, 3.0)},
        source="L. A. Zadeh, Optimality and non-scalar-valued performance criteria, IEEE Trans. AC 8 (1963)",
    ),
)
