"""What "see it move" trains is a plain loop, and what it says of learning rates is a law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fallline.lessons import descent
from fallline.lessons.descent import INPUTS, TARGETS, Descent, Settings, critical_rate, expected, outcome

X = torch.tensor(INPUTS, dtype=torch.float64).unsqueeze(1)
Y = torch.tensor(TARGETS, dtype=torch.float64).unsqueeze(1)
STARTS = st.floats(-5, 5)


def trained(chosen: Settings) -> Descent:
    run = Descent(chosen)
    assert all(len(point) == 4 for point in run.epochs(chosen.epochs))
    return run


def test_the_curvature_is_that_of_autograd() -> None:
    def loss(parameters: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(parameters[0] * X + parameters[1], Y)

    hessian = torch.autograd.functional.hessian(loss, torch.tensor([0.3, -0.2], dtype=torch.float64)).numpy()
    ww, wb, bb = descent.hessian()
    np.testing.assert_allclose(hessian, [[ww, wb], [wb, bb]])
    largest = np.linalg.eigvalsh(hessian).max()
    assert critical_rate(Settings()) == pytest.approx(2 / largest)
    assert critical_rate(Settings(momentum=0.9)) == pytest.approx(3.8 / largest)


@given(STARTS, STARTS, st.floats(0, 0.95), st.booleans())
@settings(deadline=None, max_examples=30)
def test_it_diverges_exactly_beyond_the_critical_rate(weight: float, bias: float, momentum: float, above: bool) -> None:
    # Not where the steepest direction has nothing to lose.
    assume(abs(0.9104 * (weight - 2) + 0.4137 * bias) > 0.5)
    critical = critical_rate(Settings(momentum=momentum))
    assert critical is not None
    lr = critical * (1.02 if above else 0.98)
    run = trained(Settings(lr=lr, momentum=momentum, weight=weight, bias=bias, epochs=2000))
    assert (run.losses[-1] > run.losses[0]) is above
    told = outcome(run.settings, run.losses)
    assert (told["kind"] == "diverged") is above
    assert ("expected" in told["text"]) is above
    assert ("must diverge" in expected(run.settings)) is above


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam"])
def test_it_is_a_plain_loop(name: str, batch: int, momentum: float) -> None:
    chosen = Settings(optimizer=name, lr=0.02, momentum=momentum, batch=batch, epochs=7, weight=0.3, bias=1.2, seed=3)
    run = Descent(chosen)
    points = list(run.epochs(7))
    w, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 1.2))
    optimizer: Any = {
        "sgd": lambda: torch.optim.SGD([w, b], lr=0.02, momentum=momentum),
        "rmsprop": lambda: torch.optim.RMSprop([w, b], lr=0.02, momentum=momentum),
        "adam": lambda: torch.optim.Adam([w, b], lr=0.02),
    }[name]()
    generator = torch.Generator().manual_seed(3)
    for epoch in range(7):
        order = torch.randperm(3, generator=generator)
        for start in range(0, 3, batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            ((w * X[rows] + b - Y[rows]) ** 2).mean().backward()
            optimizer.step()
        loss = ((w * X + b - Y) ** 2).mean().item()
        assert points[epoch][0] == epoch + 1
        np.testing.assert_allclose(points[epoch][1:], [w.item(), b.item(), loss], rtol=1e-12)
    assert abs(points[-1][1] - 0.3) > 0.01, "it moved"


def test_every_end_is_told_for_what_it_is() -> None:
    arrived = trained(Settings(lr=0.1, epochs=500))
    assert outcome(arrived.settings, arrived.losses)["kind"] == "arrived"
    slow = trained(Settings(lr=0.001))
    assert outcome(slow.settings, slow.losses)["kind"] == "on the way"
    lost = trained(Settings(lr=5.0, epochs=500))
    assert len(lost.losses) < 30, "it ends when there is nothing left to see"
    growing = trained(Settings(lr=0.19, epochs=20))
    for run in (lost, growing):
        told = outcome(run.settings, run.losses)
        assert told["kind"] == "diverged"
        assert f"lr {run.settings.lr:g} is above 2/λmax = 0.1803: expected" in told["text"]
    for run in (arrived, slow, lost, growing):
        assert "nan" not in outcome(run.settings, run.losses)["text"].lower()
        assert "inf" not in outcome(run.settings, run.losses)["text"].lower()


def test_without_a_law_none_is_claimed() -> None:
    for chosen in (Settings(optimizer="adam"), Settings(optimizer="rmsprop"), Settings(batch=1)):
        assert critical_rate(chosen) is None
        assert "must" not in expected(chosen)
    assert "with all the points it is 2/λmax = 0.1803" in expected(Settings(batch=1))
    assert "it is 2(1 + β)/λmax = 0.3426" in expected(Settings(batch=2, momentum=0.9))
    wild = trained(Settings(lr=0.3, batch=1, epochs=500))
    told = outcome(wild.settings, wild.losses)
    assert told["kind"] == "diverged"
    assert "expected" not in told["text"]


@pytest.mark.parametrize(
    "given", [{"momentum": 0.99, "factor": 0.999, "epochs": 60}, {"momentum": 0.5, "factor": 0.9, "epochs": 1}]
)
def test_a_rise_below_the_bound_is_not_taken_for_divergence(given: dict[str, Any]) -> None:
    critical = critical_rate(Settings(momentum=given["momentum"]))
    assert critical is not None
    run = trained(Settings(lr=given["factor"] * critical, momentum=given["momentum"], epochs=given["epochs"]))
    assert run.losses[-1] > run.losses[0]
    assert outcome(run.settings, run.losses)["kind"] == "on the way"
    assert "cannot diverge" in expected(run.settings)


def test_on_the_valleys_floor_nothing_is_claimed() -> None:
    run = trained(Settings(lr=0.19, weight=2, bias=0, epochs=50))
    assert outcome(run.settings, run.losses)["kind"] == "arrived"
    assert "unless it starts on the valley's floor" in expected(run.settings)


def test_what_is_beyond_all_numbers_is_none() -> None:
    run = Descent(Settings(lr=1000.0, epochs=3))
    run.losses[-1] = math.inf
    assert run.point()[3] is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr": 0}, "lr = 0 must lie between"),
        ({"lr": math.nan}, "lr = nan must be a number"),
        ({"lr": math.inf}, "lr = inf must be a number"),
        ({"lr": 10**400}, "must be a number"),
        ({"lr": "0.1"}, "lr = '0.1' must be a number"),
        ({"lr": True}, "lr = True must be a number"),
        ({"momentum": 1.0}, "momentum = 1 must lie between"),
        ({"batch": 4}, "batch = 4 must lie between"),
        ({"batch": 1.5}, "batch = 1.5 must be a whole number"),
        ({"epochs": 2001}, "epochs = 2001 must lie between"),
        ({"weight": -101}, "weight = -101 must lie between"),
        ({"optimizer": "lion"}, "optimizer = 'lion' must be one of sgd, rmsprop, adam"),
        ({"optimizer": ["sgd"]}, "must be one of"),
        ({"speed": 1}, "no setting 'speed'"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Settings.of(given)


def test_a_run_is_made_a_few_epochs_at_a_time() -> None:
    begun = descent.start({"lr": 0.05, "epochs": 10})
    assert [point[0] for point in begun["points"]] == [0]
    steps = [descent.advance(4) for _ in range(3)]
    assert [point[0] for step in steps for point in step["points"]] == list(range(1, 11))
    assert [step["done"] for step in steps] == [False, False, True]
    assert "outcome" not in steps[0]
    assert steps[2]["outcome"]["kind"] == "on the way"
