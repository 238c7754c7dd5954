"""A loss that falls when predictions get worse: a forgotten minus, a similarity that is minimised.

Where the target is a real number, the evidence is unanimous: for every sample of the batch a small step of the
prediction towards its target raises the loss, and so it goes on either side of the targets. A sum over pairs, a critic
or a ranking may do so for some samples; for all of them only the wrong sign does. Of labels that is no evidence:
distances, energies, complementary labels and negative rewards push away from them on purpose. There the loss has to be
minus a loss that is known, but for a factor and a constant.
Neighbours: `computing`, which computes values and gradients; `scores`, which knows what is minus what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fallline.losses.base import Prediction
from fallline.losses.misuse.computing import Computed
from fallline.losses.misuse.finding import Finding, note, warning
from fallline.losses.misuse.given import Given
from fallline.losses.misuse.scores import PROBES, score_of

_POINTWISE = frozenset(
    {
        Prediction.ANYTHING,
        Prediction.LOGITS,
        Prediction.LOG_PROBABILITIES,
        Prediction.CLASS_SCORES,
        Prediction.YES_LOGITS,
        Prediction.PROBABILITIES,
        Prediction.SCORES,
        Prediction.REAL,
    }
)
_FEWEST = 12


@dataclass(frozen=True, eq=False)
class Step:
    """A step of the prediction towards the target: by samples, how much the loss changes per unit of it.

    `labels` says whether the target is a label, and not a number that the prediction should become.
    """

    towards: Tensor
    slopes: Tensor
    labels: bool


def direction_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """Whether the loss rewards errors."""
    prediction, target = given.prediction, given.target
    if given.wants not in _POINTWISE or not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        return
    if outcome.value is None or not outcome.whole or len(outcome.gradients) != 1 or outcome.gradients[0] is None:
        return
    if any(part.requires_grad for part in given.target_graph):
        return  # a critic or a ranking of two outputs: neither is what the other should become
    gradient = outcome.gradients[0]
    yield from _endless(given, outcome, prediction, target, gradient)
    steps = _steps(prediction.detach(), target, gradient)
    slopes = steps[0].slopes if steps else gradient.new_zeros(0)
    if len(slopes) < _FEWEST or float(slopes.sum()) <= 1e-3 * float(slopes.abs().sum()):
        return
    if steps[0].labels:
        found = list(_minus_a_known_loss(given, outcome, prediction, target))
    else:
        found = list(_for_each(given, outcome, prediction, target, steps[0]))
    yield from found or _highest_when_right(given, outcome, prediction, target)


def _minus_a_known_loss(given: Given, outcome: Computed, prediction: Tensor, target: Tensor) -> Iterator[Finding]:
    try:
        score = score_of(outcome.again, prediction, target)
    except Exception:  # a callable that is made for one batch
        return
    if score:
        yield warning(
            "rewards-errors",
            f"{given.name} gave {_number(outcome):.4g}; for {PROBES} predictions it was {score}.",
            "It falls as predictions get worse.",
            "return -value  # a minus, or 1 - similarity, is missing",
        )


def _number(outcome: Computed) -> float:
    return float(outcome.value) if outcome.value is not None else math.nan


def _for_each(given: Given, outcome: Computed, prediction: Tensor, target: Tensor, step: Step) -> Iterator[Finding]:
    """Unanimous evidence: for every sample, a step towards the target raises the loss, from either side of it."""
    if not _unanimous(step.slopes):
        return
    goal = prediction + step.towards
    try:
        values = {
            length: float(outcome.again(goal - length * step.towards)) for length in (-2, -1, -0.5, 0.5, 1, 2, 30, 300)
        }
    except Exception:
        return
    margin = 1e-4 * max(abs(values[length]) for length in (-2, 2))
    for lengths in ((0.5, 1, 2), (-0.5, -1, -2)):
        if not all(values[near] - values[far] > margin for near, far in pairwise(lengths)):
            return
    make = note if min(values.values()) >= 0 else warning  # what is no target may be kept away from
    yield make(
        "rewards-errors",
        f"{given.name} gave {values[1]:.4g}; half-way to the targets it is {values[0.5]:.4g}, and twice as far from "
        f"them {values[2]:.4g}; towards its target it rises for each of {len(step.slopes)}.",
        "It falls as predictions get worse" + (", without end." if values[300] < values[30] < 0 else "."),
        "return -value  # a minus, or 1 - similarity, is missing",
    )


def _unanimous(slopes: Tensor) -> bool:
    return len(slopes) >= _FEWEST and bool((slopes > 0).all())


def _highest_when_right(given: Given, outcome: Computed, prediction: Tensor, target: Tensor) -> Iterator[Finding]:
    """A score of the whole batch, such as a correlation: highest for the targets, lower with noise on them."""
    if given.known or target.shape != prediction.shape or not _FEWEST <= target.numel() <= 1 << 16:
        return
    spread = float(target.double().std()) if target.is_floating_point() else 0.0
    binary = bool(((target == 0) | (target == 1)).all()) or bool(((target == -1) | (target == 1)).all())
    if spread == 0 or not math.isfinite(spread) or binary or outcome.value is None:
        return
    generator = torch.Generator().manual_seed(0)
    ladders = []
    try:
        for _ in range(3):
            noise = spread * torch.randn(target.shape, generator=generator, dtype=torch.float64)
            noise = noise.to(prediction.device, prediction.dtype)
            probes = [target.to(prediction.dtype) + size * noise for size in (0.0, 0.1, 0.5, 2.0)]
            ladders.append([float(outcome.again(probe)) for probe in probes])
    except Exception:
        return
    here, best = float(outcome.value), ladders[0][0]
    margin = 1e-5 * max(abs(each) for each in ladders[0])
    falls = all(math.isfinite(ladder[0]) and all(a - b > margin for a, b in pairwise(ladder)) for ladder in ladders)
    if falls and here < best:
        # What is never negative may also push away on purpose.
        opposite = float(outcome.again(-target.to(prediction.dtype)))
        yield (warning if min(here, opposite, *(min(ladder) for ladder in ladders)) < 0 else note)(
            "rewards-errors",
            f"{given.name} gave {here:.4g}; for the targets themselves it is {best:.4g}, and with more and more noise "
            f"on them {', '.join(f'{each:.4g}' for each in ladders[0][1:])}.",
            "It falls as predictions get worse: it is a score, and what is minimised is its opposite.",
            "return 1 - value  # or -value",
        )


def _endless(
    given: Given, outcome: Computed, prediction: Tensor, target: Tensor, gradient: Tensor
) -> Iterator[Finding]:
    """A mean of prediction − target: the same push for every element, wherever its target is."""
    if given.known or target.shape != prediction.shape or prediction.numel() < _FEWEST:
        return
    if not target.is_floating_point() or _one_sided(target) or not _one_sided(gradient):
        return
    here = float(outcome.value) if outcome.value is not None else 0.0
    side = -gradient.sign()
    try:
        far, farther = (float(outcome.again(prediction + length * side)) for length in (1e3, 1e6))
        shifted = float(outcome.against(prediction, target + 1))
    except Exception:
        return
    if far < -100 and farther < 100 * far and abs(shifted - here) > 1e-3:
        yield warning(
            "rewards-errors",
            f"{given.name} gave {here:.4g}, and {farther:.4g} for predictions {1e6:g} further "
            f"{'down' if float(side.flatten()[0]) < 0 else 'up'}; its gradient is the same for every target.",
            "It has no lower end: differences of both signs cancel, and a square or an absolute value is missing.",
            "return (prediction - target).square().mean()",
        )


def _one_sided(target: Tensor) -> bool:
    return bool((target == target.flatten()[0]).all())


def _steps(prediction: Tensor, target: Tensor, gradient: Tensor) -> list[Step]:
    whole = not target.is_floating_point()
    if target.ndim == prediction.ndim - 1 and prediction.ndim >= 2 and prediction.shape[1] >= 2 and whole:
        return _towards_class(prediction, target, gradient)
    if target.shape != prediction.shape:
        if target.numel() != prediction.numel() or target.squeeze().shape != prediction.squeeze().shape:
            return []
        target = target.reshape(prediction.shape)
    if prediction.ndim == 0 or target.is_complex() or prediction.is_complex():
        return []
    goal = target.to(prediction.dtype)
    if bool(((target == 0) | (target == 1)).all()):
        return [_step(2 * goal - 1, gradient, labels=True)]
    if bool(((target == -1) | (target == 1)).all()):
        return [_step(goal, gradient, labels=True)]
    away = goal - prediction
    return [_step(away, gradient, labels=whole)] if bool(torch.isfinite(away).all()) else []


def _step(towards: Tensor, gradient: Tensor, *, labels: bool) -> Step:
    each = (towards * gradient).double()
    if towards.ndim == 1 or bool((each > 0).all()):
        return Step(towards, each[towards != 0].flatten(), labels)
    moved = towards.abs().flatten(1).sum(1) > 0
    return Step(towards, each.flatten(1).sum(1)[moved], labels)


def _towards_class(prediction: Tensor, target: Tensor, gradient: Tensor) -> list[Step]:
    for axis in (1, prediction.ndim - 1):
        if list(target.shape) == [n for d, n in enumerate(prediction.shape) if d != axis]:
            break
    else:
        return []
    inside = (target >= 0) & (target < prediction.shape[axis])
    if not bool(inside.any()) or target.is_complex():
        return []
    index = torch.where(inside, target, 0).long().unsqueeze(axis)
    chosen = gradient.gather(axis, index).squeeze(axis)[inside].double()
    towards = torch.zeros_like(prediction).scatter(axis, index, inside.to(prediction.dtype).unsqueeze(axis))
    return [Step(towards, chosen[chosen != 0] if bool(chosen.any()) else chosen, True)]
