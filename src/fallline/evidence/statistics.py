"""The four tools of a fair comparison: an interval, a probability, a test, a correction for many tests.

All of them work on plain arrays of scores, one number per seed. The comparisons are *paired*: the same seed
gave both candidates the same data order, so their difference is what carries the information. How the tools
are put together into a ranking is told in `ranking`.

A trial that diverged has no score. Paired comparisons see it as NaN and treat it as the limit of a score that
is
worse than every other: whoever diverges on fewer seeds is better, and only between equals do the scores
count.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ENUMERATED = 14
"""Up to this many pairs every one of the 2**n sign patterns is tried; beyond, patterns are sampled."""

FEWEST_SEEDS = 3
"""With fewer scores than this, neither an interval nor a probability means anything."""


def bootstrap_interval(
    scores: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, rng_seed: int = 0
) -> tuple[float, float] | None:
    """The bias-corrected and accelerated (BCa) bootstrap interval of the mean, widened for few scores.

    A bootstrap of n scores is too narrow by a factor sqrt((n - 1) / n) and takes normal quantiles where
    Student's belong: a nominal 95 % interval of seven normal scores covers their mean in 89 % of simulations,
    this one in 94 %. So BCa is asked for the level 1 - 2 Φ(-sqrt(n / (n - 1)) t), t being Student's quantile
    at (1 + confidence) / 2 with n - 1 degrees of freedom, which makes up for both. The interval never leaves
    the range of the scores.

    Args:
        scores: [seed], finite.
        confidence: the share of such intervals that should hold the true mean, in (0, 1).
        resamples: how many bootstrap samples are drawn.
        rng_seed: seed of the resampling; equal arguments give equal intervals.

    Returns:
        (low, high); a point where all scores are equal; None with fewer than three scores.

    Raises:
        ValueError: a score is not finite, or the confidence is outside (0, 1).

    >>> low, high = bootstrap_interval([0.97, 0.98, 0.96, 0.97, 0.99])
    >>> 0.96 <= low < 0.974 < high <= 0.99
    True
    >>> bootstrap_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    >>> bootstrap_interval([0.97, 0.98]) is None
    True

    Source: Efron, "Better bootstrap confidence intervals", JASA 82 (1987), as in `scipy.stats.bootstrap`; the
    widening is the "expanded percentile" of Hesterberg, "What teachers should know about the bootstrap", Am.
    Stat. 69 (2015).
    """
    values = _vector(scores, "scores")
    if not np.isfinite(values).all():
        raise ValueError(
            "The scores hold a value that is not finite, and an interval needs finite ones: "
            "leave the diverged seeds out first."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence is {confidence}; it must lie between 0 and 1, for example 0.95.")
    if values.size < FEWEST_SEEDS:
        return None
    centre = float(values.mean())
    spread = float(np.ptp(values))
    # A spread at the level of round-off is no spread: BCa's acceleration would divide one rounding error by
    # another.
    if spread <= 1e-12 * max(abs(centre), float(np.abs(values).max())):
        return centre, centre

    from scipy import stats

    # Centred and scaled, so that the interval moves with the scores and no magnitude overflows a third power.
    standard = (values - centre) / spread
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for method in ("BCa", "percentile"):
            found = stats.bootstrap(
                (standard,),
                np.mean,
                n_resamples=resamples,
                confidence_level=expanded_level(confidence, values.size),
                method=method,
                rng=np.random.default_rng(rng_seed),
            ).confidence_interval
            low, high = float(found.low), float(found.high)
            if math.isfinite(low) and math.isfinite(high):
                break
    return centre + spread * low, centre + spread * high


def expanded_level(confidence: float, count: int) -> float:
    """The level to ask of a bootstrap of `count` scores, so that it covers like Student's interval.

    >>> round(expanded_level(0.95, 7), 3), round(expanded_level(0.95, 1000), 3)
    (0.992, 0.95)
    """
    from scipy import special

    quantile = special.stdtrit(count - 1, (1 + confidence) / 2)
    return float(1 - 2 * special.ndtr(-math.sqrt(count / (count - 1)) * quantile))


def probability_better(
    ours: ArrayLike, theirs: ArrayLike, *, higher_is_better: bool, resamples: int = 10_000, rng_seed: int = 0
) -> float | None:
    """The probability that our mean beats theirs when the seeds are drawn again (paired bootstrap).

    P = share of resampled sets of seeds on which our mean is better, plus half the share of ties. A resample
    in which one side diverged more often is lost by that side, whatever the other scores are.

    Args:
        ours, theirs: [seed], the same seeds in the same order; NaN where a trial diverged.
        higher_is_better: True for accuracies, False for errors.
        resamples: how many sets of seeds are drawn, with replacement.
        rng_seed: seed of the resampling.

    Returns:
        A probability, or None with fewer than three seeds.

    >>> probability_better([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], higher_is_better=True)
    1.0
    >>> probability_better([3.0, 4.0, 5.0], [3.0, 4.0, 5.0], higher_is_better=True)
    0.5

    Source: Bouthillier et al., "Accounting for variance in machine learning benchmarks", MLSys 2021, section
    4.
    """
    losses, gains = paired_advantage(ours, theirs, higher_is_better=higher_is_better)
    count = gains.size
    if count < FEWEST_SEEDS:
        return None
    drawn = np.random.default_rng(rng_seed).integers(count, size=(resamples, count))
    # Both diverged: neither side gains; one diverged: `losses` decides before any score does.
    fewer, advantage = losses[drawn].sum(axis=1), gains[drawn].sum(axis=1)
    tolerance = 1e-12 * np.abs(gains).sum()
    sign = np.where(fewer != 0, np.sign(fewer), np.where(np.abs(advantage) <= tolerance, 0.0, np.sign(advantage)))
    return float(((sign + 1) / 2).mean())


def paired_advantage(ours: ArrayLike, theirs: ArrayLike, *, higher_is_better: bool) -> tuple[Floats, Floats]:
    """Per seed: 1 where only they diverged, -1 where only we did; and our advantage where both finished.

    >>> paired_advantage([1.0, float("nan"), 3.0], [0.5, 1.0, float("nan")], higher_is_better=True)
    (array([ 0., -1.,  1.]), array([0.5, 0. , 0. ]))
    """
    a, b = _vector(ours, "ours"), _vector(theirs, "theirs")
    if a.shape != b.shape:
        raise ValueError(
            f"There are {a.size} scores against {b.size}; paired scores need the same seeds on both sides."
        )
    fine_a, fine_b = np.isfinite(a), np.isfinite(b)
    both = fine_a & fine_b
    difference = np.zeros(a.shape)
    np.subtract(a, b, out=difference, where=both)
    return fine_a.astype(np.float64) - fine_b, difference if higher_is_better else -difference


def sign_flip_test(
    ours: ArrayLike,
    theirs: ArrayLike,
    *,
    higher_is_better: bool = True,
    resamples: int = 10_000,
    rng_seed: int = 0,
) -> float:
    """The two-sided p-value of "both have the same mean", by flipping the signs of the paired differences.

    If seeds make no difference between the two, each difference d_i = a_i - b_i is as likely as -d_i. So

        p = share of the 2**n patterns s in {-1, 1}**n with |Σ s_i d_i| >= |Σ d_i|.

    Up to 14 pairs all the patterns are tried; beyond, p = (k + 1) / (resamples + 1) with k hits among random
    ones. The smallest p that n pairs can give is 2**(1 - n): five seeds cannot reach 0.05. Where only one
    side diverged, that pair outweighs all pairs of scores together.

    Args:
        ours, theirs: [seed], the same seeds in the same order; NaN where a trial diverged.
        higher_is_better: only matters where trials diverged.
        resamples: how many patterns are sampled for more than 14 pairs.
        rng_seed: seed of that sampling.

    >>> sign_flip_test([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])      # 2 of the 8 patterns: all plus, all minus
    0.25
    >>> sign_flip_test([1.0, 2.0], [1.0, 2.0])
    1.0

    Source: Fisher, "The design of experiments", 1935, chapter 3;
    `scipy.stats.permutation_test(permutation_type="samples")`.
    """
    losses, gains = paired_advantage(ours, theirs, higher_is_better=higher_is_better)
    largest = float(np.abs(gains).max(initial=0.0))
    scaled = gains / largest if largest > 0 else gains
    # One divergence more must outweigh every score: the scores sum to at most n in size, so 2n + 1 settles
    # it.
    difference = scaled + losses * (2 * gains.size + 1)
    count = difference.size
    observed = abs(float(difference.sum())) - 1e-9 * max(1.0, float(np.abs(difference).sum()))
    if observed <= 0:
        return 1.0
    if count <= ENUMERATED:
        patterns = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(patterns @ difference) >= observed).mean())
    patterns = 1 - 2 * np.random.default_rng(rng_seed).integers(2, size=(resamples, count))
    hits = int((np.abs(patterns @ difference) >= observed).sum())
    return (hits + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down correction: the p-values as if only one hypothesis had been tested.

    With p_(1) <= ... <= p_(m), the adjusted value of the i-th is max over j <= i of min(1, (m - j + 1)
    p_(j)).

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6 (1979).
    """
    total = len(p_values)
    adjusted = [0.0] * total
    running = 0.0
    for position, index in enumerate(sorted(range(total), key=p_values.__getitem__)):
        running = max(running, min(1.0, (total - position) * p_values[index]))
        adjusted[index] = running
    return tuple(adjusted)


def seeds_for_significance(comparisons: int, level: float = 0.05) -> int:
    """The fewest paired seeds with which a Holm-adjusted sign-flip test can fall below the level.

    The smallest p of n pairs is 2**(1 - n), and Holm multiplies the smallest of m by m.

    >>> seeds_for_significance(1), seeds_for_significance(3)
    (6, 7)
    """
    count = 1
    while max(1, comparisons) * 2.0 ** (1 - count) >= level:
        count += 1
    return count


def seeds_for_difference(
    ours: ArrayLike, theirs: ArrayLike, *, comparisons: int = 1, level: float = 0.05
) -> int | None:
    """About how many paired seeds show a difference of the size seen here in four of five repetitions.

    n = ((z_(1 - level / 2m) + z_0.8) σ / δ)², σ and δ being the standard deviation and the mean of the paired
    differences; at least what the sign-flip test needs at all. None where the mean difference is zero or
    fewer than three seeds finished on both sides.

    >>> seeds_for_difference([1.0, 2.0, 3.0, 2.0], [1.5, 1.0, 2.0, 2.5])
    95
    >>> seeds_for_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None
    True

    Source: Cohen, "Statistical power analysis for the behavioral sciences", 1988, chapter 2.
    """
    a, b = _vector(ours, "ours"), _vector(theirs, "theirs")
    both = np.isfinite(a) & np.isfinite(b)
    difference = a[both] - b[both]
    if difference.size < FEWEST_SEEDS or abs(difference.mean()) <= 1e-12 * np.abs(a[both]).max():
        return None

    from scipy import special

    quantiles = special.ndtri(1 - level / (2 * max(1, comparisons))) + special.ndtri(0.8)
    needed = math.ceil(float(quantiles * difference.std(ddof=1) / difference.mean()) ** 2)
    return max(needed, seeds_for_significance(comparisons, level))


def _vector(scores: ArrayLike, name: str) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name!r} has the shape {values.shape}; one score per seed, a vector, was expected.")
    return values
