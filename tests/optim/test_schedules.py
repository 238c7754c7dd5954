"""Schedules against torch's schedulers, step by step, and the numbers of a rule along training."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import fallline as fl
from fallline.optim.serial import from_data, to_data
from fallline.sweeps import search

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


def assert_equals_torch(schedule, make, steps, *, updates=None, lr=0.3):
    """At each of the updates; a schedule and torch's accumulate round-off differently near a value of 0."""
    mine = [float(schedule(k / steps)) for k in range(updates or steps)]
    assert mine == pytest.approx(torch_values(make, updates or steps, lr), rel=1e-10, abs=1e-14)
    assert len(set(mine)) > 1, "the schedule does not move"


@pytest.mark.parametrize("steps", [7, 60])
@pytest.mark.parametrize("end", [0.0, 0.1, 0.9])
def test_linear_equals_linear_lr(steps, end):
    make = lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=end / 0.3, total_iters=steps)  # noqa: E731
    if end > 0.3:  # torch refuses an end above the start: from its other end the line is the same
        make = lambda o: lr_scheduler.LinearLR(o, start_factor=0.3 / end, total_iters=steps)  # noqa: E731
    assert_equals_torch(schedules.linear(0.3, end=end), make, steps, lr=max(0.3, end))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(steps=st.integers(3, 60), power=st.floats(0.3, 4.0))
def test_polynomial_equals_polynomial_lr(steps, power):
    make = lambda o: lr_scheduler.PolynomialLR(o, total_iters=steps, power=power)  # noqa: E731
    assert_equals_torch(schedules.polynomial(0.3, power=power), make, steps)


def test_polynomial_falls_to_its_end_like_optaxs():
    """(init − end)(1 − count/transition_steps)^power + end."""
    mine = our_values(schedules.polynomial(0.3, end=0.05, power=1.7), 20)
    assert mine == pytest.approx([(0.3 - 0.05) * (1 - k / 20) ** 1.7 + 0.05 for k in range(20)], rel=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(steps=st.integers(3, 60), gamma=st.floats(0.8, 1.05))
def test_exponential_equals_exponential_lr(steps, gamma):
    gamma = 0.97 if gamma == 1 else gamma
    make = lambda o: lr_scheduler.ExponentialLR(o, gamma=gamma)  # noqa: E731
    assert_equals_torch(schedules.exponential(0.3, factor=gamma**steps), make, steps)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=st.integers(4, 80), first=st.integers(2, 40), times=st.integers(1, 3), end=st.floats(0.0, 0.2))
def test_cosine_restarts_equals_cosine_annealing_warm_restarts(steps, first, times, end):
    first = min(first, steps)
    make = lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, first, T_mult=times, eta_min=end)  # noqa: E731
    assert_equals_torch(schedules.cosine_restarts(0.3, every=first / steps, factor=times, end=end), make, steps)


def test_cosine_restarts_begins_exactly_at_the_cycles_of_a_growing_length():
    for steps in (37, 100, 390):
        for first in range(1, steps):
            for times in (1, 2, 3):
                values = schedules.cosine_restarts(1.0, every=first / steps, factor=times)(
                    [k / steps for k in range(steps)]
                )
                begins, at, length = set(), 0, first
                while at < steps:
                    begins.add(at)
                    at, length = at + length, length * times
                assert {k for k, v in enumerate(values.tolist()) if v > 1 - 1e-12} == begins, (steps, first, times)


def test_the_lengths_of_cycles_may_grow_by_any_factor():
    """Cycles of 0.2, 0.3 and 0.45 of training begin at 0, 0.2 and 0.5."""
    schedule = schedules.cosine_restarts(1.0, every=0.2, factor=1.5)
    assert schedule([0.0, 0.1, 0.2, 0.35, 0.5, 0.725]).tolist() == pytest.approx([1, 0.5] * 3, abs=1e-12)
    nearly, even = schedules.cosine_restarts(1.0, every=0.2, factor=1 + 1e-9), schedules.cosine_restarts(1.0, every=0.2)
    assert nearly([0.1, 0.33, 0.77]).tolist() == pytest.approx(even([0.1, 0.33, 0.77]).tolist(), rel=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.integers(4, 60),
    fraction=st.floats(0.1, 0.49),
    div_factor=st.floats(0.5, 50.0),
    final_div_factor=st.floats(1.0, 1e4),
    linear=st.booleans(),
    three_phase=st.booleans(),
)
def test_one_cycle_equals_one_cycle_lr(steps, fraction, div_factor, final_div_factor, linear, three_phase):
    share = (fraction * steps + 1) / (steps + 1)
    numbers = {"div_factor": div_factor, "final_div_factor": final_div_factor, "three_phase": three_phase}
    anneal = "linear" if linear else "cos"
    expected = torch_values(
        lambda o: lr_scheduler.OneCycleLR(
            o, 0.3, total_steps=steps + 1, pct_start=share, anneal_strategy=anneal, **numbers
        ),
        steps,
    )
    schedule = schedules.one_cycle(0.3, fraction=fraction, linear=linear, **numbers)
    assert our_values(schedule, steps) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    last = 0.3 / div_factor / final_div_factor
    assert float(schedule(1.0)) == pytest.approx(last, rel=1e-9)


def test_one_cycle_of_momentum_equals_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=21, pct_start=(0.4 * 20 + 1) / 21)
    schedule = schedules.one_cycle(0.85, fraction=0.4, div_factor=0.85 / 0.95, final_div_factor=1.0)
    for k in range(21):
        assert float(schedule(k / 20)) == pytest.approx(optimizer.param_groups[0]["momentum"], rel=1e-10)
        optimizer.step()
        if k < 20:
            scheduler.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize(("steps", "warm", "cool"), [(40, 8, 10), (23, 1, 7), (10, 5, 5)])
def test_warmup_stable_decay_equals_sequential_lr(steps, warm, cool):
    def make(optimizer):
        pieces = [
            lr_scheduler.LinearLR(optimizer, start_factor=1e-14, total_iters=warm),
            lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0),
            lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.06 / 0.3, total_iters=cool),
        ]
        return lr_scheduler.SequentialLR(optimizer, pieces, milestones=[warm, steps - cool])

    if warm + cool == steps:  # then nothing is between them, which SequentialLR does not take
        make = lambda o: lr_scheduler.SequentialLR(  # noqa: E731
            o,
            [
                lr_scheduler.LinearLR(o, start_factor=1e-14, total_iters=warm),
                lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.06 / 0.3, total_iters=cool),
            ],
            milestones=[warm],
        )
    schedule = schedules.warmup_stable_decay(0.3, warmup=warm / steps, decay=cool / steps, end=0.06)
    assert_equals_torch(schedule, make, steps)


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda q: 1 - q),
        ("square_root", lambda q: 1 - math.sqrt(q)),
        ("cosine", lambda q: (1 + math.cos(math.pi * q)) / 2),
    ],
)
def test_the_cool_down_has_its_papers_shape(shape, left):
    """Hägele et al.: f(n, N, N_decay) = 1 − √((n − (N − N_decay))/N_decay); the others as they are usual."""
    schedule = schedules.warmup_stable_decay(0.3, warmup=0.0, decay=0.25, end=0.02, shape=shape)
    expected = [0.3 if n < 30 else 0.02 + (0.3 - 0.02) * left((n - 30) / 10) for n in range(40)]
    assert our_values(schedule, 40) == pytest.approx(expected, rel=1e-10)
    assert float(schedule(1.0)) == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize(("steps", "warm"), [(50, 5), (37, 20)])
def test_inverse_square_root_equals_lambda_lr(steps, warm):
    make = lambda o: lr_scheduler.LambdaLR(o, lambda k: min(k / warm, math.sqrt(warm / max(k, 1))))  # noqa: E731
    assert_equals_torch(schedules.inverse_square_root(0.3, fraction=warm / steps), make, steps)


def test_inverse_square_root_is_the_transformers():
    """d^−0.5 · min(step^−0.5, step · warmup^−1.5) from step 1 on."""
    steps, warm, d = 100, 16, 64
    schedule = schedules.inverse_square_root((d * warm) ** -0.5, fraction=warm / steps)
    expected = [d**-0.5 * min(k**-0.5, k * warm**-1.5) for k in range(1, steps + 1)]
    assert [float(schedule(k / steps)) for k in range(1, steps + 1)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize(("first", "second", "steps"), [(6, 20, 33), (1, 2, 3), (3, 29, 41)])
def test_join_equals_sequential_lr(first, second, steps):
    def make(optimizer):
        pieces = [
            lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=first),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=second - first, eta_min=0.1),
            lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
        ]
        return lr_scheduler.SequentialLR(optimizer, pieces, milestones=[first, second])

    pieces = [
        schedules.linear(0.06, end=0.3),
        schedules.cosine(0.3, end=0.1),
        schedules.exponential(0.3, factor=0.9 ** (steps - second)),
    ]
    assert_equals_torch(schedules.join(pieces, at=[first / steps, second / steps]), make, steps)


def test_join_of_numbers_equals_multi_step_lr():
    make = lambda o: lr_scheduler.MultiStepLR(o, milestones=[7, 13], gamma=0.1)  # noqa: E731
    assert_equals_torch(schedules.join([0.3, 0.03, 0.003], at=[7 / 20, 13 / 20]), make, 20)


def test_a_piece_begins_exactly_at_its_place():
    """0.1 + 0.2 and 3/10 are not the same number."""
    schedule = schedules.join([0.5, 2.0], at=[0.1 + 0.2])
    assert our_values(schedule, 10) == [0.5] * 3 + [2.0] * 7


def test_pieces_of_a_join_may_be_joins_and_warm_ups():
    inner = schedules.join([schedules.linear_warmup(schedules.cosine(1.0), fraction=0.5), 4.0], at=[0.5])
    outer = schedules.join([inner, 8.0], at=[0.5])
    assert outer([0.0, 0.0625, 0.125, 0.1875, 0.25, 0.5]).tolist() == pytest.approx([0, 0.5, 1, 0.5, 4, 8])
    assert set(outer.numbers) == {
        "at1", "piece1.at1", "piece1.piece1.fraction", "piece1.piece1.start", "piece1.piece1.after.value",
        "piece1.piece1.after.end", "piece1.piece2.value", "piece2.value",
    }  # fmt: skip


MOVING = [
    schedules.constant(0.3),
    schedules.step(0.3),
    schedules.cosine(0.3),
    schedules.linear(0.3),
    schedules.polynomial(0.3, end=0.01, power=2.0),
    schedules.exponential(0.3),
    schedules.cosine_restarts(0.3, every=0.25, factor=1.5),
    schedules.one_cycle(0.3),
    schedules.one_cycle(0.3, fraction=0.5, linear=True, three_phase=True),
    schedules.warmup_stable_decay(0.3),
    schedules.warmup_stable_decay(0.3, warmup=0.0, decay=1.0, shape="square_root"),
    schedules.inverse_square_root(0.3),
    schedules.linear_warmup(schedules.polynomial(0.3)),
    schedules.join([schedules.linear(0.0, end=0.3), 0.2, schedules.cosine(0.3)], at=[0.2, 0.4]),
]


@pytest.mark.parametrize("schedule", MOVING, ids=lambda s: repr(s).removeprefix("fl.schedules."))
def test_every_schedule_is_finite_everywhere_and_the_same_for_a_population(schedule):
    """Progress [row, 1] with numbers [row, 1] is progress and numbers of one model."""
    numbers = {n: torch.tensor([[v], [v * 0.9]], dtype=torch.float64) for n, v in schedule.numbers.items()}
    if "fraction" in numbers and schedule.kind.endswith("three_phase"):
        assert schedule.numbers["fraction"] == 0.5, "the end of its domain"
    if "factor" in numbers and schedule.kind == "cosine_restarts":
        numbers["factor"][1] = 1.0
    for progress in [k / 40 for k in range(41)]:
        at = torch.full((2, 1), progress, dtype=torch.float64)
        rows = schedule.curve(at, numbers)
        assert rows.shape == (2, 1)
        assert rows.dtype == torch.float64
        assert rows.isfinite().all()
        alone = [schedule.curve(at[i, 0], {n: t[i, 0] for n, t in numbers.items()}) for i in range(2)]
        assert rows.flatten().tolist() == [float(each) for each in alone]
        mapped = torch.func.vmap(schedule.curve)(at[:, 0], {n: t[:, 0] for n, t in numbers.items()})
        assert rows.flatten().tolist() == mapped.tolist()
        assert float(schedule(progress)) == float(rows[0])


def test_the_list_of_moving_schedules_has_every_public_one():
    public = {n for n, f in vars(schedules).items() if getattr(f, "__module__", "") == schedules.__name__}
    made = {schedule.call.name for schedule in MOVING}
    assert {n for n in public if n[0].islower() and not n.startswith("_")} == made


def test_schedules_of_other_shapes_are_not_updated_together():
    """Their curves differ in more than numbers, so that a population must keep them apart."""
    shaped = [schedules.warmup_stable_decay(0.3, shape=shape) for shape in ("linear", "square_root", "cosine")]
    cycles = [schedules.one_cycle(0.3, linear=a, three_phase=b) for a in (False, True) for b in (False, True)]
    joined = [schedules.join([0.1, piece], at=[0.5]) for piece in (0.2, schedules.linear(0.2), shaped[0], shaped[1])]
    kinds = [fl.optim.sgd(lr=schedule).structure for schedule in (*shaped, *cycles, *joined)]
    assert all(a != b for i, a in enumerate(kinds) for b in kinds[:i])


@pytest.mark.parametrize("schedule", MOVING, ids=lambda s: repr(s).removeprefix("fl.schedules."))
def test_schedules_are_written_down_and_made_again(schedule):
    for again in (pickle.loads(pickle.dumps(schedule)), from_data(to_data(schedule)), eval(repr(schedule))):
        assert again == schedule
        assert again([0.1, 0.6]).tolist() == schedule([0.1, 0.6]).tolist()


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
        (lambda: schedules.linear(0.1, end="low"), "end = 'low' is not a number"),
        (lambda: schedules.polynomial(0.1, power=0.0), r"power = 0\.0 is not above 0"),
        (lambda: schedules.exponential(0.1, factor=-0.5), r"factor = -0\.5 is not above 0"),
        (lambda: schedules.cosine_restarts(0.1, every=2.0), r"every = 2\.0 is outside"),
        (lambda: schedules.cosine_restarts(0.1, factor=0.5), r"factor = 0\.5 is outside"),
        (lambda: schedules.one_cycle(0.1, fraction=0.0), r"fraction = 0\.0 is outside \(0, 1\)"),
        (lambda: schedules.one_cycle(0.1, fraction=0.6, three_phase=True), r"fraction = 0\.6 is outside \(0, 0\.5\]"),
        (lambda: schedules.one_cycle(0.1, div_factor=0.0), r"div_factor = 0\.0 is not above 0"),
        (lambda: schedules.one_cycle(0.1, final_div_factor=0.0), r"final_div_factor = 0\.0 is not above 0"),
        (lambda: schedules.one_cycle(0.1, linear="cos"), "linear = 'cos' is neither True nor False"),
        (lambda: schedules.warmup_stable_decay(0.1, warmup=1.0), r"warmup = 1\.0 is outside"),
        (lambda: schedules.warmup_stable_decay(0.1, decay=0.0), r"decay = 0\.0 is outside"),
        (lambda: schedules.warmup_stable_decay(0.1, warmup=0.6, decay=0.5), "more than the whole of training"),
        (lambda: schedules.warmup_stable_decay(0.1, shape="sqaure_root"), "Did you mean 'square_root'"),
        (lambda: schedules.inverse_square_root(0.1, fraction=1.0), r"fraction = 1\.0 is outside"),
        (lambda: schedules.join(0.1, at=[0.5]), r"pieces = 0\.1 is not a list"),
        (lambda: schedules.join([0.1, 0.2], at=0.5), r"at = 0\.5 is not a list"),
        (lambda: schedules.join([0.1], at=[]), "1 pieces and 0 places"),
        (lambda: schedules.join([0.1, 0.2], at=[0.2, 0.3]), "2 pieces and 2 places"),
        (lambda: schedules.join([0.1, 0.2], at=[1.0]), r"at1 = 1\.0 is outside"),
        (lambda: schedules.join([0.1, 0.2, 0.3], at=[0.5, 0.5]), "does not ascend"),
        (lambda: schedules.join([0.1, "fast"], at=[0.5]), "value = 'fast' is not a number"),
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


STEPS = 24


def by_hand(set_numbers, make, seed=0):
    """The parameters that a plain loop over the diabetes task ends with, numbers set before every step."""
    task = fl.tasks.diabetes(dtype=torch.float64).check()
    torch.manual_seed(seed)
    model = task.model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make(model.parameters())
    order = torch.Generator().manual_seed(seed)
    done = 0
    while done < STEPS:
        for index in torch.randperm(len(task.train.x), generator=order).split(task.batch_size):
            if done == STEPS:
                break
            set_numbers(optimizer.param_groups[0], done / STEPS)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(task.train.x[index]), task.train.y[index]).backward()
            optimizer.step()
            done += 1
    found = {name: p.detach() for name, p in model.named_parameters()}
    assert all((found[name] - start[name]).abs().max() > 1e-4 for name in found), "a parameter did not move"
    return found


def swept(optimizer, engine):
    task = fl.tasks.diabetes(dtype=torch.float64).check()
    return fl.sweep(task, [optimizer], seeds=1, steps=STEPS, engine=engine, workers=1, keep_parameters="all")


def along(key, formula):
    return lambda group, p: group.__setitem__(key, formula(p))


ON_OTHER_NUMBERS = {
    "beta1 of adam": (
        fl.optim.adam(lr=0.01, betas=(schedules.linear(0.95, end=0.5), 0.99)),
        lambda params: torch.optim.Adam(params, lr=0.01),
        along("betas", lambda p: (0.95 + (0.5 - 0.95) * p, 0.99)),
    ),
    "weight decay of adamw": (
        fl.optim.adamw(lr=0.01, weight_decay=schedules.exponential(3.0, factor=0.1)),
        lambda params: torch.optim.AdamW(params, lr=0.01),
        along("weight_decay", lambda p: 3.0 * 0.1**p),
    ),
    "coupled weight decay of sgd": (
        fl.optim.sgd(lr=0.01, weight_decay=schedules.join([0.0, 0.5], at=[0.5])),
        lambda params: torch.optim.SGD(params, lr=0.01),
        along("weight_decay", lambda p: 0.0 if p < 0.5 else 0.5),
    ),
    "momentum of sgd": (
        fl.optim.sgd(lr=0.01, momentum=schedules.one_cycle(0.5, fraction=0.5, div_factor=0.6, linear=True)),
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        along(
            "momentum",
            lambda p: (
                0.5 / 0.6 + (0.5 - 0.5 / 0.6) * 2 * p if p < 0.5 else 0.5 + (0.5 / 0.6 / 1e4 - 0.5) * (2 * p - 1)
            ),
        ),
    ),
    "alpha and eps of rmsprop": (
        fl.optim.rmsprop(lr=0.01, alpha=schedules.cosine(0.99, end=0.5), eps=schedules.linear(1e-8, end=0.1)),
        lambda params: torch.optim.RMSprop(params, lr=0.01),
        lambda group, p: group.update(alpha=0.5 + 0.49 * (1 + math.cos(math.pi * p)) / 2, eps=1e-8 * (1 - p) + 0.1 * p),
    ),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["vectorised", "sequential"])
@pytest.mark.parametrize("case", ON_OTHER_NUMBERS)
def test_a_schedule_on_any_number_equals_a_loop_that_sets_it_by_hand(case, engine):
    optimizer, make, set_numbers = ON_OTHER_NUMBERS[case]
    result = swept(optimizer, engine)
    for name, expected in by_hand(set_numbers, make).items():
        torch.testing.assert_close(result.parameters(0)[name], expected, rtol=1e-9, atol=1e-11)


TWO = [0.002, 0.02]
THEIR_OWN_NUMBERS = {
    "step": lambda: schedules.step(fl.grid(TWO), every=fl.grid([0.25, 0.5]), factor=fl.grid([0.1, 0.5])),
    "cosine": lambda: schedules.cosine(fl.grid(TWO), end=fl.grid([0.0, 1e-3])),
    "linear": lambda: schedules.linear(fl.grid(TWO), end=fl.grid([0.0, 1e-3])),
    "polynomial": lambda: schedules.polynomial(fl.grid(TWO), end=fl.grid([0.0, 1e-3]), power=fl.grid([0.5, 2.0])),
    "exponential": lambda: schedules.exponential(fl.grid(TWO), factor=fl.grid([0.01, 0.5])),
    "cosine_restarts": lambda: schedules.cosine_restarts(
        fl.grid(TWO), every=fl.grid([0.2, 0.5]), factor=fl.grid([1.0, 2.0])
    ),
    "one_cycle": lambda: schedules.one_cycle(
        fl.grid(TWO), fraction=fl.grid([0.2, 0.5]), div_factor=fl.grid([2.0, 25.0])
    ),
    "warmup_stable_decay": lambda: schedules.warmup_stable_decay(
        fl.grid(TWO), warmup=fl.grid([0.0, 0.2]), decay=fl.grid([0.2, 0.8]), shape="square_root"
    ),
    "inverse_square_root": lambda: schedules.inverse_square_root(fl.grid(TWO), fraction=fl.grid([0.1, 0.3])),
    "linear_warmup": lambda: schedules.linear_warmup(
        schedules.cosine(fl.grid(TWO), end=fl.grid([0.0, 1e-3])), fraction=fl.grid([0.1, 0.3])
    ),
    "join": lambda: schedules.join(
        [schedules.linear(0.0, end=fl.grid(TWO)), fl.grid(TWO), schedules.cosine(0.01)], at=[fl.grid([0.1, 0.3]), 0.6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", THEIR_OWN_NUMBERS)
def test_the_numbers_of_a_schedule_can_be_swept_and_each_trial_equals_its_single_run(kind):
    """One population whose rows follow curves of one kind with other numbers."""
    template = fl.optim.sgd(lr=THEIR_OWN_NUMBERS[kind](), momentum=0.9)
    count = 2 ** len(template.dimensions)
    task = fl.tasks.diabetes(dtype=torch.float64).check()
    result = fl.sweep(task, [template], seeds=1, steps=STEPS, engine="vectorised", workers=1, keep_parameters="all")
    assert len(result.trials) == count
    ends = []
    plans = search.configurations([template], [task.loss], samples=1, search_seed=0)
    for trial, plan in enumerate(plans):
        chosen = plan.optimizer
        alone = swept(chosen, "sequential")
        np.testing.assert_allclose(result.history.train_loss[trial], alone.history.train_loss[0], rtol=1e-9)
        for name, expected in alone.parameters(0).items():
            torch.testing.assert_close(result.parameters(trial)[name], expected, rtol=1e-9, atol=1e-12)
        ends.append(float(result.history.train_loss[trial, -1]))
    assert len({round(end, 12) for end in ends}) == count, "two trials are the same: a number does nothing"


def test_dimensions_of_a_join_have_names():
    optimizer = fl.optim.sgd(lr=THEIR_OWN_NUMBERS["join"]())
    assert list(optimizer.dimensions) == ["lr1.end", "lr2", "lr.at1"]
