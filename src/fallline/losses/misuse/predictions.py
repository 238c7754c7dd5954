"""What the numbers of a prediction are: logits, probabilities or their logarithms, where something else is expected.

Neighbours: `sums` says whether numbers are probabilities; `targets` judges the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from fallline.losses.base import Prediction, Target
from fallline.losses.misuse.finding import Finding, error, note, warning
from fallline.losses.misuse.given import Given, extremes, tensors, thinned
from fallline.losses.misuse.origin import origin
from fallline.losses.misuse.sums import Sums, log_probabilities, probabilities, sigmoid_odds

LOGITS_FIX = "prediction = logits  # as the last linear layer gives them, without the softmax"


def prediction_findings(given: Given) -> Iterator[Finding]:
    """What is wrong with the values of the prediction."""
    prediction = given.first
    if prediction is None or not prediction.is_floating_point() or prediction.numel() == 0:
        return
    low, high = given.prediction_range
    if math.isnan(low) or math.isnan(high):
        return  # `computed` reports it
    if given.inside:
        yield _inside(given)
        return
    elementwise = given.expects == Target.CLASSES_OR_YES_NO and given.pair is not None and _alike(*given.pair)
    if given.wants == Prediction.LOGITS and elementwise:
        yield from _yes_logits(given, prediction)
    elif given.wants == Prediction.LOGITS and prediction.ndim >= 2 and prediction.shape[1] >= 2:
        yield from _logits(given, prediction)
    elif given.wants in (Prediction.YES_LOGITS, Prediction.THRESHOLD_LOGITS):
        yield from _yes_logits(given, prediction)
    elif given.wants == Prediction.SCORES:
        yield from _scores(given, prediction)
    elif given.wants == Prediction.PROBABILITIES:
        yield from _yes_probabilities(given, prediction)
    elif given.wants == Prediction.LOG_PROBABILITIES and prediction.ndim >= 2:
        yield from _log_probabilities(given, prediction)
    elif given.wants == Prediction.LOG_DENSITIES and prediction.ndim >= 1:
        yield from _log_densities(given, prediction)
    elif given.wants == Prediction.POSITIVE:
        yield from _positive(given, prediction)
    elif given.wants == Prediction.LOG_RATES:
        yield from _log_rates(given, prediction)
    elif given.wants == Prediction.DISTANCES:
        yield from _distances(given)
    elif given.wants == Prediction.DISTRIBUTION:
        yield from _spread(given)


def _inside(given: Given) -> Finding:
    """A step inside a callable that the loss takes once more, or that lacks its logarithm."""
    code, why, fix = {
        "softmax": (
            "double-softmax",
            "The cross-entropy takes the softmax itself; taken twice, it cannot come near 0 and learns slowly.",
            "torch.nn.functional.cross_entropy(prediction, target)  # of the logits, without a softmax",
        ),
        "softmax over the batch": (
            "softmax-axis",
            "The softmax is taken over dimension 0, the batch; the classes stand in dimension 1.",
            "torch.nn.functional.cross_entropy(prediction, target)  # or log_softmax(dim=1)",
        ),
        "sigmoid": (
            "double-sigmoid",
            "The loss takes a sigmoid, or a softmax, itself; taken twice, it can never become sure.",
            "prediction = logits  # without the sigmoid",
        ),
        "probabilities": (
            "not-log-probabilities",
            "Log-probabilities are expected; without the logarithm it hardly punishes a sure mistake.",
            "prediction = torch.nn.functional.log_softmax(logits, dim=1)  # instead of softmax",
        ),
    }[given.inside]
    return warning(code, f"{given.name} gives what that gives, on random numbers too.", why, fix)


def _alike(prediction: Tensor, target: Tensor) -> bool:
    return prediction.shape == target.shape


def _other_axes(prediction: Tensor, axis: int) -> list[tuple[int, ...]]:
    """The axes, and sets of axes, over which a softmax may have been taken instead."""
    others = [d for d in range(prediction.ndim) if d != axis % prediction.ndim]
    single = [(d,) for d in others if prediction.shape[d] >= 2]
    space = [d for d in others if d != 0]
    several = [each for count in (2, 3) for each in combinations(space, count)]
    return [*single, *several, tuple(range(prediction.ndim))]


def _words(axes: tuple[int, ...], prediction: Tensor) -> str:
    if len(axes) == prediction.ndim:
        return "all of it"
    if axes == (0,):
        return "dimension 0, the batch"
    return f"dimension{'s' if len(axes) > 1 else ''} {' and '.join(map(str, axes))}"


def _logits(given: Given, prediction: Tensor) -> Iterator[Finding]:
    bounds = given.prediction_range
    axis = given.class_axis
    rows = probabilities(prediction, axis, bounds)
    if rows:
        yield from _softmaxed(given, rows, "class probabilities", LOGITS_FIX)
        return
    for axes in _other_axes(prediction, axis) if bounds[0] >= 0 else []:
        found = probabilities(prediction, axes, bounds)
        if found and not found.uniform and not found.certain and (found.rows > 1 or prediction.numel() >= 8):
            yield error(
                "softmax-axis",
                f"{given.name} was given a prediction whose values over {_words(axes, prediction)}, {found.seen}.",
                f"A softmax was taken over the wrong axis; the classes stand in dimension {axis}, and the loss takes "
                "the softmax over them itself.",
                LOGITS_FIX,
            )
            return
    logs = log_probabilities(prediction, axis, bounds) if bounds[1] <= 0.1 else None
    if logs:
        yield note(
            "log-softmax-twice",
            f"{given.name} was given a prediction that is a log-softmax: {logs.rows} rows of exponentials "
            f"sum to 1 (their logarithms are within {logs.off:.0e} of 0).",
            "The loss takes the log-softmax itself; taken twice it is the same, and only costs time.",
            LOGITS_FIX,
        )
        return
    for axes in _other_axes(prediction, axis) if bounds[1] <= 0.1 else []:
        found = log_probabilities(prediction, axes, bounds)
        if found and not found.uniform and found.rows > 1:
            yield error(
                "softmax-axis",
                f"{given.name} was given a prediction that is a log-softmax over {_words(axes, prediction)}: "
                f"{found.rows} sums of exponentials are 1.",
                f"The classes stand in dimension {axis}.",
                LOGITS_FIX,
            )
            return
    yield from _sigmoid(given, prediction, LOGITS_FIX, "softmax")


def _softmaxed(given: Given, rows: Sums, what: str, fix: str) -> Iterator[Finding]:
    seen = f"{given.name} was given a prediction whose {rows.rows} row{'s each' * (rows.rows > 1)} {rows.seen}: {what}."
    why = "It expects logits and takes the softmax itself; taken twice, the loss cannot come near 0 and learns slowly."
    if rows.certain:
        seen = f"{given.name} was given a prediction of {rows.rows} rows that are 0 except for a single 1."
        yield warning("double-softmax", seen, "A softmax, or an argmax, was taken before; logits are expected.", fix)
    elif rows.uniform:
        if 1 / rows.high > 2.5:
            yield warning("double-softmax", seen, why, fix)
    elif rows.rows == 1:
        yield warning("double-softmax", seen, why, fix)
    else:
        yield error("double-softmax", seen, why, fix)


def _yes_logits(given: Given, prediction: Tensor) -> Iterator[Finding]:
    low, high = given.prediction_range
    fix = "prediction = logits  # without the sigmoid"
    if prediction.ndim >= 2 and prediction.shape[1] >= 2:
        rows = probabilities(prediction, 1, (low, high))
        if rows and not rows.uniform and not rows.certain:
            yield from _softmaxed(given, rows, "a softmax, to which the loss adds a sigmoid", fix)
            return
    yield from _sigmoid(given, prediction, fix, "sigmoid")


def _scores(given: Given, prediction: Tensor) -> Iterator[Finding]:
    for found in _sigmoid(given, prediction, "prediction = logits  # without the sigmoid", "sign"):
        yield warning(found.code, found.seen, found.why, found.fix)


def _sigmoid(given: Given, prediction: Tensor, fix: str, taken: str) -> Iterator[Finding]:
    """Probabilities of yes where the loss takes a sigmoid (or a softmax, or the sign) itself."""
    low, high = given.prediction_range
    if low < 0 or high > 1 or high - low < 0.01 or prediction.numel() < 2:
        return
    if prediction.numel() < 16 and (taken != "sigmoid" or origin(given.graph) != "sigmoid"):
        return  # so few lie there by chance, unless their gradient tells where they come from
    part = thinned(prediction)
    if float((part == 0).double().mean()) > 0.1 and not _only_zeros_and_ones(part):
        return  # a ReLU, whose outputs happen to be small
    count = prediction.numel()
    odds = sigmoid_odds(part)
    mean = float(part.double().mean())
    strong = odds < -4 and count >= 64 and high - low > 0.2
    about_half = count >= 64 and abs(mean - 0.5) < 0.08 and float(part.double().std()) > 0.01
    made = origin(given.graph)
    if made == "linear" or not (made == "sigmoid" or strong or odds < -1.3 or about_half):
        return
    make = error if (strong or (made == "sigmoid" and count >= 16)) and taken == "sigmoid" else warning
    effects = {
        "sigmoid": "The loss takes the sigmoid itself; taken twice, no sample can be called a clear no, and gradients "
        "are small.",
        "softmax": "The loss takes a softmax over logits of any size; from values between 0 and 1 it can never "
        "become sure.",
        "sign": "Scores of yes should be positive and those of no negative; a probability is never negative.",
    }
    yield make(
        "double-sigmoid",
        f"{given.name} was given a prediction of {count} values that all lie in [{low:.3g}, {high:.3g}] (mean "
        f"{mean:.3g}): they {'come out of a sigmoid' if made == 'sigmoid' else 'look like probabilities'}.",
        effects[taken],
        fix,
    )


def _only_zeros_and_ones(part: Tensor) -> bool:
    return bool(((part == 0) | (part == 1)).all())


def _yes_probabilities(given: Given, prediction: Tensor) -> Iterator[Finding]:
    low, high = given.prediction_range
    slack = 1e-6 if prediction.dtype in (torch.float32, torch.float64) else 1e-2
    if low >= 0 and high <= 1 + slack * (not given.foreign):
        single = prediction.ndim >= 2 and prediction.shape[1] == 1 and prediction.numel() >= 4
        if low == high == 1 and single and given.target_range[0] < 1:
            yield error(
                "one-class",
                f"{given.name} was given {prediction.numel()} probabilities that are all exactly 1, from one output.",
                "A softmax over a single output is always 1, whatever the model does; yes or no takes a sigmoid.",
                "loss = torch.nn.BCEWithLogitsLoss()  # on the logits, without the softmax",
            )
        return
    if high <= 1e-6:
        yield error(
            "not-probabilities",
            f"{given.name} was given a prediction with values from {low:.3g} to {high:.3g}, and expects probabilities "
            "from 0 to 1.",
            "These look like log-probabilities.",
            "loss = torch.nn.BCEWithLogitsLoss()  # on logits; or prediction.exp()",
        )
        return
    yield error(
        "not-probabilities",
        f"{given.name} was given a prediction with values from {low:.3g} to {high:.3g}, and expects probabilities from "
        "0 to 1.",
        "These look like logits, of which there is no logarithm where they are negative. Use "
        "binary_cross_entropy_with_logits for outputs without a sigmoid.",
        "loss = torch.nn.BCEWithLogitsLoss()  # or prediction.sigmoid()",
    )


def _log_probabilities(given: Given, prediction: Tensor) -> Iterator[Finding]:
    axis = given.class_axis
    bounds = low, high = given.prediction_range
    fix = f"prediction = torch.nn.functional.log_softmax(logits, dim={axis})"
    if given.expects != Target.SEQUENCES:
        fix += "  # or cross_entropy on the logits"
    rows = probabilities(prediction, axis, bounds)
    head = (
        f"{given.name} was given a prediction with values from {low:.3g} to {high:.3g}, and expects log-probabilities"
    )
    if rows:
        yield error(
            "not-log-probabilities",
            f"{head}: its {rows.rows} rows {rows.seen}, which makes them probabilities.",
            "The loss becomes −p instead of −log p: it is bounded, and hardly punishes a sure mistake.",
            f"prediction = torch.nn.functional.log_softmax(logits, dim={axis})",
        )
        return
    tolerance = 1e-3 if prediction.dtype in (torch.float32, torch.float64) else 5e-2
    if high > tolerance:
        positive = float((thinned(prediction) > tolerance).double().mean())
        yield error(
            "not-log-probabilities",
            f"{head}, which are never above 0 ({positive:.0%} are).",
            "These look like logits: the loss falls without end as they grow.",
            fix,
        )
        return
    found = log_probabilities(prediction, axis, bounds)
    if found or (found.off <= 2e-2 and found.rows):
        return
    for axes in _other_axes(prediction, axis):
        other = log_probabilities(prediction, axes, bounds)
        if other and not other.uniform and other.rows > 1:
            yield error(
                "softmax-axis",
                f"{given.name} was given log-probabilities over {_words(axes, prediction)} ({other.rows} sums of "
                "exponentials are 1), and expects them over the classes.",
                f"The classes stand in dimension {axis}.",
                fix,
            )
            return
    totals = thinned(prediction).float().logsumexp(axis)
    if float((totals.abs() > 0.05).float().mean()) > 0.8 and not bool((prediction == -math.inf).any()):
        yield warning(
            "not-log-probabilities",
            f"{head}: the exponentials of each row sum to {float(totals.exp().min()):.3g} up to "
            f"{float(totals.exp().max()):.3g} instead of 1.",
            "These are not normalised, so that the loss can fall without the right class becoming more likely.",
            fix,
        )


def _log_densities(given: Given, prediction: Tensor) -> Iterator[Finding]:
    bounds = low, high = given.prediction_range
    every: list[tuple[int, ...]] = [(d,) for d in range(prediction.ndim) if prediction.shape[d] >= 2]
    every += [tuple(range(1, prediction.ndim)), tuple(range(prediction.ndim))] if prediction.ndim > 1 else []
    fix = "prediction = torch.nn.functional.log_softmax(logits, dim=-1)"
    head = (
        f"{given.name} was given a prediction with values from {low:.3g} to {high:.3g}, and expects log-probabilities"
    )
    for axes in reversed(every):
        found = probabilities(prediction, axes, bounds)
        if found:
            yield error(
                "not-log-probabilities",
                f"{head}: over {_words(axes, prediction)} its values {found.seen}, which makes them probabilities.",
                "The divergence of a logarithm is taken; of probabilities it is another number, that may be negative.",
                "prediction = prediction.log()  # or log_softmax instead of softmax",
            )
            return
    tolerance = 1e-3 if prediction.dtype in (torch.float32, torch.float64) else 5e-2
    if high > tolerance:
        yield error(
            "not-log-probabilities",
            f"{head}, which are never above 0.",
            "These look like logits: the value is no divergence, and may be negative.",
            fix,
        )
        return
    for axes in every:
        if axes == (0,) and prediction.ndim > 1:
            continue
        found = log_probabilities(prediction, axes, bounds)
        if found or (found.rows and found.off < 2e-2):
            return
    if prediction.ndim > 1:
        batch = log_probabilities(prediction, 0, bounds)
        if batch and batch.rows > 1 and len(prediction) > 1 and not batch.uniform:
            yield error(
                "softmax-axis",
                f"{given.name} was given log-probabilities over dimension 0, the batch ({batch.rows} sums of "
                "exponentials are 1).",
                "Each sample should have probabilities of its own.",
                fix,
            )
            return
    if not bool((prediction == -math.inf).any()):
        yield warning(
            "not-log-probabilities",
            f"{head}; their exponentials sum to 1 along no axis.",
            "Of what is not normalised the divergence can be negative.",
            fix,
        )


def _positive(given: Given, prediction: Tensor) -> Iterator[Finding]:
    low, high = given.prediction_range
    if low < 0:
        yield error(
            "domain",
            f"{given.name} was given a prediction with values from {low:.3g} to {high:.3g}, and expects none below 0.",
            "The logarithm or power of a negative number is NaN.",
            "prediction = torch.nn.functional.softplus(prediction)",
        )


def _log_rates(given: Given, prediction: Tensor) -> Iterator[Finding]:
    low, high = given.prediction_range
    most = 88.0 if prediction.dtype != torch.float64 else 709.0
    if high > most:
        yield error(
            "domain",
            f"{given.name} was given logarithms of rates up to {high:.3g}.",
            f"exp({high:.3g}) overflows.",
            "prediction = prediction.clamp(max=20)  # or log_input=False, if these are rates",
        )
        return
    target = given.labels
    if target is None or target.shape != prediction.shape or prediction.numel() < 16 or low < 0:
        return
    rates, counts = thinned(prediction).double(), thinned(target).double()
    as_rates = float((rates - counts).abs().mean())
    as_logarithms = float((rates.exp() - counts).abs().mean())
    if float(counts.mean()) > 2 and float(rates.mean()) > 1.5 and as_rates * 5 < as_logarithms:
        yield warning(
            "domain",
            f"{given.name} was given a prediction from {low:.3g} to {high:.3g} that is, as it stands, {as_rates:.3g} "
            f"away from the counts, and {as_logarithms:.3g} as a logarithm.",
            "It looks like rates, where logarithms of rates are expected.",
            "loss = torch.nn.PoissonNLLLoss(log_input=False)  # or prediction.log()",
        )


def _distances(given: Given) -> Iterator[Finding]:
    lows = [extremes(part)[0] for part in tensors(given.prediction) if part.is_floating_point()]
    if lows and min(lows) < 0:
        yield warning(
            "domain",
            f"{given.name} was given distances down to {min(lows):.3g}, and expects none below 0.",
            "A similarity or a logit is no distance: similar pairs would be driven to −∞.",
            "prediction = torch.nn.functional.pairwise_distance(first, second)",
        )


def _spread(given: Given) -> Iterator[Finding]:
    """A variance, a scale or a dispersion below 0, where the loss does not take its logarithm."""
    keywords = getattr(given.loss.terms, "keywords", {})
    switches = [name for name in ("log_variance", "log_scale", "log_input") if name in keywords]
    if not switches or keywords[switches[0]]:
        return
    parts = list(tensors(given.prediction))
    if len(parts) == 1 and parts[0].ndim >= 2 and parts[0].shape[1] % 2 == 0:
        parts = list(parts[0].chunk(2, 1))
    if len(parts) < 2 or not parts[1].is_floating_point():
        return
    low, high = extremes(parts[1])
    if not low < 0:
        return
    what = {"log_variance": "variance", "log_scale": "scale", "log_input": "dispersion"}[switches[0]]
    yield error(
        "domain",
        f"{given.name} was given a {what} with values from {low:.3g} to {high:.3g}, and expects none below 0.",
        f"There is no negative {what}; below the least one that is allowed, the gradient is 0.",
        f"{what} = torch.nn.functional.softplus({what})  # or {what}.exp(), if this is its logarithm",
    )
