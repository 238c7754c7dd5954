"""Schedules against torch's schedulers, step by step, and the numbers of a rule along training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import fallline as fl

schedules = fl.schedules


def torch_values(make, steps, lr=0.3):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def our_values(schedule, steps):
    return [float(schedule(k / steps)) for k in range(steps)]


def warm_then(after, warm, start):
    def make(optimizer):
        first = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=warm)
        return lr_scheduler.SequentialLR(optimizer, [first, after(optimizer)], milestones=[warm])

    return make


@settings(max_examples=30, deadline=None, derandomize=True)
@given(steps=st.integers(2, 60), size=st.integers(1, 60), factor=st.floats(0.05, 2.0))
def test_step_equals_step_lr(steps, size, factor):
    size = min(size, steps)
    expected = torch_values(lambda o: lr_scheduler.StepLR(o, step_size=size, gamma=factor), steps)
    assert our_values(schedules.step(0.3, every=size / steps, factor=factor), steps) == pytest.approx(expected)


def test_step_falls_exactly_at_the_multiples_of_its_size():
    """k/steps divided by size/steps may round to just below a whole number; the fall must not come a step late."""
    for steps in (37, 100, 131, 390):
        for size in range(1, steps):
            values = schedules.step(1.0, every=size / steps, factor=0.5)([k / steps for k in range(steps)])
            expected = 0.5 ** torch.arange(steps, dtype=torch.float64).div(size, rounding_mode="floor")
            assert torch.equal(values, expected), (steps, size)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(steps=st.integers(2, 60), end=st.floats(0.0, 0.2))
def test_cosine_equals_cosine_annealing_lr(steps, end):
    expected = torch_values(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=steps, eta_min=end), steps)
    assert our_values(schedules.cosine(0.3, end=end), steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(steps=st.integers(4, 60), share=st.floats(0.05, 0.95), start=st.floats(0.01, 1.0))
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_linear_warmup_equals_sequential_lr(steps, share, start):
    warm = min(max(1, round(share * steps)), steps - 1)
    schedule = schedules.linear_warmup(schedules.cosine(0.3, end=0.01), fraction=warm / steps, start=start)
    cosine = lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=steps - warm, eta_min=0.01)  # noqa: E731
    expected = torch_values(warm_then(cosine, warm, start), steps)
    assert our_values(schedule, steps) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_constant_is_constant():
    assert our_values(schedules.constant(0.3), 5) == [0.3] * 5


def test_warmup_alone_stays_at_its_value():
    assert our_values(schedules.linear_warmup(0.4, fraction=0.5), 4) == pytest.approx([0.0, 0.2, 0.4, 0.4])


def test_a_scheduled_optimizer_repeats_torch_with_its_scheduler():
    p = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    q = nn.Parameter(p["w"].clone())
    mine = fl.optim.adam(lr=schedules.cosine(0.3, end=0.1))
    theirs = torch.optim.Adam([q], lr=0.3)
    scheduler = lr_scheduler.CosineAnnealingLR(theirs, T_max=20, eta_min=0.1)
    state = mine.init(p)
    for _ in range(20):
        updates, state = mine.update({"w": p["w"] - 3}, state, p, steps=20)
        p = {"w": p["w"] + updates["w"]}
        q.grad = q.detach() - 3
        theirs.step()
        scheduler.step()
    torch.testing.assert_close(p["w"], q.detach(), rtol=1e-10, atol=0)


def test_any_hyperparameter_may_follow_a_schedule():
    optimizer = fl.optim.adam(betas=(schedules.constant(0.5), schedules.step(0.9, every=0.5, factor=0.5)))
    assert optimizer.numbers["beta2:value"] == 0.9
    p = {"w": torch.zeros(2, dtype=torch.float64)}
    _, state = optimizer.update({"w": torch.ones(2, dtype=torch.float64)}, optimizer.init(p), p, steps=2)
    torch.testing.assert_close(state["slots"]["w"]["exp_avg_sq"], torch.full((2,), 0.1, dtype=torch.float64))
    _, state = optimizer.update({"w": torch.ones(2, dtype=torch.float64)}, state, p, steps=2)
    expected = torch.full((2,), 0.1 * 0.45 + 0.55, dtype=torch.float64)
    torch.testing.assert_close(state["slots"]["w"]["exp_avg_sq"], expected)


def test_after_the_last_step_a_schedule_stays_at_its_end():
    optimizer = fl.optim.sgd(lr=schedules.cosine(1.0, end=0.25))
    p, g = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    state = {**optimizer.init(p), "step": torch.tensor(7.0, dtype=torch.float64)}
    assert optimizer.update(g, state, p, steps=4)[0]["w"] == -0.25


@pytest.mark.parametrize("steps", [None, 0, -3])
def test_a_schedule_needs_the_number_of_steps(steps):
    optimizer = fl.optim.sgd(lr=schedules.cosine(1.0))
    p = {"w": torch.zeros(1)}
    with pytest.raises(fl.errors.InvalidHyperparameter, match=r"lr follows a cosine schedule.*give steps="):
        optimizer.update(p, optimizer.init(p), p, steps=steps)
    with pytest.raises(fl.errors.InvalidHyperparameter, match=r"lr follows a cosine schedule.*steps="):
        optimizer.as_torch([nn.Parameter(torch.zeros(1))], steps=steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.step(0.1, every=0.0), r"every = 0\.0 is outside"),
        (lambda: schedules.step(0.1, factor=0.0), r"factor = 0\.0 is not above 0"),
        (lambda: schedules.cosine("fast"), "value = 'fast' is not a number"),
        (lambda: schedules.cosine(0.1, end=float("nan")), "end = nan is not finite"),
        (lambda: schedules.linear_warmup(0.1, fraction=1.0), r"fraction = 1\.0 is outside"),
        (lambda: schedules.linear_warmup(0.1, start=2.0), r"start = 2\.0 is outside"),
        (lambda: schedules.cosine(0.1, end=schedules.cosine(0.2)), "schedule"),
        (lambda: schedules.cosine(0.1, ends=0.2), "no argument 'ends'. Did you mean 'end'"),
        (lambda: fl.optim.sgd(lr=schedules.cosine(0.1, end=-0.1)), "lr at 1 of training = -0.1 is negative"),
        # The peak lies between the quarters of training.
        (
            lambda: fl.optim.adam(betas=(schedules.linear_warmup(schedules.cosine(1.01, end=0.0), fraction=0.05), 0.9)),
            "beta1 at 0.05 of training",
        ),
    ],
)
def test_numbers_outside_their_domain_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
