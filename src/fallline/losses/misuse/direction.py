"""A loss that falls when predictions get worse: a forgotten minus, a similarity that is minimised.

The evidence is unanimous: for every sample of the batch, a small step of the prediction towards its target raises the
loss. A sum over pairs, a critic or a ranking may do so for some samples; for all of them only the wrong sign does.
Neighbours: `computing`, which computes values and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from fallline.losses.base import Prediction
from fallline.losses.misuse.computing import Computed
from fallline.losses.misuse.finding import Finding, error, note, warning
from fallline.losses.misuse.given import Given

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
    """A step of the prediction towards the target: by samples, how much the loss changes per unit of it."""

    towards: Tensor
    slopes: Tensor
    what: str


def direction_findings(given: Given, outcome: Computed) -> Iterator[Finding]:
    """Whether the loss rewards errors."""
    prediction, target = given.prediction, given.target
    if given.wants not in _POINTWISE or not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        return
    if outcome.value is None or not outcome.whole or len(outcome.gradients) != 1 or outcome.gradients[0] is None:
        return
    if any(part.requires_grad for part in given.target_graph):
        return  # a critic or a ranking of two outputs: neither is what the other should become
    yield from _endless(given, outcome, prediction, target, outcome.gradients[0])
    found = list(_for_each(given, outcome, prediction, target, outcome.gradients[0]))
    yield from found or _highest_when_right(given, outcome, prediction, target)


def _for_each(
    given: Given, outcome: Computed, prediction: Tensor, target: Tensor, gradient: Tensor
) -> Iterator[Finding]:
    """Unanimous evidence: for every sample, a step towards the target raises the loss."""
    steps = _steps(prediction.detach(), target, gradient)
    if not steps or not _unanimous(steps[0].slopes):
        return
    for other in steps[1:]:  # towards the numbers 0 and 1 themselves
        if not _unanimous(other.slopes) and (_one_sided(target) or bool((other.slopes < 0).all())):
            return
    step = steps[0]
    size = 1e-2
    try:
        nearer = float(outcome.again(prediction + size * step.towards))
        further = float(outcome.again(prediction - size * step.towards))
        far, farther = (float(outcome.again(prediction - length * step.towards)) for length in (30, 300))
    except Exception:
        return
    here = float(outcome.value) if outcome.value is not None else math.nan
    if not further < here < nearer:
        return
    count = len(step.slopes)
    negated = _negated(prediction, target, here, outcome)
    endless = math.isfinite(farther) and farther < far < 0 and farther < here
    make = error if negated and endless and count >= 16 else warning
    never_negative = min(here, nearer, further, far, farther) >= 0
    if never_negative and (float(prediction.min()) >= 0 if len(steps) > 1 else target.is_floating_point()):
        make = note  # of distances, 1 may stand for near; and what is no target may be kept away from
    seen = (
        f"{given.name} gave {here:.4g}; a small step of every prediction {step.what} raises it to {nearer:.4g}, and a "
        f"step away lowers it to {further:.4g}, for each of {count} of them."
    )
    why = "It falls as predictions get worse"
    why += f": it is minus {negated}, and has no lower bound." if negated else ", without end." if endless else "."
    yield make("rewards-errors", seen, why, "return -value  # a minus, or 1 - similarity, is missing")


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
    falls = all(math.isfinite(ladder[0]) and all(a > b for a, b in pairwise(ladder)) for ladder in ladders)
    here, best = float(outcome.value), ladders[0][0]
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
    if prediction.ndim == 0 or target.is_complex():
        return []
    goal = target.to(prediction.dtype)
    binary = bool(((target == 0) | (target == 1)).all())
    signs = bool(((target == -1) | (target == 1)).all())
    away = goal - prediction
    steps = [_step(away, gradient, "towards its target")]
    if binary or signs:
        side = 2 * goal - 1 if binary else goal
        steps.insert(0, _step(side, gradient, "to the side of its target"))
    if not bool(torch.isfinite(away).all()):
        return []
    return steps


def _step(towards: Tensor, gradient: Tensor, what: str) -> Step:
    each = (towards * gradient).double()
    if towards.ndim == 1 or bool((each > 0).all()):
        return Step(towards, each[towards != 0].flatten(), what)
    moved = towards.abs().flatten(1).sum(1) > 0
    return Step(towards, each.flatten(1).sum(1)[moved], what)


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
    return [Step(towards, chosen[chosen != 0] if bool(chosen.any()) else chosen, "towards its class")]


def _negated(prediction: Tensor, target: Tensor, here: float, outcome: Computed) -> str:
    """The name of the usual loss whose negative this is, or ""."""
    named: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross_entropy": functional.cross_entropy,
        "nll": functional.nll_loss,
        "mse": functional.mse_loss,
        "l1": functional.l1_loss,
        "smooth_l1": functional.smooth_l1_loss,
        "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
    }
    moved = prediction.clone()
    moved[::2] += 0.1
    moved.flatten()[0] += 0.2
    there = float(outcome.again(moved))
    goal = target
    if target.ndim and target.numel() == prediction.numel() and target.ndim != prediction.ndim - 1:
        goal = target.reshape(prediction.shape).to(prediction.dtype)
    for name, function in named.items():
        if goal.shape != prediction.shape and name not in ("cross_entropy", "nll"):
            continue
        try:
            one, other = float(function(prediction, goal)), float(function(moved, goal))
        except (RuntimeError, ValueError, IndexError):
            continue
        if not (math.isfinite(one) and math.isfinite(other)) or one <= 0 or one == other:
            continue
        factor = here / one
        if factor < 0 and math.isclose(there, factor * other, rel_tol=1e-4):
            return name
    return ""
