"""Callables that compute one of torch's losses: a lambda round it, a module whose `forward` calls it, one by hand.

Nothing is known of such a callable but what it returns. It is tried on two small batches of random numbers, of the
shapes and types that it was given, and on what it was given; where it gives each time what a loss of torch's gives, it
is that loss, and the rules for that loss hold for it. Neighbours: `given`, whose `Given` is described anew; `check`,
which asks first of all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fallline.losses.catalogue import registry
from fallline.losses.misuse.computing import _untouched
from fallline.losses.misuse.given import Given

Function: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# A probe holds so many elements at most, and what was given is tried on its first samples only.
_MOST = 1 << 15


@dataclass(frozen=True, eq=False)
class Candidate:
    """A loss that a callable may compute.

    Attributes:
        name: of fallline's maker.
        function: torch's.
        settings: that it was made with.
        inside: a step that the callable takes before, and that the loss takes itself.
        domain: where a prediction must lie for it: "real" numbers or "unit", (0, 1).
    """

    name: str
    function: Function
    settings: Mapping[str, Any]
    inside: str = ""
    domain: Literal["real", "unit"] = "real"

    @property
    def described(self) -> str:
        """For messages."""
        before = {"": "", "sigmoid": " of a sigmoid", "softmax over the batch": " of a softmax over the batch"}
        return self.name + before.get(self.inside, " of a softmax")


@dataclass(frozen=True, eq=False)
class Reading:
    """How a callable may read its arguments before it gives them to the loss."""

    prediction: Callable[[Tensor], Tensor]
    target: Callable[[Tensor], Tensor]


def recognised(given: Given) -> Given:
    """The same, described as the loss that an unknown callable computes; as it was where it computes none of them.

    >>> import torch
    >>> from fallline.losses.misuse.given import given
    >>> def mine(prediction, target):
    ...     return -prediction.log_softmax(1)[range(len(target)), target].mean()
    >>> recognised(given(mine, torch.randn(8, 3), torch.ones(8).long(), None)).name
    'mine (computes cross_entropy)'
    """
    loss, pair = given.loss, given.pair
    if given.known or loss.whole is None or pair is None or not isinstance(given.graph, Tensor):
        return given
    prediction, target = pair
    if not prediction.is_floating_point() or prediction.ndim == 0 or not prediction.numel() or not target.numel():
        return given
    if target.is_complex() or not _small_rows(prediction, target):
        return given
    with torch.inference_mode(False), torch.no_grad(), _untouched(given), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = _found(loss.whole, prediction, target)
            if found is None and prediction.ndim > 1 and prediction.shape[1] == 1 and target.ndim < prediction.ndim:
                found = _found(loss.whole, prediction, target, wider=True)
            return given if found is None else _described(given, *found)
        except Exception:  # a callable may do anything; then it is none of these
            return given


def _small_rows(prediction: Tensor, target: Tensor) -> bool:
    rows = max(1, prediction.shape[0])
    return 3 * max(prediction.numel() // rows, target.numel() // max(1, len(target) if target.ndim else 1)) <= 4 * _MOST


def _found(
    whole: Function, prediction: Tensor, target: Tensor, *, wider: bool = False
) -> tuple[Candidate, Reading, float] | None:
    """The loss, how it is read, and by how much it is multiplied.

    Of a single class every loss is 0, which tells nothing: `wider` tries it with more.
    """
    if target.ndim and len(prediction) != len(target):
        return None
    first = prediction[:1], target[:1] if target.ndim else target
    options = [
        (candidate, reading)
        for reading in _readings(*first)
        for candidate in _candidates(reading.prediction(first[0]), reading.target(first[1]))
    ]
    if not options:
        return None
    generator = torch.Generator().manual_seed(20261122)
    factors: dict[int, float] = {}
    slope: Tensor | None = None
    trial = first
    left = list(range(len(options)))
    for rows, domain in ((5, "unit"), (7, "real")):
        probe, goal = _probe(prediction, target, rows, domain, generator, wider)
        if domain == "unit":
            trial = probe, goal
            value, slope = _with_gradient(whole, probe, goal)
            if value is None or slope is None:
                return None
        else:
            value = _value(whole, probe, goal)
        left = [
            index
            for index in left
            if (options[index][0].domain == "unit" and domain == "real")
            or _agrees(value, _value(*_applied(options[index], probe, goal)), factors, index, 2e-5)
        ]
        if not left:
            return None
    left = [index for index in left if index in factors]
    part, goal = _first_rows(prediction, target)
    if _may_end_the_process(options, left, part, goal):
        pass  # a label out of range ends a process on a GPU: what the probes say is enough
    elif left:
        value = _value(whole, part, goal)
        rounding = 2e-5 if prediction.dtype in (torch.float32, torch.float64) else 2e-2
        left = [
            index
            for index in left
            if _agrees(value, _value(*_applied(options[index], part, goal)), dict(factors), index, rounding)
        ]
    if not left:
        return None
    best = min(left, key=lambda index: (abs(factors[index] - 1) > 1e-4, bool(options[index][0].inside), index))
    ours = _with_gradient(partial(_read, options[best]), *trial)[1]
    if slope is None or ours is None or not torch.allclose(slope, factors[best] * ours, rtol=1e-3, atol=1e-6):
        return None  # through numpy, or detached
    return *options[best], 1.0 if abs(factors[best] - 1) <= 1e-4 else factors[best]


def _agrees(value: float | None, other: float | None, factors: dict[int, float], index: int, rounding: float) -> bool:
    """Whether two values are one, or one is the same multiple of the other as before; both may fail."""
    if value is None or other is None:
        return value is None and other is None
    if not (math.isfinite(value) and math.isfinite(other)):
        return str(value) == str(other)
    if index not in factors:
        if other == 0 or value / other <= 0:
            return False
        factors[index] = value / other
        return True
    return math.isclose(value, factors[index] * other, rel_tol=rounding, abs_tol=1e-7 * max(1.0, factors[index]))


def _value(function: Function, prediction: Tensor, target: Tensor) -> float | None:
    """What a loss gives; None where it fails or gives no number."""
    try:
        value = function(prediction.clone(), target.clone())
    except Exception:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        return None
    return float(value)


def _with_gradient(function: Function, prediction: Tensor, target: Tensor) -> tuple[float | None, Tensor | None]:
    """What a loss gives, and its gradient with respect to the prediction; None where there is none."""
    with torch.enable_grad():
        variable = prediction.detach().clone().requires_grad_()
        try:
            value = function(variable.clone(), target.clone())
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                return None, None
            return float(value), torch.autograd.grad(value.sum(), variable)[0]
        except Exception:
            return None, None


def _applied(option: tuple[Candidate, Reading], prediction: Tensor, target: Tensor) -> tuple[Function, Tensor, Tensor]:
    candidate, reading = option
    return candidate.function, reading.prediction(prediction), reading.target(target)


def _read(option: tuple[Candidate, Reading], prediction: Tensor, target: Tensor) -> Tensor:
    function, part, goal = _applied(option, prediction, target)
    return function(part, goal)


def _probe(
    prediction: Tensor, target: Tensor, rows: int, domain: str, generator: torch.Generator, wider: bool
) -> tuple[Tensor, Tensor]:
    """A few samples of random numbers, of the same shapes and types."""
    lengths = list(prediction.shape)
    if target.ndim:
        lengths[0] = rows
    if wider:
        lengths[1] = 3
    dtype = prediction.dtype if prediction.dtype == torch.float64 else torch.float32
    made = torch.rand(lengths, generator=generator, dtype=dtype)
    made = 0.05 + 0.9 * made if domain == "unit" else 4 * made - 2
    wanted = [rows, *target.shape[1:]] if target.ndim else []
    if target.is_floating_point():
        kept = target.dtype if target.dtype == torch.float64 else torch.float32
        goal = 0.05 + 0.9 * torch.rand(wanted, generator=generator, dtype=kept)
    else:
        classes = 2 if target.shape == prediction.shape or target.dtype == torch.bool else _classes(made, target)
        goal = torch.randint(classes, wanted, generator=generator).to(target.dtype)
    return made.to(prediction.device), goal.to(target.device)


def _classes(prediction: Tensor, target: Tensor) -> int:
    """How many labels a target of indices may hold, so that each candidate can read it."""
    if prediction.ndim == 1:
        return max(1, len(prediction)) if target.ndim == 0 else 2
    last = list(target.shape[1:]) == list(prediction.shape[1:-1]) and prediction.ndim > 2
    first = list(target.shape[1:]) == list(prediction.shape[2:])
    return max(1, min([prediction.shape[-1]] * last + [prediction.shape[1]] * first, default=2))


def _first_rows(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if target.ndim == 0 or prediction.numel() <= _MOST:
        return prediction, target
    count = max(2, _MOST * len(prediction) // prediction.numel())
    return prediction[:count], target[:count]


def _may_end_the_process(
    options: list[tuple[Candidate, Reading]], left: list[int], prediction: Tensor, target: Tensor
) -> bool:
    if not prediction.is_cuda or target.is_floating_point():
        return False
    return any(options[index][0].settings.get("ignore_index") is not None for index in left) and bool(
        ((target < 0) | (target >= _classes(prediction, target))).any()
    )


def _readings(prediction: Tensor, target: Tensor) -> Iterator[Reading]:
    """As they are; and what callables often do first: another type, another shape, the classes to dimension 1."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(prediction.dtype if prediction.dtype == torch.float64 else torch.float32)

    whole = not target.is_floating_point()
    if prediction.shape == target.shape:
        yield Reading(same, converted if whole else same)
    else:
        yield Reading(same, same)
        if prediction.shape == (*target.shape, 1):
            yield Reading(lambda p: p.squeeze(-1), converted if whole else same)
            yield Reading(same, lambda t: converted(t).unsqueeze(-1) if whole else t.unsqueeze(-1))
        if prediction.ndim > 2 and target.shape == prediction.shape[:-1] and whole:
            yield Reading(lambda p: p.movedim(-1, 1), same)
            if target.ndim == 2 and target.shape[1] > 1:  # each position foretells the next one
                yield Reading(lambda p: p[:, :-1].movedim(-1, 1), lambda t: t[:, 1:])
        if target.shape == (*prediction.shape, 1):
            yield Reading(same, lambda t: t.squeeze(-1))
        if prediction.ndim == 2 and target.shape == (len(prediction), 1) and whole and prediction.shape[1] > 1:
            yield Reading(same, lambda t: t.squeeze(1))
    if target.is_floating_point() and prediction.ndim == target.ndim + 1 and prediction.shape[-1] != 1:
        yield Reading(same, lambda t: t.long())


def _candidates(prediction: Tensor, target: Tensor) -> Iterator[Candidate]:
    """The losses that could be computed of such tensors."""
    whole = not target.is_floating_point() and target.dtype != torch.bool
    if (
        whole
        and prediction.ndim == target.ndim + 1
        and [*prediction.shape[:1], *prediction.shape[2:]] == list(target.shape)
    ):
        yield from _of_classes(prediction)
    elif target.is_floating_point() and target.ndim and prediction.ndim:
        yield from _of_elements(prediction, target)


def _of_classes(prediction: Tensor) -> Iterator[Candidate]:
    if prediction.shape[1] < 1:
        return
    for ignore in (-100, 0, -1, 255):
        for reduction in ("mean", "sum"):
            settings: dict[str, Any] = {"ignore_index": ignore, "reduction": reduction}
            yield Candidate("cross_entropy", partial(functional.cross_entropy, **settings), settings)
            yield Candidate("nll", partial(functional.nll_loss, **settings), settings)
    settings = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1}
    yield Candidate("cross_entropy", partial(functional.cross_entropy, **settings), settings)
    plain: dict[str, Any] = {"ignore_index": -100, "reduction": "mean"}
    cross, likelihood = functional.cross_entropy, functional.nll_loss
    yield Candidate("cross_entropy", lambda p, t: cross(p.softmax(1), t), plain, "softmax")
    yield Candidate("cross_entropy", lambda p, t: cross(p.softmax(0), t), plain, "softmax over the batch")
    yield Candidate("cross_entropy", lambda p, t: likelihood(p.log_softmax(0), t), plain, "softmax over the batch")
    yield Candidate("cross_entropy", lambda p, t: cross(p.sigmoid(), t), plain, "sigmoid")
    yield Candidate("cross_entropy", lambda p, t: likelihood(p.softmax(1), t), plain, "probabilities")
    if prediction.ndim == 2:
        yield Candidate("multi_margin", functional.multi_margin_loss, {"reduction": "mean"})


def _of_elements(prediction: Tensor, target: Tensor) -> Iterator[Candidate]:
    try:
        torch.broadcast_tensors(prediction, target)
    except RuntimeError:
        return
    alike = prediction.shape == target.shape
    for reduction in ("mean", "sum"):
        made: dict[str, Any] = {"reduction": reduction}
        yield Candidate("mse", partial(functional.mse_loss, **made), made)
        yield Candidate("l1", partial(functional.l1_loss, **made), made)
        yield Candidate("smooth_l1", partial(functional.smooth_l1_loss, **made), made)
        if alike:
            logits = partial(functional.binary_cross_entropy_with_logits, **made)
            yield Candidate("binary_cross_entropy_with_logits", logits, made)
            yield Candidate("binary_cross_entropy", partial(functional.binary_cross_entropy, **made), made, "", "unit")
        yield Candidate("soft_margin", partial(functional.soft_margin_loss, **made), made)
        yield Candidate("poisson_nll", partial(functional.poisson_nll_loss, **made), {**made, "log_input": True})
    if not alike:
        return
    for reduction in ("batchmean", "sum", "mean"):
        made = {"reduction": reduction}
        yield Candidate("kl_div", partial(functional.kl_div, **made), {**made, "log_target": False})
    made = {"reduction": "mean"}
    yield Candidate(
        "binary_cross_entropy_with_logits",
        lambda p, t: functional.binary_cross_entropy_with_logits(p.sigmoid(), t),
        made,
        "sigmoid",
    )
    if prediction.ndim >= 2 and prediction.shape[1] >= 2:
        made = {"reduction": "mean"}
        yield Candidate("cross_entropy", functional.cross_entropy, made)
        yield Candidate("cross_entropy", lambda p, t: functional.cross_entropy(p.softmax(1), t), made, "softmax")
        axis = -1 if prediction.ndim > 2 else 1
        yield Candidate(
            "cross_entropy",
            lambda p, t: functional.kl_div(p.softmax(axis), t, reduction="batchmean"),
            {"reduction": "mean"},
            "probabilities",
        )


def _described(given: Given, candidate: Candidate, reading: Reading, factor: float) -> Given:
    """What was given, as the loss reads it, and the loss as the one that it is, computed as torch does."""
    settings = {name: value for name, value in candidate.settings.items() if value is not None}
    function = candidate.function
    if factor != 1:  # it may undo a sum, or a mean
        settings["reduction"] = "batchmean" if candidate.name == "kl_div" else "mean"
        function = partial(_multiple, candidate.function, factor)
    ours = registry[candidate.name](**settings)
    assert isinstance(given.graph, Tensor)
    assert given.pair is not None
    with torch.inference_mode(False), torch.enable_grad():
        graph = reading.prediction(given.graph)
    name = f"{given.name} (computes {candidate.described})"
    return replace(
        given,
        loss=replace(ours, name=name, kin=ours.name, whole=function, call=given.loss.call, written=given.loss.written),
        prediction=reading.prediction(given.pair[0]),
        target=reading.target(given.pair[1]),
        graph=graph,
        settings=settings,
        inside=candidate.inside,
    )


def _multiple(function: Function, factor: float, prediction: Tensor, target: Tensor) -> Tensor:
    return factor * function(prediction, target)
