"""The words in which a ranking answers: numbers with as many digits as they deserve, and plain sentences.

`ranking` computes; here nothing is computed but the number of digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fallline.evidence.statistics import seeds_for_difference, seeds_for_significance

if TYPE_CHECKING:
    from fallline.evidence.ranking import Entry, Ranking

RECOMMENDED_SEEDS = 8
"""Reporting seeds that leave the test some room beyond the bare minimum."""


def number(value: float | None, resolution: float | None = None) -> str:
    """A number with two digits of its resolution (the width of an interval, say), or four significant ones.

    >>> number(0.97512, 0.011), number(0.98, 0.011), number(1.5e-7), number(float("nan")), number(12345.678)
    ('0.975', '0.980', '1.5e-07', '–', '1.235e+04')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if resolution and math.isfinite(resolution) and resolution > 0:
        return f"{value:.{min(6, max(0, 1 - math.floor(math.log10(resolution))))}f}"
    return f"{value:.4g}"


def probability(value: float | None) -> str:
    """A probability as a resampling can know it, never a bare 0 or 1.

    >>> probability(0.876), probability(1.0), probability(0.0), probability(None)
    ('0.88', '> 0.99', '< 0.01', '–')
    """
    if value is None:
        return "–"
    if value > 0.99:
        return "> 0.99"
    return "< 0.01" if value < 0.01 else f"{value:.2f}"


def setting(values: Mapping[str, float]) -> str:
    """The searched hyperparameters of a configuration, as one says them.

    >>> setting({"lr": 0.01, "momentum": 0.9}), setting({})
    ('lr 0.01, momentum 0.9', 'its given hyperparameters')
    """
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "its given hyperparameters"


def metric_text(entry: Entry) -> str:
    """The mean of an entry with the digits that its interval supports.

    An entry without an interval gets four significant digits.
    """
    return number(entry.mean, _width(entry))


def interval_text(entry: Entry) -> str:
    """The interval of an entry, "0.969 to 0.980", or "not enough seeds"."""
    if entry.interval is None:
        return "not enough seeds" if math.isfinite(entry.mean) else "–"
    return " to ".join(number(bound, _width(entry)) for bound in entry.interval)


def result_sentence(entry: Entry, metric: str, confidence: float) -> str:
    """What an entry reached, without a full stop: "adam at lr 0.01 reaches an accuracy of 0.975 (95 %
    interval …)"."""
    where = f"{entry.label} at {setting(entry.setting)}"
    if not math.isfinite(entry.mean):
        return f"{where} diverged on every seed"
    interval = (
        f"{100 * confidence:g} % interval {interval_text(entry)}"
        if entry.interval is not None
        else f"{_counted(entry.seeds_reported, 'seed')}: not enough for an interval"
    )
    return f"{where} reaches {_article(metric)} {metric} of {metric_text(entry)} ({interval})"


def answer(ranking: Ranking) -> str:
    """The answer of a ranking in one or two plain sentences; "no evidence" is an answer too."""
    headline, details = answer_parts(ranking)
    if not details:
        return f"{headline}."
    return f"{headline}{':' if ranking.undecided else '.'} {details}"


def answer_parts(ranking: Ranking) -> tuple[str, str]:
    """The answer as a headline without its full stop, and what belongs to it, which may be nothing."""
    best = ranking.entries[0]
    if not math.isfinite(best.mean):
        return "Every optimizer diverged at its best configuration", (
            "Search lower learning rates, or check the data and the loss."
        )
    found = result_sentence(best, ranking.metric, ranking.confidence)
    cautions = [_divergence(best)]
    if ranking.selection_bias:
        cautions.append(
            "The one seed both chose the configurations and reports them, so these values are too good; use more seeds."
        )
    caution = " ".join(filter(None, cautions))
    if len(ranking.entries) == 1:
        return found, caution
    second = ranking.entries[1]
    if not ranking.undecided:
        chance = best.beats_next or 0.0
        sure = "more than 0.99" if chance > 0.99 else f"{chance:.2f}"
        return f"{found} and beats {second.label} with probability {sure}", caution
    headline = f"No evidence that {best.label} beats {second.label}"
    return headline, f"{found}, {_rival(second)}. {_why_not(ranking)} {caution}".rstrip()


def _rival(entry: Entry) -> str:
    if not math.isfinite(entry.mean):
        return f"{entry.label} diverged on every seed"
    inside = f" ({interval_text(entry)})" if entry.interval is not None else ""
    return f"{entry.label} at {setting(entry.setting)} reaches {metric_text(entry)}{inside}"


def _why_not(ranking: Ranking) -> str:
    best, second = ranking.entries[:2]
    comparisons = len(ranking.entries) - 1
    floor = seeds_for_significance(comparisons, ranking.level)
    count = len(ranking.reporting_seeds)
    if count < floor:
        advised = max(RECOMMENDED_SEEDS, floor + 1)
        return (
            f"{_counted(count, 'reporting seed')} cannot show a difference among {len(ranking.entries)} "
            f"candidates: at least {total_seeds(floor)} seeds are needed ({floor} of them reporting), "
            f"{total_seeds(advised)} are better."
        )
    reason = f"A difference like this is common by chance (p = {number(best.p_value)})"
    needed = seeds_for_difference(best.scores, second.scores, comparisons=comparisons, level=ranking.level)
    if needed is None or needed <= count:
        return f"{reason}."
    if needed > 1000:
        return f"{reason}; it would take more than 1,000 reporting seeds to tell, so take either."
    return f"{reason}; about {needed} reporting seeds would be needed to tell."


def total_seeds(reporting: int) -> int:
    """The number of seeds of a sweep that leaves so many for reporting.

    >>> total_seeds(7), total_seeds(8)
    (10, 11)
    """
    total = reporting
    while total - max(1, total // 3) < reporting:
        total += 1
    return total


def advice(entry: Entry, lowest_lr: float | None) -> str:
    """One or two sentences on what to try next with an optimizer; every entry has some."""
    if not math.isfinite(entry.mean):
        below = f" below {lowest_lr:.4g}" if lowest_lr is not None else ""
        return (
            f"It diverged on every seed: search learning rates{below}."
            if entry.setting
            else "It diverged on every seed."
        )
    said = [_divergence(entry)] if entry.diverged else []
    for name, side in entry.on_edge:
        further = "higher" if side == "high" else "lower"
        said.append(f"The best {name} is the {side}est of its grid: search {further}.")
    if not said and entry.lr_low is not None and entry.lr_high is not None:
        if entry.lr_low == entry.lr_high:
            said.append(
                f"No neighbouring lr comes within 5 % of lr {entry.lr_low:.4g}: search more finely around it."
                if entry.lr_alternatives
                else "Only one lr was tried: search others."
            )
        else:
            said.append(f"Any lr from {entry.lr_low:.4g} to {entry.lr_high:.4g} is about as good (within 5 %).")
    return " ".join(said)


def _divergence(entry: Entry) -> str:
    if not entry.diverged:
        return ""
    return (
        f"{entry.label} diverged on {entry.diverged} of {entry.seeds_reported} reporting seeds; "
        "its mean is over the others. Take a lower lr."
    )


def table(ranking: Ranking) -> str:
    """The ranking as a plain text table, one line per entry."""
    head = (
        "",
        "optimizer",
        "tuned at",
        ranking.metric,
        f"{100 * ranking.confidence:g} % interval",
        "P(beats next)",
        "p",
    )
    rows = [
        (
            str(place),
            entry.label,
            setting(entry.setting) if entry.setting else "–",
            metric_text(entry),
            interval_text(entry),
            probability(entry.beats_next),
            number(entry.p_value, 0.01 if entry.p_value and entry.p_value >= 0.01 else None),
        )
        for place, entry in enumerate(ranking.entries, start=1)
    ]
    return "\n".join(_aligned([head, *rows]))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _width(entry: Entry) -> float | None:
    return entry.interval[1] - entry.interval[0] if entry.interval is not None else None


def _article(word: str) -> str:
    # Short names such as mse and r2 are spelt out when spoken: "an m-s-e".
    spelt = len(word) <= 3 and word[:1].lower() in "flmnrsx"
    return "an" if spelt or word[:1].lower() in "aeio" else "a"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
