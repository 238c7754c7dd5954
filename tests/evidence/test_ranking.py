"""The ranking protocol: which configuration is chosen, which seeds report it, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallline.evidence import Candidate, Ranking, rank
from fallline.evidence.ranking import tuned_configuration

NAN = float("nan")


def candidate(label: str, rows: Sequence[Sequence[float]], lrs: Sequence[float] | None = None) -> Candidate:
    lrs = [10.0**-i for i in range(len(rows))][::-1] if lrs is None else lrs
    return Candidate(label, np.array(rows, dtype=float), [{"lr": lr} for lr in lrs])


def ranked(*candidates: Candidate, higher: bool = True, metric: str = "accuracy") -> Ranking:
    seeds = range(candidates[0].scores.shape[1])
    return rank(candidates, seeds=seeds, higher_is_better=higher, metric=metric, resamples=500)


def noisy(label: str, top: float, seeds: int = 12, noise: float = 0.002, seed: int = 0) -> Candidate:
    rng = np.random.default_rng([seed, len(label)])
    return candidate(label, top - np.array([[0.05], [0.0], [0.08]]) + rng.normal(0, noise, (3, seeds)))


def test_the_first_third_of_the_seeds_tunes_and_the_others_report() -> None:
    # Configuration 0 shines on the tuning seeds alone, configuration 1 on all the others.
    rows = [[0.9, 0.9, 0.1, 0.1, 0.2, 0.3, 0.1], [0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9]]
    ranking = ranked(candidate("a", rows))
    assert (ranking.tuning_seeds, ranking.reporting_seeds) == ((0, 1), (2, 3, 4, 5, 6))
    entry = ranking[0]
    assert entry.configuration == 0
    assert entry.mean == pytest.approx(0.16)
    assert entry.scores == (0.1, 0.1, 0.2, 0.3, 0.1)
    assert not ranking.selection_bias


@pytest.mark.parametrize(("seeds", "tuning"), [(2, 1), (3, 1), (5, 1), (6, 2), (10, 3)])
def test_how_many_seeds_tune(seeds: int, tuning: int) -> None:
    ranking = ranked(noisy("a", 0.9, seeds=seeds))
    assert (len(ranking.tuning_seeds), len(ranking.reporting_seeds)) == (tuning, seeds - tuning)


def test_a_single_seed_does_both_and_says_so() -> None:
    ranking = ranked(candidate("a", [[0.5], [0.6]]), candidate("b", [[0.4], [0.3]]))
    assert ranking.selection_bias
    assert ranking.tuning_seeds == ranking.reporting_seeds == (0,)
    assert ranking[0].interval is None
    assert ranking[0].beats_next is None
    assert "too good" in ranking.sentence
    assert "not enough seeds" in str(ranking)


def test_a_configuration_with_a_diverged_tuning_seed_is_worse_than_any_other() -> None:
    rows = [[0.2] * 6, [0.9, NAN, 0.9, 0.9, 0.9, 0.9]]
    assert ranked(candidate("a", rows))[0].configuration == 0
    assert ranked(candidate("a", rows), higher=False)[0].configuration == 0


def test_infinity_counts_as_diverged() -> None:
    assert ranked(candidate("a", [[0.2] * 6, [math.inf] * 6]), higher=True)[0].configuration == 0


def test_ties_go_to_the_middle_of_the_tied_learning_rates_in_whatever_order_they_come() -> None:
    lrs = [1e-1, 1e-4, 1e-2, 1e-3, 1.0]
    tied = {1e-4, 1e-3, 1e-2}
    shifted = [0.1 + 0.2 if lr == 1e-4 else 0.3 for lr in lrs]  # equal up to round-off
    rows = [[value if lr in tied else 0.1] * 6 for lr, value in zip(lrs, shifted, strict=True)]
    assert ranked(candidate("a", rows, lrs))[0].setting == {"lr": 1e-3}
    # Of four, the lower of the two in the middle.
    rows[0] = [0.3] * 6
    assert ranked(candidate("a", rows, lrs))[0].setting == {"lr": 1e-3}


def test_lower_is_better_turns_choice_and_order_round() -> None:
    a, b = candidate("a", [[3.0] * 6, [1.0] * 6]), candidate("b", [[2.0] * 6, [4.0] * 6])
    low, high = ranked(a, b, higher=False, metric="mse"), ranked(a, b, higher=True)
    assert [(e.label, e.mean) for e in low] == [("a", 1.0), ("b", 2.0)]
    assert [(e.label, e.mean) for e in high] == [("b", 4.0), ("a", 3.0)]


def test_diverging_while_reporting_counts_as_worse_than_any_score_and_is_in_no_mean() -> None:
    shaky = candidate("shaky", [[0.99, 0.99, 0.98, 0.99, NAN, 0.97]])
    steady = candidate("steady", [[0.5, 0.5, 0.5, 0.6, 0.4, 0.5]])
    ranking = ranked(shaky, steady)
    assert [entry.label for entry in ranking] == ["steady", "shaky"]
    assert (ranking[1].diverged, ranking[1].seeds_reported) == (1, 4)
    assert ranking[1].mean == pytest.approx(0.98)
    assert "diverged on 1 of 4 reporting seeds" in ranking[1].advice


def test_what_always_diverged_comes_last_with_a_sentence() -> None:
    ranking = ranked(candidate("lost", [[NAN] * 6] * 2, [0.3, 3.0]), noisy("fine", 0.9, seeds=6))
    assert [entry.label for entry in ranking] == ["fine", "lost"]
    lost = ranking[1]
    assert math.isnan(lost.mean)
    assert lost.interval is None
    assert lost.lr_decades is None
    assert lost.advice == "It diverged on every seed: search learning rates below 0.3."
    alone = ranked(candidate("lost", [[NAN] * 6]))
    assert alone.sentence.startswith("Every optimizer diverged at its best configuration. Search lower")


def test_the_range_of_learning_rates_is_unbroken_and_within_five_percent() -> None:
    lrs = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    accuracy = [0.98, 0.90, 0.96, 1.00, 0.95, 0.94]  # 1e-4 is good again, but beyond a gap
    entry = ranked(candidate("a", [[value] * 6 for value in accuracy], lrs))[0]
    assert (entry.lr_low, entry.lr_high, entry.lr_decades) == (1e-2, 1.0, pytest.approx(2.0))
    error = [1.06, 1.05, 1.00, 1.04, 1.051, 1.0001]
    entry = ranked(candidate("a", [[value] * 6 for value in error], lrs), higher=False)[0]
    assert (entry.lr_low, entry.lr_high) == (1e-3, 1e-1)
    negative = [-0.94, -0.95, -1.0, -0.9, -0.1, -0.1]
    entry = ranked(candidate("a", [[value] * 6 for value in negative], lrs), higher=False)[0]
    assert (entry.lr_low, entry.lr_high) == (1e-3, 1e-2)


def test_a_learning_rate_at_which_a_reporting_seed_diverged_ends_the_range() -> None:
    rows = [[0.9] * 6, [0.9, 0.9, 0.9, 0.9, 0.9, NAN], [1.0, 0.91, 0.91, 0.91, 0.91, 0.91], [0.9] * 6]
    entry = ranked(candidate("a", rows, [1e-4, 1e-3, 1e-2, 1e-1]))[0]
    assert (entry.lr_low, entry.lr_high) == (1e-2, 1e-1)


def test_the_range_is_judged_on_the_reporting_seeds() -> None:
    # Ten times the rate is poor on the tuning seeds alone, a tenth of it on the reporting seeds alone.
    rows = [[0.90, 0.90, 0.5, 0.5, 0.5, 0.5], [0.91] * 6, [0.1, 0.1, 0.90, 0.90, 0.90, 0.90]]
    entry = ranked(candidate("a", rows, [1e-3, 1e-2, 1e-1]))[0]
    assert (entry.lr_low, entry.lr_high) == (1e-2, 1e-1)


def test_the_range_holds_the_other_hyperparameters_at_their_tuned_values() -> None:
    cells = [({"lr": lr, "momentum": m}, 1.0 if m == 0.9 else 0.2) for m in (0.0, 0.9) for lr in (0.01, 0.1, 1.0)]
    scores = np.array(
        [[value - (0.5 if s["lr"] == 1.0 else 0.0) - (0.001 if s["lr"] == 0.1 else 0)] * 6 for s, value in cells]
    )
    entry = rank(
        [Candidate("a", scores, [s for s, _ in cells])],
        seeds=range(6),
        higher_is_better=True,
        metric="accuracy",
    )[0]
    assert entry.setting == {"lr": 0.01, "momentum": 0.9}
    assert (entry.lr_low, entry.lr_high, entry.lr_alternatives) == (0.01, 0.1, 2)


def edges(values: Sequence[float], best: int, name: str = "lr") -> tuple[tuple[str, str], ...]:
    scores = np.array([[1.0 if i == best else 0.5] * 3 for i in range(len(values))])
    settings = [{name: value} for value in values]
    return rank([Candidate("a", scores, settings)], seeds=range(3), higher_is_better=True, metric="m")[0].on_edge


def test_a_best_value_on_the_edge_of_its_grid_is_flagged() -> None:
    assert edges([0.3, 0.1, 0.2], 0) == (("lr", "high"),)
    assert edges([0.3, 0.1, 0.2], 1) == (("lr", "low"),)
    assert edges([0.3, 0.1, 0.2], 2) == ()


def test_a_grid_of_two_has_no_inside_and_zero_is_the_end_of_the_domain() -> None:
    assert edges([0.1, 0.2], 1) == ()
    assert edges([0.0, 0.5, 0.9], 0, "momentum") == ()
    assert edges([0.0, 0.5, 0.9], 2, "momentum") == (("momentum", "high"),)


def test_p_values_are_adjusted_over_neighbours_and_over_pairs_with_the_winner() -> None:
    seeds = 12  # 8 report: the smallest p is 2 / 256
    ranking = ranked(*(noisy("x" * (i + 1), 0.9 - 0.1 * i, seeds=seeds) for i in range(4)))
    smallest = 2 / 2**8
    assert [e.p_value for e in ranking] == [pytest.approx(3 * smallest)] * 3 + [None]
    assert [e.p_value_to_best for e in ranking] == [None] + [pytest.approx(3 * smallest)] * 3
    assert [e.beats_next for e in ranking] == [1.0, 1.0, 1.0, None]


def test_a_clear_winner_is_named_in_one_sentence() -> None:
    sentence = ranked(noisy("adam", 0.97), noisy("rmsprop", 0.9)).sentence
    assert sentence.startswith("adam at lr 0.1 reaches an accuracy of 0.9699 (95 % interval 0.9679 to 0.9720)")
    assert sentence.endswith("and beats rmsprop with probability more than 0.99.")


def test_too_few_seeds_are_no_evidence_and_the_sentence_says_how_many_are_needed() -> None:
    sentence = ranked(noisy("adam", 0.97, seeds=7), noisy("rmsprop", 0.9, seeds=7)).sentence
    assert sentence.startswith("No evidence that adam beats rmsprop: adam at lr 0.1 reaches")
    # Two candidates: six reporting seeds can show something, and 6 = 8 - 8 // 3; eight report of eleven.
    assert "5 reporting seeds cannot show a difference among 2 candidates" in sentence
    assert "at least 8 seeds are needed (6 of them reporting), 11 are better" in sentence


def test_a_difference_within_the_noise_is_no_evidence_and_the_sentence_says_what_it_would_take() -> None:
    rng = np.random.default_rng(4)
    a = candidate("adam", [0.9 + rng.normal(0, 0.02, 12)])
    b = candidate("sgd", [0.895 + rng.normal(0, 0.02, 12)])
    sentence = ranked(a, b).sentence
    assert sentence.startswith("No evidence that")
    assert "common by chance" in sentence
    assert "reporting seeds" in sentence


def test_one_candidate_is_described_without_a_comparison() -> None:
    ranking = ranked(noisy("adam", 0.97))
    assert "beats" not in ranking.sentence
    assert (ranking[0].beats_next, ranking[0].p_value) == (None, None)


def test_it_prints_as_a_table() -> None:
    lines = str(ranked(noisy("adam", 0.97), noisy("sgd", 0.9))).splitlines()
    assert len(lines) == 3
    assert "P(beats next)" in lines[0]
    assert lines[1].startswith("1  adam")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: ([], [0]), "no candidates"),
        (lambda: ([noisy("a", 0.9)], []), "no seeds"),
        (lambda: ([noisy("a", 0.9), noisy("a", 0.8)], range(12)), "called 'a'"),
        (lambda: ([noisy("a", 0.9)], range(4)), "12 seeds, but 4"),
        (lambda: ([Candidate("a", np.zeros(3), [{}] * 3)], range(3)), r"shape \(3,\)"),
        (lambda: ([Candidate("a", np.zeros((2, 3)), [{}])], range(3)), "2 rows of scores and 1 settings"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(arguments()[0], seeds=arguments()[1], higher_is_better=True, metric="m")


tables = st.lists(
    st.lists(
        st.lists(st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0, 2.0, NAN]), min_size=6, max_size=6),
        min_size=3,
        max_size=3,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_candidates_and_configurations_plays_no_part(rows, random) -> None:
    lrs = [0.01, 0.1, 1.0]
    first = [candidate(f"c{i}", table, lrs) for i, table in enumerate(rows)]
    order = random.sample(range(3), 3)
    second = [Candidate(c.label, c.scores[order], [c.settings[i] for i in order]) for c in first]
    random.shuffle(second)
    for a, b in zip(ranked(*first), ranked(*second), strict=True):
        assert (a.label, a.setting, a.interval, a.beats_next, a.p_value) == (
            b.label,
            b.setting,
            b.interval,
            b.beats_next,
            b.p_value,
        )


@settings(max_examples=25, deadline=None)
@given(tables, st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**30]))
def test_scaling_an_error_changes_nothing_but_its_values(rows, factor: float) -> None:
    plain = ranked(*(candidate(f"c{i}", table) for i, table in enumerate(rows)), higher=False)
    scaled = ranked(*(candidate(f"c{i}", factor * np.array(table)) for i, table in enumerate(rows)), higher=False)
    for a, b in zip(plain, scaled, strict=True):
        assert (a.label, a.setting, a.beats_next, a.p_value) == (b.label, b.setting, b.beats_next, b.p_value)
        assert (a.lr_low, a.lr_high, a.on_edge) == (b.lr_low, b.lr_high, b.on_edge)
        assert b.mean == pytest.approx(factor * a.mean, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(tables)
def test_a_diverged_seed_never_helps(rows) -> None:
    table = np.array(rows[0])
    harmed = table.copy()
    harmed[:, -1] = NAN
    steady = candidate("steady", [[0.3] * 6])
    before = [e.label for e in ranked(candidate("a", table), steady)]
    after = [e.label for e in ranked(candidate("a", harmed), steady)]
    assert after.index("a") >= before.index("a")


def test_tuning_looks_at_no_reporting_seed() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 9))
    other = scores.copy()
    other[:, 3:] = rng.normal(size=(5, 6))
    settings = [{"lr": float(i + 1)} for i in range(5)]
    chosen = {tuned_configuration(Candidate("a", table, settings), slice(0, 3), True) for table in (scores, other)}
    assert len(chosen) == 1
