"""How optimizers are compared fairly: tune on some seeds, report on the others, pair the seeds.

1. The first third of the seeds (at least one) *tunes*: it picks each candidate's configuration. Ties, common
   with accuracies on small validation sets, go to the middle of the tied learning rates, the safest of
   equals.
2. The other seeds *report* that configuration, so its mean is not flattered by having been picked for it.
3. Candidates are sorted by that mean, and each is compared with the next and with the winner on the same
   seeds.

Divergence counts as worse than any score, when tuning and when reporting: whoever diverges on fewer seeds
comes first, and the mean over the seeds that finished decides between equals. `statistics` holds the tools,
`sentences` the words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fallline.evidence import sentences
from fallline.evidence.statistics import Floats, bootstrap_interval, holm, probability_better, sign_flip_test

TOLERANCE = 0.05
"""Learning rates whose metric is within this share of the best one count as just as good."""

ON_EDGE_FROM = 3
"""A grid of fewer values than this has no inside, so no value of it lies on an edge."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One optimizer, with one loss, and all of its configurations.

    Args:
        label: what the candidate is called; unique in a ranking.
        scores: [configuration, seed] the final validation metric, NaN where the trial diverged or failed.
        settings: per configuration its searched hyperparameters, for example {"lr": 0.01}.
        optimizer, loss: carried through to the entry, for readers who look up its trials; they play no part
            in the ranking.

    Raises:
        ValueError: the scores are not a table of at least one configuration and one seed, or there is not one
            setting per configuration.
    """

    label: str
    scores: Floats
    settings: Sequence[Mapping[str, float]]
    optimizer: str = ""
    loss: str = ""

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, dtype=np.float64)
        if scores.ndim != 2 or scores.size == 0:
            raise ValueError(
                f"The scores of {self.label!r} have the shape {scores.shape}; "
                "[configuration, seed] with at least one of each is expected."
            )
        if len(self.settings) != len(scores):
            raise ValueError(
                f"{self.label!r} has {len(scores)} rows of scores and {len(self.settings)} settings; "
                "each row needs its setting."
            )
        # Infinity is a divergence that was not caught in time: it may not enter a mean.
        object.__setattr__(self, "scores", np.where(np.isfinite(scores), scores, np.nan))


@dataclass(frozen=True)
class Entry:
    """One candidate's place in a ranking.

    Args:
        label, optimizer, loss: of the candidate.
        configuration: index of the tuned configuration in the candidate's scores.
        setting: its searched hyperparameters.
        mean: over the reporting seeds that finished; NaN where none did.
        interval: BCa bootstrap interval of that mean, None with fewer than three finished seeds.
        scores: [reporting seed], NaN where diverged.
        seeds_reported: the number of reporting seeds.
        diverged: how many of them diverged.
        beats_next: the probability that its mean beats the next entry's; None for the last entry and with
            fewer than three seeds.
        p_value: sign-flip test against the next entry, Holm-adjusted over all such neighbours; None for the
            last.
        p_value_to_best: sign-flip test against the winner, Holm-adjusted over all such pairs; None for the
            winner.
        lr_low, lr_high: the unbroken range of learning rates around the tuned one whose mean over the
            reporting seeds is within 5 % of its own, other hyperparameters as tuned; grid values, nothing
            interpolated, no seed diverged; None without an lr.
        lr_decades: log10(lr_high / lr_low).
        lr_alternatives: how many other learning rates were tried at the tuned values of the other
            hyperparameters.
        on_edge: (hyperparameter, "low" or "high") for every tuned value at an end of a grid of three values
            or more; a value of 0 at the low end is the end of the domain and no edge.
        advice: what to try next, in a sentence.
    """

    label: str
    configuration: int
    setting: Mapping[str, float]
    mean: float
    interval: tuple[float, float] | None
    scores: tuple[float, ...]
    seeds_reported: int
    diverged: int
    lr_low: float | None = None
    lr_high: float | None = None
    lr_decades: float | None = None
    lr_alternatives: int = 0
    on_edge: tuple[tuple[str, str], ...] = ()
    beats_next: float | None = None
    p_value: float | None = None
    p_value_to_best: float | None = None
    advice: str = ""
    optimizer: str = ""
    loss: str = ""


@dataclass(frozen=True)
class Ranking:
    """Candidates from best to worst, with how sure that order is; iterates over its entries, prints as a
    table."""

    entries: tuple[Entry, ...]
    metric: str
    higher_is_better: bool
    tuning_seeds: tuple[int, ...]
    reporting_seeds: tuple[int, ...]
    selection_bias: bool = False
    confidence: float = 0.95
    resamples: int = 10_000
    level: float = 0.05

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int) -> Entry:
        return self.entries[place]

    def __str__(self) -> str:
        return sentences.table(self)

    @property
    def undecided(self) -> bool:
        """Whether there is no evidence that the first entry beats the second."""
        best = self.entries[0]
        if len(self.entries) == 1 or math.isnan(best.mean):
            return False
        return best.beats_next is None or best.p_value is None or best.p_value >= self.level

    @property
    def sentence(self) -> str:
        """The answer in one or two plain sentences, "No evidence that …" included."""
        return sentences.answer(self)


def rank(
    candidates: Sequence[Candidate],
    *,
    seeds: Sequence[int],
    higher_is_better: bool,
    metric: str,
    confidence: float = 0.95,
    resamples: int = 10_000,
    rng_seed: int = 0,
) -> Ranking:
    """Rank candidates by the metric of their tuned configurations on seeds that did not tune them.

    Args:
        candidates: at least one; all with one column of scores per seed.
        seeds: the seeds of the columns; the first max(1, len // 3) tune, the others report. A single seed
            does both, and the ranking says so (`selection_bias`).
        higher_is_better: True for accuracies, False for errors.
        metric: its name, for the sentences.
        confidence: of the intervals.
        resamples: bootstrap samples per interval and probability.
        rng_seed: seed of the resampling: equal arguments give equal rankings.

    Raises:
        ValueError: no candidates, no seeds, two candidates of one label, or scores that do not fit the seeds.

    >>> scores = np.array([[0.90, 0.91, 0.90, 0.92], [0.96, 0.97, 0.97, 0.98]])
    >>> adam = Candidate("adam", scores, [{"lr": 1e-4}, {"lr": 1e-3}])
    >>> sgd = Candidate("sgd", np.array([[0.80, 0.82, 0.81, 0.83], [np.nan] * 4]), [{"lr": 0.1}, {"lr": 10}])
    >>> ranking = rank([sgd, adam], seeds=range(4), higher_is_better=True, metric="accuracy")
    >>> [(entry.label, entry.setting["lr"], round(entry.mean, 4)) for entry in ranking]
    [('adam', 0.001, 0.9733), ('sgd', 0.1, 0.82)]
    >>> print(ranking.sentence)
    No evidence that adam beats sgd: ... 3 reporting seeds cannot show a difference among 2 candidates: ...

    Source: the protocol of Bouthillier et al., MLSys 2021, and Agarwal et al., NeurIPS 2021 (arXiv
    2108.13264).
    """
    _check(candidates, seeds)
    count = len(seeds)
    tuning = slice(0, max(1, count // 3))
    reporting = slice(tuning.stop, count) if count > 1 else tuning
    entries = [
        _entry(candidate, tuning, reporting, higher_is_better, confidence, resamples, rng_seed)
        for candidate in candidates
    ]
    sign = -1 if higher_is_better else 1
    entries.sort(key=lambda e: (e.diverged, sign * e.mean if math.isfinite(e.mean) else math.inf, e.label))

    def p_value(ours: Entry, theirs: Entry) -> float:
        return sign_flip_test(
            ours.scores,
            theirs.scores,
            higher_is_better=higher_is_better,
            resamples=resamples,
            rng_seed=rng_seed,
        )

    pairs = list(itertools.pairwise(entries))
    chances = [
        probability_better(
            a.scores, b.scores, higher_is_better=higher_is_better, resamples=resamples, rng_seed=rng_seed
        )
        for a, b in pairs
    ]
    to_next = holm([p_value(a, b) for a, b in pairs])
    to_best = holm([p_value(entries[0], other) for other in entries[1:]])
    compared = [
        replace(entry, beats_next=chance, p_value=p_next, p_value_to_best=p_best)
        for entry, chance, p_next, p_best in zip(
            entries, [*chances, None], [*to_next, None], [None, *to_best], strict=True
        )
    ]
    return Ranking(
        entries=tuple(compared),
        metric=metric,
        higher_is_better=higher_is_better,
        tuning_seeds=tuple(int(seed) for seed in seeds[tuning]),
        reporting_seeds=tuple(int(seed) for seed in seeds[reporting]),
        selection_bias=count == 1,
        confidence=confidence,
        resamples=resamples,
    )


def tuned_configuration(candidate: Candidate, tuning: slice, higher_is_better: bool) -> int:
    """The configuration that diverged on the fewest tuning seeds with the best mean; of ties, the middle.

    Ties are ordered by lr, then by the other hyperparameters; of an even number the lower of the two middle
    ones is taken.
    """
    scores = candidate.scores[:, tuning]
    diverged = np.isnan(scores).sum(axis=1)
    sums = np.nansum(scores, axis=1) * (-1 if higher_is_better else 1)
    fewest = diverged == diverged.min()
    best = sums[fewest].min()
    # Means of the same numbers in another order differ by round-off, and must still tie.
    tied = np.flatnonzero(fewest & (sums <= best + 1e-12 * abs(best))).tolist()
    settings = candidate.settings
    ordered = sorted(tied, key=lambda i: (settings[i].get("lr", 0.0), sorted(settings[i].items()), i))
    return ordered[(len(ordered) - 1) // 2]


def _entry(
    candidate: Candidate,
    tuning: slice,
    reporting: slice,
    higher_is_better: bool,
    confidence: float,
    resamples: int,
    rng_seed: int,
) -> Entry:
    tuned = tuned_configuration(candidate, tuning, higher_is_better)
    scores = candidate.scores[tuned, reporting]
    finished = scores[~np.isnan(scores)]
    low, high, alternatives = _learning_rates(candidate, tuned, reporting, higher_is_better)
    entry = Entry(
        label=candidate.label,
        configuration=tuned,
        setting=dict(candidate.settings[tuned]),
        mean=float(finished.mean()) if finished.size else math.nan,
        interval=bootstrap_interval(finished, confidence=confidence, resamples=resamples, rng_seed=rng_seed),
        scores=tuple(float(score) for score in scores),
        seeds_reported=scores.size,
        diverged=int(scores.size - finished.size),
        lr_low=low,
        lr_high=high,
        lr_decades=math.log10(high / low) if low and high else None,
        lr_alternatives=alternatives,
        on_edge=_edges(candidate.settings, tuned),
        optimizer=candidate.optimizer,
        loss=candidate.loss,
    )
    lowest = min((setting["lr"] for setting in candidate.settings if "lr" in setting), default=None)
    return replace(entry, advice=sentences.advice(entry, lowest))


def _learning_rates(
    candidate: Candidate, tuned: int, reporting: slice, higher_is_better: bool
) -> tuple[float | None, float | None, int]:
    """The ends of the unbroken range of lr within 5 % of the tuned one, and how many others there are."""
    here = candidate.settings[tuned]
    if "lr" not in here:
        return None, None, 0
    others = {name: value for name, value in here.items() if name != "lr"}
    row = [
        index
        for index, there in enumerate(candidate.settings)
        if "lr" in there and {name: value for name, value in there.items() if name != "lr"} == others
    ]
    row.sort(key=lambda index: candidate.settings[index]["lr"])
    # A mean over seeds of which one diverged is NaN, and NaN is within 5 % of nothing.
    means = candidate.scores[:, reporting].mean(axis=1) * (-1 if higher_is_better else 1)
    limit = means[tuned] + TOLERANCE * abs(means[tuned])
    if math.isnan(limit):
        return None, None, len(row) - 1
    low = high = row.index(tuned)
    while low > 0 and means[row[low - 1]] <= limit:
        low -= 1
    while high < len(row) - 1 and means[row[high + 1]] <= limit:
        high += 1
    return float(candidate.settings[row[low]]["lr"]), float(candidate.settings[row[high]]["lr"]), len(row) - 1


def _edges(settings: Sequence[Mapping[str, float]], tuned: int) -> tuple[tuple[str, str], ...]:
    found = []
    for name, value in settings[tuned].items():
        grid = sorted({setting[name] for setting in settings if name in setting})
        if len(grid) < ON_EDGE_FROM:
            continue
        if value == grid[-1]:
            found.append((name, "high"))
        elif value == grid[0] and value != 0:
            found.append((name, "low"))
    return tuple(found)


def _check(candidates: Sequence[Candidate], seeds: Sequence[int]) -> None:
    if not candidates:
        raise ValueError("There are no candidates to rank; give at least one.")
    if len(seeds) == 0:
        raise ValueError("There are no seeds; give the seeds of the columns of the scores.")
    labels = [candidate.label for candidate in candidates]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"Two candidates are called {twice[0]!r}; each needs a label of its own.")
    for candidate in candidates:
        if candidate.scores.shape[1] != len(seeds):
            raise ValueError(
                f"{candidate.label!r} has scores of {candidate.scores.shape[1]} seeds, "
                f"but {len(seeds)} seeds are given."
            )
