"""The values of a target: coding, range, sums, what is ignored, what is rare, how large.

Neighbours: `shapes` and `types`, which come first; `settings` for weights and reductions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fallline.losses.base import Target
from fallline.losses.misuse.finding import Finding, error, note, warning
from fallline.losses.misuse.given import Given, extremes, shape, tensors, thinned
from fallline.losses.misuse.sums import probabilities


def target_findings(given: Given) -> Iterator[Finding]:
    """What is wrong with the values of the target."""
    target = given.labels
    if target is None or target.numel() == 0:
        return
    low, high = given.target_range
    if math.isnan(low) or math.isnan(high):
        return  # `computed` reports it
    if given.indices is not None and given.expects != Target.SEQUENCES:
        yield from _labels(given, given.indices)
    elif given.expects == Target.CLASSES_OR_PROBABILITIES and target.is_floating_point():
        yield from _class_probabilities(given, target)
    elif given.expects == Target.CLASSES_OR_YES_NO:
        yield from _fractions(given, target)
    elif given.expects == Target.CLASS_SETS:
        yield from _sets(given, target)
    elif given.expects == Target.SEQUENCES:
        yield from _sequences(given, target)
    elif given.expects in (Target.FRACTIONS, Target.YES_NO):
        yield from _fractions(given, target)
    elif given.expects == Target.SIGNS:
        yield from _signs(given, target)
    elif given.expects == Target.RANKS:
        yield from _ranks(given, target)
    elif given.expects in (Target.COUNTS, Target.NOT_NEGATIVE, Target.POSITIVE):
        yield from _bounded_below(given)
    elif given.expects == Target.PROBABILITIES:
        yield from _probabilities(given, target)
    elif given.expects == Target.LOG_PROBABILITIES:
        yield from _logarithms(given, target)
    elif given.expects == Target.REAL:
        yield from _scale(given, target)
    elif given.expects == Target.GROUPS:
        yield from _groups(given, target)
    yield from _constant(given, target)


def _place(target: Tensor, wrong: Tensor) -> tuple[float, str]:
    """The first wrong value and where it is."""
    flat = wrong.flatten().to(torch.uint8)
    index = torch.unravel_index(flat.argmax(), wrong.shape)
    where = [int(each) for each in index]
    value = target[tuple(where)].item() if where else target.item()
    if not where:
        return value, "the only sample"
    return value, f"sample {where[0]}" + (f", position {where[1:]}" if len(where) > 1 else "")


def _labels(given: Given, target: Tensor) -> Iterator[Finding]:
    assert given.classes is not None
    classes, ignore = given.classes[0], given.ignore_index
    low, high = given.target_range
    if low < 0 or high >= classes:
        wrong = (target < 0) | (target >= classes)
        if ignore is not None:
            wrong = wrong & (target != ignore)
        if bool(wrong.any()):
            yield _out_of_range(given, target, wrong, classes)
            return
    if ignore is None:
        yield from _imbalance(given, target, classes, None)
        return
    ignored = int((target == ignore).sum())
    if ignored == target.numel():
        seen = f"{given.name} was given {ignored} labels that all equal ignore_index ({ignore})."
        fix = "if (target == ignore_index).all(): continue  # before the loss"
        if given.foreign and given.loss.reduction == "mean":
            yield error("all-ignored", seen, "torch's mean of nothing is NaN, which makes every parameter NaN.", fix)
        else:
            yield warning("all-ignored", seen, "The loss is 0 and nothing is learnt from this batch.", fix)
        return
    if 0 <= ignore < classes and ignored:
        plain = target.ndim == 1 and classes <= 10
        make = warning if plain else note
        yield make(
            "ignored-class",
            f"{given.name} leaves out {ignored} of {target.numel()} labels, because ignore_index={ignore} is also the "
            f"number of a class (0 to {classes - 1}).",
            "The model never learns that class, unless it stands for padding.",
            "ignore_index=-100  # and mark what is to be left out with -100",
        )
        return
    yield from _imbalance(given, target, classes, ignore)


def _out_of_range(given: Given, target: Tensor, wrong: Tensor, classes: int) -> Finding:
    label, where = _place(target, wrong)
    label = int(label)
    low, high = extremes(torch.where(target == given.ignore_index, 0, target) if given.ignore_index else target)
    if label < 0:
        why = "Labels to be left out must equal ignore_index" + (
            f" ({given.ignore_index})." if given.ignore_index is not None else "."
        )
        fix = f"ignore_index={label}  # if {label} marks what is left out"
        if low == -1 and high == 1 and classes == 2:
            fix = "target = (target + 1) // 2"
    elif high == classes:
        why = "Labels that count from 1 are one too large; otherwise give the model more outputs."
        fix = "target = target - 1"
    elif label == 255:
        why = "255 marks what is left out in many segmentation data sets."
        fix = "ignore_index=255"
    else:
        why = f"Number the classes from 0, or give the model {int(high) + 1} outputs or more."
        fix = f"torch.nn.LazyLinear({int(high) + 1})  # the last layer"
    return error(
        "label-range",
        f"{given.name} was given the label {label} (of {where}) for {classes} classes, and expects labels from 0 to "
        f"{classes - 1}.",
        f"{why} On a GPU this ends the process without a word.",
        fix,
    )


def _imbalance(given: Given, target: Tensor, classes: int, ignore: int | None) -> Iterator[Finding]:
    part = thinned(target).flatten()
    if ignore is not None:
        part = part[part != ignore]
    if part.numel() < 50 or given.settings.get("weight") is not None:
        return
    counts = torch.bincount(part[part >= 0].long(), minlength=1)
    most = int(counts.max())
    if 0.9 * part.numel() <= most < part.numel():
        yield _rare(given, int(counts.argmax()), most, part.numel(), "weight=1 / counts.clamp(min=1)")


def _rare(given: Given, label: float, most: int, count: int, fix: str) -> Finding:
    share = most / count
    percent = f"{share:.0%}" if share < 0.99 else f"{min(math.floor(1e4 * share), 9999) / 100:g}%"
    return note(
        "imbalance",
        f"{given.name} was given {most} targets out of {count} ({percent}) with the value {label:g}.",
        "A model that always says so is right that often, and its loss is low.",
        f"{fix}  # or draw the rare ones more often; and look at more than the accuracy",
    )


def _class_probabilities(given: Given, target: Tensor) -> Iterator[Finding]:
    if given.first is None or target.shape != given.first.shape or target.ndim < 1:
        return
    axis = given.class_axis
    bounds = low, high = given.target_range
    if low < 0 or high > 1.001:
        hint = "They look like log-probabilities." if high <= 0 else "They look like logits." if low < 0 else ""
        fix = "target = target / target.sum(1, keepdim=True)"
        if low < 0:
            fix = "target = target.exp()" if high <= 0 else "target = target.softmax(1)"
        elif high > 1.001 and bool((thinned(target) == thinned(target).round()).all()):
            fix = "target = target / target.sum(1, keepdim=True)  # or class indices of type int64"
        yield error(
            "not-normalised",
            f"{given.name} was given class probabilities from {low:g} to {high:g}, and expects them from 0 to 1. "
            "Normalise them, or give class indices of type int64.",
            f"The gradient of what is no distribution does not lead to one. {hint}".strip(),
            fix,
        )
        return
    sums = thinned(target).float().sum(axis)
    tolerance = 2e-2  # of probabilities that were rounded to half precision on the way
    off = (sums - 1).abs() > tolerance
    empty = sums == 0  # rows of zeros count for nothing: a mask
    wrong = off & ~empty
    if not bool(wrong.any()):
        return
    for other in range(target.ndim):
        if other != axis % target.ndim and target.shape[other] > 1 and probabilities(target, other, bounds):
            yield error(
                "axis",
                f"{given.name} was given class probabilities that sum to 1 over dimension {other}, and expects that "
                f"over dimension {axis}, where the classes stand.",
                "The positions are taken for classes.",
                f"loss(prediction.movedim({other}, {axis}), target.movedim({other}, {axis}))",
            )
            return
    rows = int(wrong.sum())
    worst = sums[wrong]
    ones = bool(((thinned(target) == 0) | (thinned(target) == 1)).all())
    why = "The loss is then weighted by these sums, and cannot come near 0."
    fix = "target = target / target.sum(1, keepdim=True)"
    if ones:
        why = "Several ones in a row are several classes at once, of which a softmax chooses one."
        fix = "loss = torch.nn.BCEWithLogitsLoss()  # or target / target.sum(1, keepdim=True)"
    yield warning(
        "not-normalised",
        f"{given.name} was given class probabilities of which {rows} of {sums.numel()} rows sum to "
        f"{float(worst.min()):.3g} up to {float(worst.max()):.3g} instead of 1.",
        why,
        fix,
    )


def _fractions(given: Given, target: Tensor) -> Iterator[Finding]:
    low, high = given.target_range
    slack = 1e-6 if target.dtype != torch.bfloat16 else 1e-2
    if low >= 0 and high <= 1 + slack:
        if target.numel() >= 50 and low == 0 and high == 1 and given.settings.get("pos_weight") is None:
            part = thinned(target).double()
            share = float(part.mean())
            if share < 0.05 or share > 0.95:
                label = 0 if share < 0.5 else 1
                most = round(max(share, 1 - share) * target.numel())
                fix = f"pos_weight=torch.tensor({(1 - share) / max(share, 1e-9):.3g})"
                yield _rare(given, label, most, target.numel(), fix)
        return
    if given.first is not None and given.expects == Target.CLASSES_OR_YES_NO and not target.is_floating_point():
        ignore = given.ignore_index
        wrong = (target < 0) | (target >= max(given.first.shape[1] if given.first.ndim > 1 else 2, 2))
        if ignore is not None:
            wrong = wrong & (target != ignore)
        if bool(wrong.any()):
            yield _out_of_range(given, target, wrong, given.first.shape[1] if given.first.ndim > 1 else 2)
        return
    seen = f"{given.name} was given targets from {low:g} to {high:g}, and expects them from 0 to 1."
    part = thinned(target)
    if low == -1 and high <= 1:
        signs = bool(((part == -1) | (part == 1)).all())
        why = "Against −1 the loss falls without end." if signs else "Below 0 the loss falls without end."
        yield error("target-coding", seen, why, "target = (target + 1) / 2  # maps −1 and 1 to 0 and 1")
    elif low >= 0 and 1 < high <= 255 and bool(((part == 0) | (part == high)).all()):
        yield error(
            "target-coding",
            seen,
            f"Use 0 for no and 1 for yes; here {high:g} stands for yes, and the loss falls without end.",
            f"target = target / {high:g}",
        )
    elif bool((part == part.round()).all()) and low >= 0 and high <= 1000:
        fix = "target = target - 1" if (low, high) == (1, 2) else "loss = torch.nn.CrossEntropyLoss()  # for classes"
        yield error("target-coding", seen, "Use 0 for no and 1 for yes; these look like class indices or counts.", fix)
    else:
        yield error(
            "target-coding",
            seen,
            "Use 0 for no and 1 for yes; beyond them the loss falls without end.",
            "target = (target - target.min()) / (target.max() - target.min())  # or an mse, for real values",
        )


def _signs(given: Given, target: Tensor) -> Iterator[Finding]:
    part = thinned(target)
    if bool(((part == -1) | (part == 1)).all()):
        return
    low, high = given.target_range
    seen = f"{given.name} was given targets from {low:g} to {high:g}, and expects −1 and 1."
    if low == 0 and high <= 1 and bool(((part == 0) | (part == 1)).all()):
        yield error(
            "target-coding",
            f"{given.name} was given targets 0 and 1, and expects −1 and 1.",
            "A target of 0 counts for nothing, or for half: the negatives are not learnt.",
            "target = 2 * target - 1" if target.is_signed() else "target = 2 * target.to(prediction.dtype) - 1",
        )
    else:
        yield error(
            "target-coding",
            seen,
            "The sign says which of two cases it is; other numbers weight the loss.",
            "target = torch.where(target > threshold, 1, -1)",
        )


def _ranks(given: Given, target: Tensor) -> Iterator[Finding]:
    low, high = given.target_range
    if given.first is None or given.first.ndim < 2 or target.ndim == given.first.ndim:
        return
    ranks = given.first.shape[1] + 1
    if low < 0 or high >= ranks:
        why = "Ranks are counted from 0." if low >= 1 else "The model gives one logit fewer than there are ranks."
        yield error(
            "label-range",
            f"{given.name} was given ranks from {low:g} to {high:g}, and {ranks - 1} thresholds make {ranks} ranks, 0 "
            f"to {ranks - 1}.",
            why,
            "target = target - 1"
            if low >= 1 and high == ranks
            else f"torch.nn.LazyLinear({int(high)})  # the last layer",
        )


def _sets(given: Given, target: Tensor) -> Iterator[Finding]:
    if target.is_floating_point() or given.first is None or target.shape != given.first.shape or target.ndim > 2:
        return
    rows = thinned(target).reshape(-1, target.shape[-1]).long()
    classes = target.shape[-1]
    low, high = given.target_range
    if low < -1 or high >= classes:
        yield error(
            "label-range",
            f"{given.name} was given class indices from {low:g} to {high:g} for {classes} classes.",
            f"Each row lists the classes of a sample, 0 to {classes - 1}, and then −1.",
            "target = torch.where(target < 0, -1, target)",
        )
        return
    listed = (rows >= 0).cumprod(1)
    counts = rows.new_zeros(len(rows), classes).scatter_add(1, rows.clamp(min=0), listed)
    twice = counts.max(1).values > 1
    if bool(twice.any()):
        yield error(
            "target-coding",
            f"{given.name} was given {int(twice.sum())} of {len(rows)} rows that list a class more than once, and "
            "expects each row to list the classes of a sample, and −1 after the last.",
            "Rows of 0 and 1 are read as the classes 0 and 1.",
            "loss = torch.nn.MultiLabelSoftMarginLoss()  # takes rows of 0 and 1",
        )


def _sequences(given: Given, target: Tensor) -> Iterator[Finding]:
    """Labels of sequences [N, S] (or one after the other): none is the blank, or beyond the last class."""
    blank = given.settings.get("blank")
    if given.first is None or given.first.ndim < 2 or not isinstance(blank, int) or target.is_floating_point():
        return
    classes = given.first.shape[-1]
    parts = list(tensors(given.target))
    counted = torch.ones_like(target, dtype=torch.bool)
    if target.ndim == 2:
        counted = (target >= 0).cumprod(1).bool()
        if len(parts) == 2 and parts[1].numel() == len(target):
            places = torch.arange(target.shape[1], device=target.device)
            counted = places < parts[1].reshape(-1, 1).to(target.device)
    wrong = counted & ((target == blank) | (target >= classes) | (target < 0))
    if bool(wrong.any()):
        label, where = _place(target, wrong)
        blanks = label == blank
        yield error(
            "label-range",
            f"{given.name} was given the label {label} (of {where}) among its targets, and expects labels from 0 to "
            f"{classes - 1} other than the blank, {blank}.",
            "The blank stands between labels, and is none." if blanks else "There is no such class.",
            "target = target + 1  # and one output more, so that 0 is left for the blank"
            if blanks
            else f"torch.nn.LazyLinear({int(given.target_range[1]) + 1})  # the last layer",
        )


def _bounded_below(given: Given) -> Iterator[Finding]:
    low, high = given.target_range
    strict = given.expects == Target.POSITIVE
    if low > 0 or (low == 0 and not strict):
        return
    what = {Target.COUNTS: "counts ≥ 0", Target.NOT_NEGATIVE: "values ≥ 0", Target.POSITIVE: "values above 0"}
    yield error(
        "domain",
        f"{given.name} was given targets from {low:g} to {high:g}, and expects {what[given.expects]}.",
        "Below that the likelihood does not exist; standardised targets, or their logarithms, are no counts.",
        "loss = torch.nn.MSELoss()  # for standardised targets; or give the counts themselves",
    )


def _probabilities(given: Given, target: Tensor) -> Iterator[Finding]:
    low, high = given.target_range
    if low < 0:
        logs = high <= 1e-3
        yield error(
            "not-probabilities",
            f"{given.name} was given a target with values from {low:.3g} to {high:.3g}, and expects probabilities.",
            "These look like log-probabilities." if logs else "These look like logits.",
            "log_target=True  # or target.exp()" if logs else "target = target.softmax(-1)",
        )
        return
    yield from _sums(given, target)


def _sums(given: Given, target: Tensor) -> Iterator[Finding]:
    tolerance = 2e-2
    part = thinned(target).float()
    axes: list[tuple[int, ...]] = [(d,) for d in range(part.ndim)]
    axes += [tuple(range(1, part.ndim)), tuple(range(part.ndim))] if part.ndim > 1 else []
    for each in axes:
        sums = part.sum(each)
        if bool((((sums - 1).abs() < tolerance) | (sums == 0)).all()):
            return
    last = part.sum(-1)
    yield warning(
        "not-normalised",
        f"{given.name} was given a target of shape {shape(target)} whose values sum to {float(last.min()):.3g} up to "
        f"{float(last.max()):.3g} along the last axis, and to 1 along none.",
        "The divergence of what is no distribution has no minimum at the target.",
        "target = target / target.sum(-1, keepdim=True)",
    )


def _logarithms(given: Given, target: Tensor) -> Iterator[Finding]:
    bounds = low, high = given.target_range
    if high <= 1e-3:
        return
    normal = any(probabilities(target, d, bounds) for d in range(target.ndim))
    yield error(
        "not-log-probabilities",
        f"{given.name} was given a target with values from {low:.3g} to {high:.3g}, and expects log-probabilities.",
        "These are probabilities." if normal else "Log-probabilities are never above 0.",
        "log_target=False" if normal else "target = target.log_softmax(-1)",
    )


def _scale(given: Given, target: Tensor) -> Iterator[Finding]:
    prediction = given.first
    if prediction is None or prediction.ndim == 0:
        return
    if not prediction.is_floating_point() or prediction.shape[0] != (target.shape[0] if target.ndim else 1):
        return
    goal = float(thinned(target).double().square().mean().sqrt())
    made = float(thinned(prediction).double().square().mean().sqrt())
    fix = "target = (target - target.mean(0)) / target.std(0)  # and undo it for predictions"
    if not (math.isfinite(goal) and math.isfinite(made)):
        return
    few = target.numel() < 8  # a few values may be large by chance, but not by a factor of a thousand
    if few and goal <= 1000 * max(made, 1.0):
        return
    if goal > 10 * max(made, 1.0):
        yield (warning if goal > 100 * max(made, 1.0) else note)(
            "scale",
            f"{given.name} was given targets of size {goal:.3g} (root mean square) and predictions of size {made:.3g}.",
            "The first steps only learn the size, with gradients that call for a very small learning rate: normalise.",
            fix,
        )
    elif goal > 0 and made > 100 * goal:
        yield (warning if made > 1000 * goal else note)(
            "scale",
            f"{given.name} was given targets of size {goal:.3g} (root mean square) and predictions of size {made:.3g}.",
            "The targets drown in the noise of the predictions: normalise.",
            fix,
        )


def _groups(given: Given, target: Tensor) -> Iterator[Finding]:
    if target.ndim != 1 or len(target) < 4:
        return
    distinct = len(target.unique())
    if distinct == len(target) and isinstance(given.prediction, Tensor) and given.prediction.ndim == 2:
        yield warning(
            "constant-target",
            f"{given.name} was given {len(target)} labels that all differ.",
            "No sample has another of its group in the batch, so that there is nothing to pull together.",
            "torch.utils.data.DataLoader(…, sampler=…)  # draw several of each group",
        )


def _constant(given: Given, target: Tensor) -> Iterator[Finding]:
    low, high = given.target_range
    if low != high or target.numel() < 2 or given.expects in (Target.SEQUENCES, Target.NOTHING, Target.ANYTHING):
        return
    if given.ignore_index is not None and low == given.ignore_index:
        return
    yield note(
        "constant-target",
        f"{given.name} was given {target.numel()} targets that are all {low:g}.",
        "A model that always says so has the least loss; in one small batch this may be chance.",
        "torch.utils.data.DataLoader(…, shuffle=True)  # data sorted by class make such batches",
    )
