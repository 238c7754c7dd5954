"""The tools of a comparison, against scipy, against hand calculations, and against simulated truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fallline.evidence.statistics import (
    bootstrap_interval,
    expanded_level,
    holm,
    paired_advantage,
    probability_better,
    seeds_for_difference,
    seeds_for_significance,
    sign_flip_test,
)

NAN = float("nan")


def test_the_interval_is_scipys_bca_at_the_expanded_level() -> None:
    scores = np.random.default_rng(1).gamma(2.0, size=9)
    reference = stats.bootstrap(
        (scores,),
        np.mean,
        method="BCa",
        n_resamples=10_000,
        confidence_level=expanded_level(0.95, 9),
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert bootstrap_interval(scores) == pytest.approx((reference.low, reference.high), rel=2e-3)


def test_the_expanded_level_restores_students_interval_for_a_normal_bootstrap() -> None:
    count = 7
    quantile = stats.norm.ppf((1 + expanded_level(0.95, count)) / 2)
    assert quantile * math.sqrt((count - 1) / count) == pytest.approx(stats.t.ppf(0.975, count - 1))


@pytest.mark.parametrize(("count", "at_least"), [(7, 0.92), (20, 0.93)])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(count: int, at_least: float) -> None:
    rng = np.random.default_rng(5)
    simulations = 500
    hits = 0
    for _ in range(simulations):
        interval = bootstrap_interval(rng.normal(0.9, 0.02, count), resamples=4000)
        assert interval is not None
        hits += interval[0] <= 0.9 <= interval[1]
    # The standard error of 500 simulations is 1 %; plain BCa covers 89 % with seven scores, 93 % with twenty.
    assert at_least <= hits / simulations <= 0.975


@pytest.mark.parametrize("scores", [[0.5] * 5, [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0, 0.0]])
def test_equal_scores_give_a_point_and_no_warning(scores: list[float]) -> None:
    low, high = bootstrap_interval(scores) or (NAN, NAN)
    assert low == high == pytest.approx(scores[0])


@pytest.mark.parametrize(
    "scores", [[1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1e-9], [1e200, 2e200, 4e200], [0.0, 1e-300, 1e-300]]
)
def test_nearly_degenerate_scores_give_a_finite_interval_around_the_mean(scores: list[float]) -> None:
    low, high = bootstrap_interval(scores, resamples=500) or (NAN, NAN)
    assert min(scores) <= low <= np.mean(scores) <= high <= max(scores) * (1 + 1e-12)


def test_two_scores_have_no_interval_and_no_probability() -> None:
    assert bootstrap_interval([0.1, 0.2]) is None
    assert probability_better([0.1, 0.2], [0.3, 0.4], higher_is_better=True) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([0.1, NAN, 0.2]), "not finite"),
        (lambda: bootstrap_interval([0.1, 0.2, 0.3], confidence=95), "between 0 and 1"),
        (lambda: bootstrap_interval([[0.1, 0.2, 0.3]]), r"shape \(1, 3\)"),
        (lambda: sign_flip_test([1.0, 2.0], [1.0]), "2 scores against 1"),
    ],
)
def test_what_no_statistic_can_be_made_of_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("count", [3, 5, 7, 11])
def test_the_sign_flip_test_is_scipys_exact_permutation_test(count: int) -> None:
    rng = np.random.default_rng(count)
    ours, theirs = rng.normal(0.3, 1, count), rng.normal(0, 1, count)
    reference = stats.permutation_test(
        (ours, theirs), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(ours, theirs) == pytest.approx(reference.pvalue, abs=1e-12)


def test_beyond_fourteen_pairs_sampling_comes_close_to_the_exact_value() -> None:
    rng = np.random.default_rng(2)
    difference = rng.normal(0.35, 1, 16)
    signs = np.array(list(itertools.product([-1, 1], repeat=16)))
    exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12)
    assert 0.02 < exact < 0.98
    assert sign_flip_test(difference, np.zeros(16)) == pytest.approx(exact, abs=0.015)


def test_the_smallest_sampled_p_value_is_never_zero() -> None:
    assert sign_flip_test(np.ones(20), np.zeros(20), resamples=99) == pytest.approx(0.01)


@pytest.mark.parametrize("count", [1, 3, 5, 6, 8])
def test_n_pairs_cannot_give_less_than_two_to_the_one_minus_n(count: int) -> None:
    assert sign_flip_test(np.arange(1.0, count + 1), np.zeros(count)) == 2.0 ** (1 - count)


def test_under_the_null_the_p_value_falls_below_a_twentieth_in_a_twentieth_of_cases() -> None:
    rng = np.random.default_rng(11)
    below = np.mean([sign_flip_test(rng.normal(size=9), rng.normal(size=9)) <= 0.05 for _ in range(600)])
    assert 0.03 <= below <= 0.07


def test_a_pair_of_which_one_diverged_outweighs_all_scores() -> None:
    ours, theirs = [0.9, 0.9, 0.9], [NAN, 5.0, 9.0]
    assert probability_better(ours, theirs, higher_is_better=True, resamples=2000) == pytest.approx(
        1 - (2 / 3) ** 3, abs=0.04
    )
    # One pair differs: both of its signs are as far from zero as what was seen.
    assert sign_flip_test([0.9, NAN, 0.5], [NAN, NAN, 0.5], higher_is_better=True) == 1.0
    assert sign_flip_test([0.9] * 6, [NAN] * 6, higher_is_better=True) == 2.0**-5


def test_paired_advantage_points_towards_the_better_side() -> None:
    diverged, gains = paired_advantage([1.0, NAN, NAN, 2.0], [3.0, 1.0, NAN, NAN], higher_is_better=False)
    assert diverged.tolist() == [0.0, -1.0, 0.0, 1.0]
    assert gains.tolist() == [2.0, 0.0, 0.0, 0.0]


def test_the_probability_of_three_seeds_can_be_counted_by_hand() -> None:
    # Differences -1, -1, 3: of the 27 resamples, the 8 without the third seed have a negative sum.
    assert probability_better(
        [0.0, 0.0, 3.0], [1.0, 1.0, 0.0], higher_is_better=True, resamples=40_000
    ) == pytest.approx(19 / 27, abs=0.01)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.8]) == (1.0, 1.0)
    assert holm([]) == ()


def test_how_many_seeds_a_test_needs() -> None:
    assert [seeds_for_significance(m) for m in (1, 2, 3, 4, 8)] == [6, 7, 7, 8, 9]
    rng = np.random.default_rng(3)
    shift = rng.normal(0.5, 1, 30)
    needed = seeds_for_difference(shift, np.zeros(30))
    assert needed is not None
    d, s = shift.mean(), shift.std(ddof=1)
    assert needed == math.ceil(((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * s / d) ** 2)
    assert seeds_for_difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == 6  # never less than the test itself needs


scores = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=3, max_size=8)


@settings(max_examples=40, deadline=None)
@given(scores, scores)
def test_swapping_sides_keeps_p_and_turns_the_probability_round(a: list[float], b: list[float]) -> None:
    count = min(len(a), len(b))
    a, b = a[:count], b[:count]
    assert sign_flip_test(a, b) == sign_flip_test(b, a)
    forth = probability_better(a, b, higher_is_better=True, resamples=300)
    back = probability_better(b, a, higher_is_better=True, resamples=300)
    other = probability_better(a, b, higher_is_better=False, resamples=300)
    assert forth == pytest.approx(1 - back) == pytest.approx(1 - other)


@settings(max_examples=25, deadline=None)
@given(scores)
def test_the_interval_holds_the_mean_and_stays_within_the_scores(values: list[float]) -> None:
    low, high = bootstrap_interval(values, resamples=300) or (NAN, NAN)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= low <= np.mean(values) + slack
    assert np.mean(values) - slack <= high <= max(values) + slack
