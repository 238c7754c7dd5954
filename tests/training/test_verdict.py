"""The verdict on real, short runs and on drawn curves: each outcome where it belongs, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

import fallline as fl
from fallline.training.verdict import Outcome, verdict

ADVICE = {
    Outcome.CONVERGED: "More steps",
    Outcome.STILL_IMPROVING: "Train for more steps",
    Outcome.TOO_SLOW: "three to ten times higher",
    Outcome.UNSTABLE: "three to ten times lower",
    Outcome.DIVERGED: "three to ten times lower",
}
LINE = [
    (1e-6, Outcome.TOO_SLOW),
    (1e-5, Outcome.TOO_SLOW),
    (1e-3, Outcome.STILL_IMPROVING),
    (0.01, Outcome.STILL_IMPROVING),
    (0.1, Outcome.CONVERGED),
    (0.2, Outcome.UNSTABLE),
    (0.3, Outcome.DIVERGED),
]
DIGITS = [
    (1e-6, Outcome.TOO_SLOW),
    (1e-4, Outcome.TOO_SLOW),
    (1e-3, Outcome.TOO_SLOW),
    (0.03, Outcome.STILL_IMPROVING),
    (0.1, Outcome.STILL_IMPROVING),
    (3.0, Outcome.UNSTABLE),
    (100.0, Outcome.UNSTABLE),
]


@pytest.mark.parametrize(("lr", "outcome"), LINE)
def test_a_line_by_sgd(lr: float, outcome: Outcome):
    found = fl.fit(fl.tasks.line(), fl.optim.sgd(lr=lr), epochs=200).verdict
    assert found.outcome is outcome, found.sentence
    assert ADVICE[outcome] in found.sentence
    assert (found.step is not None) == (outcome is Outcome.DIVERGED)


@pytest.mark.parametrize(("lr", "outcome"), DIGITS)
def test_digits_by_sgd(lr: float, outcome: Outcome):
    found = fl.fit(fl.tasks.digits(), fl.optim.sgd(lr=lr), epochs=15).verdict
    assert found.outcome is outcome, found.sentence
    assert ADVICE[outcome] in found.sentence


def noisy(curve: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    return curve + noise * np.random.default_rng(seed).standard_normal(curve.size)


T = np.arange(1000.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("curve", "noise", "outcome"),
    [
        (2.3 / (1 + 0.01 * T), 0.01, Outcome.STILL_IMPROVING),
        (2.3 * (1 + T) ** -0.3, 0.02, Outcome.STILL_IMPROVING),
        (2.3 * (1 + T) ** -0.1, 0.02, Outcome.STILL_IMPROVING),
        (10 + 2.3 * np.exp(-T / 400), 0.01, Outcome.STILL_IMPROVING),
        (0.5 + 1.8 * np.exp(-T / 50), 0.05, Outcome.CONVERGED),
        (2.3 * np.exp(-T / 50) + 1e-4, 1e-5, Outcome.CONVERGED),
        (2.3 - 1e-5 * T, 0.05, Outcome.TOO_SLOW),
        (2.3 - 1e-4 * T, 0.01, Outcome.TOO_SLOW),
        (2.3 + 0 * T, 0.05, Outcome.TOO_SLOW),
        (np.where(T < 1, 2.3, 400 * np.exp(-T / 100) + 30), 0.5, Outcome.UNSTABLE),
        (2.3 * np.exp(-T / 100) + np.where(T > 850, 1.5, 0.02), 0.01, Outcome.UNSTABLE),
        (0.1 + 2.2 * np.exp(-T / 100) + np.maximum(0, T - 500) * 1e-3, 0.01, Outcome.UNSTABLE),
        (-3 + 4 * np.exp(-T / 50), 0.02, Outcome.CONVERGED),
        (-3 + 4 * np.exp(-T / 700), 0.02, Outcome.STILL_IMPROVING),
    ],
)
def test_drawn_curves(curve: np.ndarray, noise: float, outcome: Outcome, seed: int):
    found = verdict(noisy(curve, noise, seed), steps_per_epoch=10)
    assert found.outcome is outcome, found.sentence


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_loss_that_is_not_finite_is_named(bad: float):
    found = verdict(np.array([1.0, 0.5, bad, np.nan]), lr=0.1)
    assert (found.outcome, found.step) == (Outcome.DIVERGED, 2)
    assert "step 2" in found.sentence
    assert "lower than 0.1" in found.sentence


@pytest.mark.parametrize("losses", [[], [1.0], [2.0, 1.0], [2.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1e300, 1e300]])
def test_short_and_flat_runs_are_judged_without_an_error(losses: list[float]):
    assert verdict(np.array(losses)).sentence
